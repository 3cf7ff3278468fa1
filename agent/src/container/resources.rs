//! `linux.resources` of the OCI spec as writes to cgroup v2 files.
//!
//! The spec speaks cgroup v1; where v2 has other units, the conversions are those that runc, crun and the Kubernetes
//! documentation use, so a pod behaves as it does elsewhere.

use std::fs;

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, LinuxThrottleDevice,
};

use super::cgroup::Cgroup;
use super::failure::Failure;

/// Default of `cpu.max`'s period, microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// Applies what is present; what is absent stays as it is.
pub fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<(), Failure> {
    if let Some(memory) = resources.memory() {
        apply_memory(cgroup, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        apply_cpu(cgroup, cpu)?;
    }
    if let Some(pids) = resources.pids() {
        cgroup.write("pids.max", &limit(pids.limit()))?;
    }
    if let Some(io) = resources.block_io() {
        apply_io(cgroup, io)?;
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        apply_hugetlb(cgroup, huge)?;
    }
    for (file, value) in resources.unified().iter().flatten() {
        cgroup.write(file, value)?;
    }
    Ok(())
}

/// A limit of the spec: -1 (and 0, which no process could live with) is none.
fn limit(value: i64) -> String {
    if value > 0 {
        value.to_string()
    } else {
        "max".into()
    }
}

fn apply_memory(cgroup: &Cgroup, memory: &LinuxMemory) -> Result<(), Failure> {
    if let Some(limit) = memory.limit()
        && memory.check_before_update() == Some(true)
        && limit > 0
    {
        let text = cgroup.read("memory.current")?.unwrap_or_default();
        let used: u64 = text.trim().parse().unwrap_or(0);
        if used > limit.unsigned_abs() {
            return Err(Failure::new(
                "linux.resources.memory.limit",
                format!("{used} bytes are in use, more than the new limit of {limit}"),
            ));
        }
    }
    // A lower swap limit goes before a lower memory limit, so the processes can't dodge into swap in between.
    if let Some(swap) = swap_max(memory)
        && cgroup.has("memory.swap.max")
    {
        // A guest without swap has no such file, and no swap to limit.
        cgroup.write("memory.swap.max", &swap)?;
    }
    if let Some(value) = memory.limit().filter(|v| *v != 0) {
        cgroup.write("memory.max", &limit(value))?;
    }
    if let Some(value) = memory.reservation().filter(|v| *v != 0) {
        cgroup.write("memory.low", &limit(value))?;
    }
    Ok(())
}

/// The spec's `swap` is memory and swap together; v2 limits swap alone.
fn swap_max(memory: &LinuxMemory) -> Option<String> {
    match (memory.swap()?, memory.limit().unwrap_or(-1)) {
        (0, _) => None,
        (swap, limit) if swap < 0 || limit < 0 => Some("max".into()),
        (swap, limit) => Some((swap - limit).max(0).to_string()),
    }
}

fn apply_cpu(cgroup: &Cgroup, cpu: &LinuxCpu) -> Result<(), Failure> {
    if let Some(idle) = cpu.idle() {
        cgroup.write("cpu.idle", &idle.to_string())?;
    }
    if let Some(shares) = cpu.shares().filter(|v| *v != 0) {
        cgroup.write("cpu.weight", &weight_of_shares(shares).to_string())?;
    }
    if let Some(max) = cpu_max(cgroup, cpu)? {
        cgroup.write("cpu.max", &max)?;
    }
    if let Some(burst) = cpu.burst() {
        cgroup.write("cpu.max.burst", &burst.to_string())?;
    }
    for (file, value, all) in [
        ("cpuset.cpus", cpu.cpus(), "/sys/devices/system/cpu/present"),
        ("cpuset.mems", cpu.mems(), "/sys/devices/system/node/online"),
    ] {
        let Some(value) = value.as_deref().filter(|v| !v.is_empty()) else {
            continue;
        };
        let here = fs::read_to_string(all).unwrap_or_default();
        // Engines count the host's CPUs and memory nodes. Numbers that the guest has not say nothing about it.
        if highest(value) <= highest(&here).max(Some(0)) {
            cgroup.write(file, value)?;
        }
    }
    Ok(())
}

/// The highest number of a list such as "0-3,7".
fn highest(list: &str) -> Option<u32> {
    let numbers = list.split([',', '-']);
    numbers
        .filter_map(|number| number.trim().parse().ok())
        .max()
}

/// Shares 2..=262144 onto weights 1..=10000, as runc and Kubernetes do.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// Quota and period are one file in v2, so the one that is absent is taken from there.
fn cpu_max(cgroup: &Cgroup, cpu: &LinuxCpu) -> Result<Option<String>, Failure> {
    let period = cpu.period().filter(|v| *v != 0);
    let quota = cpu.quota().filter(|v| *v != 0);
    if period.is_none() && quota.is_none() {
        return Ok(None);
    }
    let now = cgroup.read("cpu.max")?.unwrap_or_default();
    let (quota_now, period_now) = now.trim().split_once(' ').unwrap_or(("max", ""));
    let quota = quota.map_or_else(|| quota_now.to_owned(), limit);
    let period = period
        .or_else(|| period_now.parse().ok())
        .unwrap_or(DEFAULT_PERIOD_US);
    Ok(Some(format!("{quota} {period}")))
}

fn apply_io(cgroup: &Cgroup, io: &LinuxBlockIo) -> Result<(), Failure> {
    if let Some(weight) = io.weight().filter(|v| *v != 0) {
        cgroup.write("io.weight", &format!("default {}", io_weight(weight)))?;
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight() {
            let (major, minor) = (device.major(), device.minor());
            cgroup.write(
                "io.weight",
                &format!("{major}:{minor} {}", io_weight(weight)),
            )?;
        }
    }
    let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (key, devices) in throttles {
        for device in devices.iter().flatten() {
            let rate = match device.rate() {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            let line = format!("{}:{} {key}={rate}", device.major(), device.minor());
            cgroup.write("io.max", &line)?;
        }
    }
    Ok(())
}

/// v1's 10..=1000 onto v2's 1..=10000.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
}

fn apply_hugetlb(cgroup: &Cgroup, huge: &LinuxHugepageLimit) -> Result<(), Failure> {
    let size = huge.page_size();
    let value = if huge.limit() < 0 {
        "max".to_owned()
    } else {
        huge.limit().to_string()
    };
    let file = format!("hugetlb.{size}.max");
    if huge.limit() == 0 && !cgroup.has(&file) {
        // The kubelet forbids every size that its own machine has; this one the guest has not.
        return Ok(());
    }
    cgroup.write(&file, &value)?;
    let reserved = format!("hugetlb.{size}.rsvd.max");
    if cgroup.has(&reserved) {
        cgroup.write(&reserved, &value)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxMemoryBuilder;

    #[test]
    fn shares_and_weights_meet_at_both_ends() {
        assert_eq!([2, 1024, 262_144].map(weight_of_shares), [1, 39, 10_000]);
        assert_eq!([10, 1000].map(io_weight), [1, 10_000]);
    }

    #[test]
    fn lists_of_cpus_end_somewhere() {
        let cases = [
            ("0", Some(0)),
            ("0-3,7\n", Some(7)),
            ("4-5,0", Some(5)),
            ("", None),
        ];
        for (list, expected) in cases {
            assert_eq!(highest(list), expected, "{list:?}");
        }
    }

    #[test]
    fn swap_is_what_goes_beyond_memory() {
        let swap = |limit, swap| {
            swap_max(
                &LinuxMemoryBuilder::default()
                    .limit(limit)
                    .swap(swap)
                    .build()
                    .unwrap(),
            )
        };
        assert_eq!(swap(100, 300).as_deref(), Some("200"));
        assert_eq!(swap(100, 100).as_deref(), Some("0"));
        assert_eq!(swap(100, -1).as_deref(), Some("max"));
    }
}
