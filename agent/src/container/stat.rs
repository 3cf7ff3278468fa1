//! The figures of a container's cgroup.

use coffer_proto::agent::{IoStat, StatContainerResponse};

use super::cgroup::{Cgroup, flat_keyed};
use super::failure::Failure;

/// Reads all figures; those the kernel doesn't have stay 0.
pub fn stat(cgroup: &Cgroup) -> Result<StatContainerResponse, Failure> {
    let mut stat = StatContainerResponse::new();
    let cpu = cgroup.read("cpu.stat")?.unwrap_or_default();
    for (key, value) in flat_keyed(&cpu) {
        match key {
            "usage_usec" => stat.cpu_usage_us = value,
            "user_usec" => stat.cpu_user_us = value,
            "system_usec" => stat.cpu_system_us = value,
            "nr_periods" => stat.cpu_nr_periods = value,
            "nr_throttled" => stat.cpu_nr_throttled = value,
            "throttled_usec" => stat.cpu_throttled_us = value,
            _ => {}
        }
    }
    stat.memory_current = number(cgroup, "memory.current")?;
    stat.memory_peak = number(cgroup, "memory.peak")?;
    stat.memory_limit = number(cgroup, "memory.max")?;
    stat.swap_current = number(cgroup, "memory.swap.current")?;
    stat.swap_limit = number(cgroup, "memory.swap.max")?;
    stat.pids_current = number(cgroup, "pids.current")?;
    stat.pids_limit = number(cgroup, "pids.max")?;
    let owned = |text: String| flat_keyed(&text).map(|(k, v)| (k.to_owned(), v)).collect();
    stat.memory_stat = cgroup.read("memory.stat")?.map(owned).unwrap_or_default();
    stat.memory_events = cgroup.read("memory.events")?.map(owned).unwrap_or_default();
    let io = cgroup.read("io.stat")?.unwrap_or_default();
    stat.io = io.lines().filter_map(io_line).collect();
    Ok(stat)
}

/// A file of one number; "max" is `u64::MAX`.
fn number(cgroup: &Cgroup, file: &str) -> Result<u64, Failure> {
    let text = cgroup.read(file)?.unwrap_or_default();
    Ok(match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    })
}

/// "254:0 rbytes=1 wbytes=2 rios=3 wios=4 …"
fn io_line(line: &str) -> Option<IoStat> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut io = IoStat::new();
    (io.major, io.minor) = (major.parse().ok()?, minor.parse().ok()?);
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => io.rbytes = value,
            "wbytes" => io.wbytes = value,
            "rios" => io.rios = value,
            "wios" => io.wios = value,
            _ => {}
        }
    }
    Some(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_io_stat() {
        let io = io_line("254:16 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=0").unwrap();
        assert_eq!((io.major, io.minor, io.rbytes, io.wios), (254, 16, 4096, 3));
        assert!(io_line("nonsense").is_none());
    }
}
