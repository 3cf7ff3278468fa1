//! Values of command line options, each parsed once into what it means.

use crate::config::{MAX_MEMORY_MIB, MIN_MEMORY_MIB};
use coffer_proto::limits::MAX_VCPUS;
use nix::sys::signal::Signal;
use oci_spec::runtime::PosixRlimitType;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Least memory of a container, as docker has it; less does not even hold a shell's pages.
const MIN_MEMORY_BYTES: i64 = 6 << 20;

/// A memory size in bytes: `512m`, `2g`, `1048576`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MemorySize(pub(super) i64);

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let number = lower.trim_end_matches("ib").trim_end_matches('b');
        let (digits, shift) = match number.as_bytes().last() {
            Some(b'k') => (&number[..number.len() - 1], 10),
            Some(b'm') => (&number[..number.len() - 1], 20),
            Some(b'g') => (&number[..number.len() - 1], 30),
            _ => (number, 0),
        };
        let value: i64 = digits
            .parse()
            .map_err(|_| "expected a number with k, m or g, such as 512m")?;
        let bytes = value
            .checked_mul(1 << shift)
            .filter(|bytes| bytes >> 20 <= i64::from(MAX_MEMORY_MIB));
        match bytes {
            Some(bytes) if bytes >= MIN_MEMORY_BYTES => Ok(Self(bytes)),
            Some(_) => Err(format!("less than {}m", MIN_MEMORY_BYTES >> 20)),
            None => Err(format!("more than {}g", MAX_MEMORY_MIB >> 10)),
        }
    }
}

impl MemorySize {
    /// Size of a VM for a container of this size, in whole MiB.
    pub(super) fn vm_mib(self, overhead_mib: u32) -> u32 {
        let container = u32::try_from((self.0 + (1 << 20) - 1) >> 20).unwrap_or(MAX_MEMORY_MIB);
        container
            .saturating_add(overhead_mib)
            .clamp(MIN_MEMORY_MIB, MAX_MEMORY_MIB)
    }
}

/// A limit in bytes that update sets: a size, or -1 for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit(pub(super) i64);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "-1" {
            return Ok(Self(-1));
        }
        if let Ok(bytes) = text.parse::<u64>() {
            return i64::try_from(bytes)
                .map(Self)
                .map_err(|error| error.to_string());
        }
        text.parse::<MemorySize>().map(|size| Self(size.0))
    }
}

/// A duration as Go programs write it: `5s`, `500ms`, `1m`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let expected = || "expected a number with ms, s, m or h, such as 5s".to_owned();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| expected())?;
    let duration = match &text[digits..] {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.saturating_mul(60)),
        "h" => Duration::from_secs(number.saturating_mul(3600)),
        _ => return Err(expected()),
    };
    if duration.is_zero() {
        return Err("expected more than nothing".into());
    }
    Ok(duration)
}

/// A number of processors, in thousandths: `2`, `0.5`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cpus {
    milli: u32,
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected a number between 0.01 and {MAX_VCPUS}, such as 1.5");
        let value: f64 = text.parse().map_err(|_| expected())?;
        if !(0.01..=f64::from(MAX_VCPUS)).contains(&value) {
            return Err(expected());
        }
        // In range, so it fits and is positive.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Ok(Self {
            milli: (value * 1000.0).round() as u32,
        })
    }
}

impl Cpus {
    /// Virtual CPUs that the VM needs for it.
    pub(super) fn vcpus(self) -> u8 {
        u8::try_from(self.milli.div_ceil(1000)).unwrap_or(MAX_VCPUS)
    }

    /// Quota in microseconds per 100 ms, where whole processors would be more than was asked for.
    pub(super) fn quota(self) -> Option<i64> {
        (!self.milli.is_multiple_of(1000)).then(|| i64::from(self.milli) * 100)
    }
}

/// `SOURCE:DESTINATION[:ro|rw]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Volume {
    pub(super) source: PathBuf,
    pub(super) destination: PathBuf,
    pub(super) read_only: bool,
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let (source, destination) = (parts.next().unwrap_or_default(), parts.next());
        let read_only = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(other) => return Err(format!("{other:?} is neither ro nor rw")),
        };
        let (Some(destination), None) = (destination, parts.next()) else {
            return Err("expected SOURCE:DESTINATION[:ro]".into());
        };
        if source.is_empty() || !destination.starts_with('/') {
            return Err(format!(
                "expected an absolute path in the container, not {destination:?}"
            ));
        }
        Ok(Self {
            source: source.into(),
            destination: destination.into(),
            read_only,
        })
    }
}

/// `nofile=1024` or `nofile=1024:4096`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ulimit {
    pub(super) kind: PosixRlimitType,
    pub(super) soft: u64,
    pub(super) hard: u64,
}

impl FromStr for Ulimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, limits) = text
            .split_once('=')
            .ok_or("expected NAME=SOFT[:HARD], such as nofile=1024")?;
        let kind = format!("RLIMIT_{}", name.to_ascii_uppercase());
        let kind = kind
            .parse()
            .map_err(|_| format!("there is no limit {name:?}"))?;
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        let number = |text: &str| match text {
            "unlimited" | "-1" => Ok(u64::MAX),
            _ => text.parse().map_err(|_| format!("{text:?} is no number")),
        };
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(format!(
                "the soft limit {soft} is above the hard limit {hard}"
            ));
        }
        Ok(Self { kind, soft, hard })
    }
}

/// A signal by number or name, with or without SIG; also `RTMIN+3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SignalNumber(pub(super) u32);

/// First and last real-time signal as glibc shows them to programs.
const SIGRTMIN: u32 = 34;
const SIGRTMAX: u32 = 64;

