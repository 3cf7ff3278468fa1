//! `linux.resources`, which also comes alone, in an update.

use oci_spec::runtime::LinuxResources;

use super::super::device_filter;
use super::{Result, refuse, refuse_present};

/// Checks limits; `prefix` is "linux.resources." or "".
pub fn resources(resources: &LinuxResources, prefix: &str) -> Result {
    let field = |name: &str| format!("{prefix}{name}");
    if let Some(memory) = resources.memory() {
        let v1 = [
            (
                &*field("memory.kernel"),
                memory.kernel().is_some_and(|v| v > 0),
            ),
            (
                &*field("memory.kernelTCP"),
                memory.kernel_tcp().is_some_and(|v| v > 0),
            ),
            (&*field("memory.swappiness"), memory.swappiness().is_some()),
            (
                &*field("memory.disableOOMKiller"),
                memory.disable_oom_killer() == Some(true),
            ),
        ];
        refuse_present(&v1, "has no equivalent in cgroup v2")?;
    }
    if let Some(cpu) = resources.cpu() {
        let v1 = [
            (
                &*field("cpu.realtimeRuntime"),
                cpu.realtime_runtime().is_some_and(|v| v != 0),
            ),
            (
                &*field("cpu.realtimePeriod"),
                cpu.realtime_period().is_some_and(|v| v != 0),
            ),
        ];
        refuse_present(&v1, "has no equivalent in cgroup v2")?;
    }
    if let Some(io) = resources.block_io() {
        let leaf = |weight: Option<u16>| weight.is_some_and(|v| v != 0);
        let by_device = io
            .weight_device()
            .iter()
            .flatten()
            .any(|d| leaf(d.leaf_weight()));
        let v1 = [(
            &*field("blockIO.leafWeight"),
            leaf(io.leaf_weight()) || by_device,
        )];
        refuse_present(&v1, "has no equivalent in cgroup v2")?;
    }
    let network = resources.network().as_ref().is_some_and(|n| {
        n.class_id().is_some_and(|v| v != 0)
            || n.priorities().as_ref().is_some_and(|p| !p.is_empty())
    });
    let rdma = resources.rdma().as_ref().is_some_and(|r| !r.is_empty());
    refuse_present(
        &[(&*field("network"), network), (&*field("rdma"), rdma)],
        "is not supported in the guest",
    )?;
    for huge in resources.hugepage_limits().iter().flatten() {
        if huge.page_size().is_empty()
            || !huge.page_size().bytes().all(|b| b.is_ascii_alphanumeric())
        {
            return refuse(
                field("hugepageLimits"),
                format!("{:?} is no page size", huge.page_size()),
            );
        }
    }
    for (key, value) in resources.unified().iter().flatten() {
        let name = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let controller = key
            .split_once('.')
            .is_some_and(|(c, rest)| !c.is_empty() && !rest.is_empty());
        if !controller
            || key.starts_with("cgroup.")
            || !key.bytes().all(name)
            || value.contains('\0')
        {
            return refuse(
                field(&format!("unified.{key}")),
                "is no file of a controller",
            );
        }
    }
    for (i, rule) in resources.devices().iter().flatten().enumerate() {
        device_filter::rule(rule)
            .or_else(|reason| refuse(field(&format!("devices[{i}]")), reason))?;
    }
    Ok(())
}
