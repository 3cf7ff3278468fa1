//! Points in time as the OCI specifications and engines write them.

use std::time::{SystemTime, UNIX_EPOCH};

const SECONDS_PER_DAY: u64 = 86_400;

/// RFC 3339 in UTC with nanoseconds; times before 1970 are shown as 1970.
pub(super) fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (
        since.as_secs() / SECONDS_PER_DAY,
        since.as_secs() % SECONDS_PER_DAY,
    );
    let (year, month, day) = date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z",
        since.subsec_nanos()
    )
}

/// The Gregorian date of a day after 1970-01-01. Years are counted from March, so that a leap day is the last of one.
fn date(days: u64) -> (u64, u64, u64) {
    // 400 years have 146097 days; 719468 days lie between 0000-03-01 and 1970-01-01.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let january_or_february = month >= 10;
    let month = if january_or_february {
        month - 9
    } else {
        month + 3
    };
    (
        era * 400 + year + u64::from(january_or_february),
        month,
        day,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_those_of_date() {
        let of = |seconds, nanos| rfc3339(UNIX_EPOCH + Duration::new(seconds, nanos));
        assert_eq!(of(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(of(951_782_400, 1), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(of(1_709_251_199, 0), "2024-02-29T23:59:59.000000000Z");
        assert_eq!(
            of(1_735_689_600, 500_000_000),
            "2025-01-01T00:00:00.500000000Z"
        );
    }
}