impl FromStr for SignalNumber {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || format!("there is no signal {text:?}");
        if let Ok(number) = text.parse() {
            return if number <= SIGRTMAX {
                Ok(Self(number))
            } else {
                Err(unknown())
            };
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let real_time =
            |offset: &str| -> Option<u32> { offset.trim_start_matches(['+', '-']).parse().ok() };
        let number = if let Some(offset) = name.strip_prefix("RTMIN") {
            if offset.is_empty() {
                Some(SIGRTMIN)
            } else {
                real_time(offset).map(|offset| SIGRTMIN + offset)
            }
        } else if let Some(offset) = name.strip_prefix("RTMAX") {
            if offset.is_empty() {
                Some(SIGRTMAX)
            } else {
                real_time(offset).and_then(|offset| SIGRTMAX.checked_sub(offset))
            }
        } else {
            Signal::from_str(&format!("SIG{name}"))
                .ok()
                .map(|signal| (signal as i32).unsigned_abs())
        };
        number
            .filter(|number| *number <= SIGRTMAX)
            .map(Self)
            .ok_or_else(unknown)
    }
}

/// `KEY=VALUE`, or `KEY` for the value that the caller has.
pub(super) fn parse_env(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some(("", _)) => Err("the name is empty".into()),
        Some(_) => Ok(text.into()),
        None => {
            let value = std::env::var(text)
                .map_err(|_| format!("{text} is not set; expected KEY=VALUE"))?;
            Ok(format!("{text}={value}"))
        }
    }
}

/// `KEY=VALUE`
pub(super) fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("expected KEY=VALUE".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes() {
        let parse = |text: &str| text.parse::<MemorySize>().map(|size| size.0);
        assert_eq!(parse("512m"), Ok(512 << 20));
        assert_eq!(parse("1G"), Ok(1 << 30));
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        assert_eq!(parse("8388608"), Ok(8 << 20));
        assert_eq!(parse("65536kb"), Ok(64 << 20));
        for bad in [
            "",
            "lots",
            "m",
            "-5m",
            "1m",
            "9999999999g",
            "1.5g",
            "99999999999999999999",
        ] {
            assert!(parse(bad).is_err(), "{bad} was taken");
        }
        assert_eq!(MemorySize((300 << 20) + 1).vm_mib(128), 429);
    }

    #[test]
    fn limits_and_durations_are_those_of_runcs_callers() {
        let limit = |text: &str| text.parse::<Limit>().map(|limit| limit.0);
        assert_eq!(
            (limit("-1"), limit("0"), limit("1024"), limit("64m")),
            (Ok(-1), Ok(0), Ok(1024), Ok(64 << 20))
        );
        assert!(limit("-2").is_err() && limit("x").is_err());
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "5", "0s", "s", "5d", "-1s", "99999999999999999999s"] {
            assert!(parse_duration(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn fractions_of_a_processor_are_a_quota() {
        let parse = |text: &str| {
            text.parse::<Cpus>()
                .map(|cpus| (cpus.vcpus(), cpus.quota()))
        };
        assert_eq!(parse("2"), Ok((2, None)));
        assert_eq!(parse("0.5"), Ok((1, Some(50_000))));
        assert_eq!(parse("1.25"), Ok((2, Some(125_000))));
        for bad in ["0", "-1", "65", "x", "NaN", "inf"] {
            assert!(parse(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn volumes() {
        let parse = |text: &str| text.parse::<Volume>();
        let volume = parse("/a:/b:ro").unwrap();
        assert_eq!(
            (volume.source, volume.destination, volume.read_only),
            ("/a".into(), "/b".into(), true)
        );
        assert!(!parse("a:/b").unwrap().read_only && !parse("a:/b:rw").unwrap().read_only);
        for bad in ["relative", "/a:", "/a:b", ":/b", "/a:/b:x", "/a:/b:ro:x"] {
            assert!(parse(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn ulimits() {
        let limit: Ulimit = "nofile=123:456".parse().unwrap();
        assert_eq!(
            (limit.kind, limit.soft, limit.hard),
            (PosixRlimitType::RlimitNofile, 123, 456)
        );
        let limit: Ulimit = "core=unlimited".parse().unwrap();
        assert_eq!(
            (limit.kind, limit.soft, limit.hard),
            (PosixRlimitType::RlimitCore, u64::MAX, u64::MAX)
        );
        for bad in ["nofile", "fly=1", "nofile=x", "nofile=2:1"] {
            assert!(bad.parse::<Ulimit>().is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn signals() {
        let parse = |text: &str| text.parse::<SignalNumber>().map(|signal| signal.0);
        for (text, number) in [
            ("TERM", 15),
            ("SIGKILL", 9),
            ("sigusr1", 10),
            ("0", 0),
            ("9", 9),
            ("64", 64),
        ] {
            assert_eq!(parse(text), Ok(number));
        }
        assert_eq!(
            (parse("RTMIN+3"), parse("SIGRTMAX-1"), parse("RTMIN")),
            (Ok(37), Ok(63), Ok(34))
        );
        for bad in ["SIGNONE", "65", "-1", "", "RTMIN+99", "RTMAX-99"] {
            assert!(parse(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn environment() {
        assert_eq!(parse_env("A=b=c"), Ok("A=b=c".into()));
        assert_eq!(parse_env("A="), Ok("A=".into()));
        assert!(parse_env("=x").is_err() && parse_env("NO_SUCH_VARIABLE_HERE").is_err());
        assert!(parse_env("PATH").unwrap().starts_with("PATH=/"));
    }
}
