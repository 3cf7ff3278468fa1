//! The table of `run --timings`.

use crate::state::{Clock, Phase};
use serde_json::json;
use std::fmt::Write;
use std::time::Duration;

/// When each step of the boot was done. `total` is the whole command so far.
pub(super) fn table(phases: &[Phase], total: Duration, as_json: bool) -> String {
    if as_json {
        let microseconds = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let phase = |phase: &Phase| json!({"name": phase.name, "clock": phase.clock, "at_us": microseconds(phase.at)});
        let phases: Vec<_> = phases.iter().map(phase).collect();
        return format!(
            "{}\n",
            json!({"phases": phases, "total_us": microseconds(total)})
        );
    }
    let mut text = String::new();
    for (clock, title) in [
        (Clock::Host, "host, since the boot began"),
        (Clock::Hypervisor, "hypervisor, since its process started"),
        (Clock::Guest, "guest, since its kernel started"),
    ] {
        let mut before = Duration::ZERO;
        let mut of_clock = phases
            .iter()
            .filter(|phase| phase.clock == clock)
            .peekable();
        if of_clock.peek().is_some() {
            writeln!(text, "{title:<42} {:>12} {:>12}", "done at", "took")
                .expect("a String takes everything");
        }
        for phase in of_clock {
            let took = phase.at.saturating_sub(before);
            before = phase.at;
            let line = writeln!(
                text,
                "  {:<40} {:>12} {:>12}",
                phase.name,
                milliseconds(phase.at),
                milliseconds(took)
            );
            line.expect("a String takes everything");
        }
    }
    writeln!(
        text,
        "{:<42} {:>12}",
        "the whole command",
        milliseconds(total)
    )
    .expect("a String takes everything");
    text
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_grouped_by_clock() {
        let phase = |name: &str, ms, clock| Phase {
            name: name.into(),
            at: Duration::from_millis(ms),
            clock,
        };
        let phases = [
            phase("spawned", 5, Clock::Host),
            phase("agent start", 700, Clock::Guest),
            phase("ready", 25, Clock::Host),
        ];
        let text = table(&phases, Duration::from_secs(2), false);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert!(
            lines[2].contains("ready")
                && lines[2].contains("25.0 ms")
                && lines[2].ends_with("20.0 ms"),
            "{text}"
        );
        assert!(
            lines[4].contains("agent start") && lines[5].contains("2000.0 ms"),
            "{text}"
        );
        let text = table(&phases, Duration::from_secs(2), true);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&json["phases"][0]["at_us"], &json["total_us"]),
            (&json!(5000), &json!(2_000_000))
        );
    }
}
