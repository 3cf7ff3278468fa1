//! How large a VM has to be for what the engine says of its first container or its pod.

use crate::config::{Config, MAX_MEMORY_MIB, MIN_MEMORY_MIB};
use crate::machine::SandboxOptions;
use coffer_proto::limits::MAX_VCPUS;
use oci_spec::runtime::Spec;
use serde::Deserialize;

/// The CPU quota's period where none is written, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// CRI's LinuxContainerResources, as CRI-O writes them into annotations.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CriResources {
    cpu_period: u64,
    cpu_quota: i64,
    memory_limit_in_bytes: i64,
}

/// Memory and processors that were asked for; None for what was not.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    memory_bytes: Option<u64>,
    quota: Option<u64>,
    period: u64,
}

/// Sizes the VM: by the pod's annotations where the engine writes them, else by the container's own limits.
pub(super) fn apply(options: &mut SandboxOptions, spec: &Spec, config: &Config) {
    let wanted = of_pod(spec).unwrap_or_else(|| of_container(spec));
    if let Some(bytes) = wanted.memory_bytes {
        let mib = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(MAX_MEMORY_MIB);
        let with_guest = mib.saturating_add(config.memory_overhead_mib);
        options.memory_mib = with_guest.clamp(MIN_MEMORY_MIB, MAX_MEMORY_MIB);
    }
    if let Some(quota) = wanted.quota {
        let vcpus = quota.div_ceil(wanted.period.max(1)).max(1);
        options.vcpus = u8::try_from(vcpus).unwrap_or(MAX_VCPUS).min(MAX_VCPUS);
    }
}

fn of_pod(spec: &Spec) -> Option<Wanted> {
    let annotations = spec.annotations().as_ref()?;
    let number = |name: &str| annotations.get(name)?.parse::<i64>().ok();
    let json = |name: &str| serde_json::from_str::<CriResources>(annotations.get(name)?).ok();
    let cri_o = json("pod-linux-resources.crio.io")
        .or_else(|| json("io.kubernetes.cri-o.PodLinuxResources"));
    let (memory, quota, period) = match cri_o {
        Some(of) => (of.memory_limit_in_bytes, of.cpu_quota, of.cpu_period),
        None => (
            number("io.kubernetes.cri.sandbox-memory").unwrap_or_default(),
            number("io.kubernetes.cri.sandbox-cpu-quota").unwrap_or_default(),
            number("io.kubernetes.cri.sandbox-cpu-period")
                .and_then(|period| u64::try_from(period).ok())
                .unwrap_or_default(),
        ),
    };
    let wanted = Wanted {
        memory_bytes: positive(Some(memory)),
        quota: positive(Some(quota)),
        period: if period == 0 { DEFAULT_PERIOD } else { period },
    };
    (wanted.memory_bytes.is_some() || wanted.quota.is_some()).then_some(wanted)
}

fn of_container(spec: &Spec) -> Wanted {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let memory = resources.and_then(|of| of.memory().as_ref()?.limit());
    let cpu = resources.and_then(|of| of.cpu().as_ref());
    Wanted {
        memory_bytes: positive(memory),
        quota: positive(cpu.and_then(oci_spec::runtime::LinuxCpu::quota)),
        period: cpu
            .and_then(oci_spec::runtime::LinuxCpu::period)
            .unwrap_or(DEFAULT_PERIOD),
    }
}

/// Engines write 0 and -1 for no limit.
fn positive(value: Option<i64>) -> Option<u64> {
    value
        .and_then(|value| u64::try_from(value).ok())
        .filter(|value| *value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::options;
    use serde_json::json;

    fn size(annotations: &serde_json::Value, resources: &serde_json::Value) -> (u8, u32) {
        let spec = json!({"ociVersion": "1.0.2", "annotations": annotations, "linux": {"resources": resources}});
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let mut options = options(std::path::Path::new("/x"), "s");
        apply(&mut options, &spec, &Config::default());
        (options.vcpus, options.memory_mib)
    }

    #[test]
    fn the_pod_goes_before_the_container() {
        let own =
            json!({"memory": {"limit": 64 << 20}, "cpu": {"quota": 150_000, "period": 100_000}});
        assert_eq!(size(&json!({}), &own), (2, 192));
        let cri = json!({"io.kubernetes.cri.sandbox-memory": "268435456", "io.kubernetes.cri.sandbox-cpu-quota": "300000"});
        assert_eq!(size(&cri, &own), (3, 384));
        let cri_o = r#"{"memory_limit_in_bytes":134217728,"cpu_quota":-1}"#;
        assert_eq!(
            size(
                &json!({"io.kubernetes.cri-o.PodLinuxResources": cri_o}),
                &own
            ),
            (1, 256)
        );
    }

    #[test]
    fn without_a_limit_the_configuration_stays() {
        assert_eq!(
            size(&json!({}), &json!({"memory": {"limit": -1}})),
            (1, 128)
        );
        assert_eq!(
            size(&json!({"pod-linux-resources.crio.io": "{}"}), &json!({})),
            (1, 128)
        );
    }
}
