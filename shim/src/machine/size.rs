//! How large a VM is for its pod.
//!
//! | who                   | says it                                                                          |
//! |-----------------------|----------------------------------------------------------------------------------|
//! | containerd's CRI      | annotations `io.kubernetes.cri.sandbox-…` of the pod's first container             |
//! | CRI-O                 | the CRI's resources as JSON in an annotation                                     |
//! | containerd's Sandbox API | the CRI's resources in the pod's configuration                                |
//! | everybody else        | the limits of the first container                                                |
//!
//! A memory limit gets the overhead on top, for the guest's kernel and agent. What nobody says is as configured.

use super::SandboxOptions;
use crate::config::{MAX_MEMORY_MIB, MIN_MEMORY_MIB};
use coffer_proto::limits::MAX_VCPUS;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Spec};
use serde::Deserialize;
use std::collections::HashMap;

/// The period of a CPU quota that names none, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// CPU shares of a request for one whole CPU, as Kubernetes counts.
const SHARES_OF_A_CPU: u64 = 1024;
/// CRI-O's annotations, the current one first.
const CRI_O: [&str; 2] = [
    "pod-linux-resources.crio.io",
    "io.kubernetes.cri-o.PodLinuxResources",
];
const CONTAINERD: &str = "io.kubernetes.cri.sandbox-";

/// The CRI's `LinuxContainerResources`, as far as they have a size. 0 is no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PodSize {
    pub cpu_period: i64,
    pub cpu_quota: i64,
    pub cpu_shares: i64,
    pub memory_limit_in_bytes: i64,
}

impl PodSize {
    /// What the first container's spec says of the pod.
    pub fn of(spec: &Spec) -> Self {
        let none = HashMap::new();
        let annotations = spec.annotations().as_ref().unwrap_or(&none);
        let cri_o = CRI_O.iter().find_map(|name| annotations.get(*name));
        if let Some(size) = cri_o.and_then(|json| serde_json::from_str(json).ok()) {
            return size;
        }
        let number = |name: &str| {
            let value = annotations.get(&format!("{CONTAINERD}{name}"))?;
            value.parse().ok()
        };
        let of_pod = Self {
            cpu_period: number("cpu-period").unwrap_or(0),
            cpu_quota: number("cpu-quota").unwrap_or(0),
            cpu_shares: number("cpu-shares").unwrap_or(0),
            memory_limit_in_bytes: number("memory").unwrap_or(0),
        };
        if of_pod != Self::default() {
            return of_pod;
        }
        let linux = spec.linux().as_ref();
        linux
            .and_then(|linux| linux.resources().as_ref())
            .map_or_else(Self::default, Self::of_limits)
    }

    /// Shares of a container say nothing of the VM: every engine writes some.
    fn of_limits(limits: &LinuxResources) -> Self {
        let cpu = limits.cpu().as_ref();
        let memory = limits.memory().as_ref();
        let period = cpu.and_then(LinuxCpu::period).unwrap_or(0);
        Self {
            cpu_period: i64::try_from(period).unwrap_or(0),
            cpu_quota: cpu.and_then(LinuxCpu::quota).unwrap_or(0),
            cpu_shares: 0,
            memory_limit_in_bytes: memory.and_then(LinuxMemory::limit).unwrap_or(0),
        }
    }

    /// The options of a sandbox whose VM has this size, unless somebody has decided on another.
    pub fn apply(&self, mut options: SandboxOptions) -> SandboxOptions {
        if options.sized {
            return options;
        }
        if let Some(bytes) = positive(self.memory_limit_in_bytes) {
            let limit = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(MAX_MEMORY_MIB);
            let all = limit.saturating_add(options.overhead_mib);
            options.memory_mib = all.clamp(MIN_MEMORY_MIB, MAX_MEMORY_MIB);
        }
        let period = positive(self.cpu_period).unwrap_or(DEFAULT_PERIOD);
        let limit = positive(self.cpu_quota).map(|quota| quota.div_ceil(period));
        // A request for more than is usual is to be had, too.
        let request = positive(self.cpu_shares)
            .map(|shares| shares.div_ceil(SHARES_OF_A_CPU))
            .filter(|request| *request > u64::from(options.vcpus));
        if let Some(cpus) = limit.or(request) {
            let cpus = u8::try_from(cpus).unwrap_or(MAX_VCPUS);
            options.vcpus = cpus.clamp(1, MAX_VCPUS);
        }
        options
    }
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::options;
    use serde_json::{Value, json};
    use std::path::Path;

    fn size(annotations: &Value, resources: &Value) -> (u8, u32) {
        let spec = json!({"ociVersion": "1.2.0", "annotations": annotations, "linux": {"resources": resources}});
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let mut options = options(Path::new("/x"), "s");
        options.overhead_mib = 100;
        options.sized = false;
        let sized = PodSize::of(&spec).apply(options);
        (sized.vcpus, sized.memory_mib)
    }

    #[test]
    fn the_pod_goes_before_the_container() {
        let own =
            json!({"memory": {"limit": 64 << 20}, "cpu": {"quota": 150_000, "period": 100_000}});
        assert_eq!(size(&json!({}), &own), (2, 164));
        let cri = json!({"io.kubernetes.cri.sandbox-memory": "268435456",
            "io.kubernetes.cri.sandbox-cpu-quota": "300000", "io.kubernetes.cri.sandbox-cpu-period": "100000"});
        assert_eq!(size(&cri, &own), (3, 356));
        let cri_o = r#"{"memory_limit_in_bytes":134217728,"cpu_quota":-1}"#;
        for name in CRI_O {
            assert_eq!(size(&json!({name: cri_o}), &own), (1, 228));
        }
    }

    #[test]
    fn a_request_counts_where_there_is_no_limit() {
        let shares = |shares: &str| {
            size(
                &json!({"io.kubernetes.cri.sandbox-cpu-shares": shares}),
                &json!({}),
            )
        };
        assert_eq!((shares("2"), shares("3000")), ((1, 128), (3, 128)));
        assert_eq!(
            size(&json!({}), &json!({"cpu": {"shares": 262_144}})),
            (1, 128)
        );
    }

    #[test]
    fn sizes_that_are_decided_stay() {
        let mut decided = options(Path::new("/x"), "s");
        decided.sized = true;
        let size = PodSize {
            cpu_quota: 900_000,
            memory_limit_in_bytes: 1 << 40,
            ..PodSize::default()
        };
        assert_eq!(size.apply(decided.clone()), decided);
    }
}
