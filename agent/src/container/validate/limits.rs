//! `linux.resources`, which also comes alone, in an update.

use oci_spec::runtime::{LinuxResources, LinuxWeightDevice};

use super::super::device_filter;
use super::{Result, refuse, refuse_present};

/// Checks limits; `prefix` is "linux.resources." or "".
pub fn resources(resources: &LinuxResources, prefix: &str) -> Result {
    let field = |name: &str| format!("{prefix}{name}");
    for (name, is_set) in of_v1(resources) {
        if is_set {
            return refuse(field(name), "has no equivalent in cgroup v2");
        }
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
        let size = huge.page_size();
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return refuse(field("hugepageLimits"), format!("{size:?} is no page size"));
        }
    }
    for (key, value) in resources.unified().iter().flatten() {
        if !is_file_of_a_controller(key) || value.contains('\0') {
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

/// Fields that mean something to cgroup v1 only, and whether they are set.
fn of_v1(resources: &LinuxResources) -> Vec<(&'static str, bool)> {
    let mut fields = Vec::new();
    if let Some(memory) = resources.memory() {
        let positive = |value: Option<i64>| value.is_some_and(|v| v > 0);
        fields.extend([
            ("memory.kernel", positive(memory.kernel())),
            ("memory.kernelTCP", positive(memory.kernel_tcp())),
            ("memory.swappiness", memory.swappiness().is_some()),
            (
                "memory.disableOOMKiller",
                memory.disable_oom_killer() == Some(true),
            ),
        ]);
    }
    if let Some(cpu) = resources.cpu() {
        let (runtime, period) = (cpu.realtime_runtime(), cpu.realtime_period());
        fields.extend([
            ("cpu.realtimeRuntime", runtime.is_some_and(|v| v != 0)),
            ("cpu.realtimePeriod", period.is_some_and(|v| v != 0)),
        ]);
    }
    if let Some(io) = resources.block_io() {
        let devices = io.weight_device().iter().flatten();
        let mut weights = devices
            .map(LinuxWeightDevice::leaf_weight)
            .chain([io.leaf_weight()]);
        let is_set = weights.any(|weight| weight.is_some_and(|v| v != 0));
        fields.push(("blockIO.leafWeight", is_set));
    }
    fields
}

/// `controller.file`, of which the core of cgroup v2 is none.
fn is_file_of_a_controller(key: &str) -> bool {
    let name = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let parts = key.split_once('.');
    parts.is_some_and(|(controller, file)| !controller.is_empty() && !file.is_empty())
        && !key.starts_with("cgroup.")
        && key.bytes().all(name)
}
