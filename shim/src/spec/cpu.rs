//! What a container needs of the VM's CPUs.

use oci_spec::runtime::{LinuxCpu, LinuxResources, Spec};

/// The period of a quota that names none, in microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;
/// By these, engines tell a pod's own container, which only waits, from those that do the work.
const CONTAINER_TYPES: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// A container's share in the VM's CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuNeed {
    /// It holds the pod, and does no work.
    Nothing,
    /// Its quota, in thousandths of a CPU.
    Millis(u64),
    /// As much as there is.
    Unlimited,
}

impl CpuNeed {
    pub fn of(spec: &Spec) -> Self {
        let annotations = spec.annotations().as_ref();
        let kind = annotations.and_then(|a| CONTAINER_TYPES.iter().find_map(|name| a.get(*name)));
        if kind.is_some_and(|kind| kind == "sandbox") {
            return Self::Nothing;
        }
        let linux = spec.linux().as_ref();
        match linux.and_then(|linux| linux.resources().as_ref()) {
            Some(resources) => Self::Unlimited.updated(resources),
            None => Self::Unlimited,
        }
    }

    /// What it is after an update; one without a quota changes nothing.
    pub fn updated(self, resources: &LinuxResources) -> Self {
        let cpu = resources.cpu().as_ref();
        let period = cpu.and_then(LinuxCpu::period).filter(|period| *period > 0);
        match cpu.and_then(LinuxCpu::quota) {
            None | Some(0) => self,
            Some(quota) => u64::try_from(quota).map_or(Self::Unlimited, |quota| {
                let millis = quota.saturating_mul(1000);
                Self::Millis(millis.div_ceil(period.unwrap_or(DEFAULT_PERIOD_US)))
            }),
        }
    }

    /// CPUs for all of these: `usual` where one of them has no limit, and never more than `most`.
    pub fn cpus(needs: impl IntoIterator<Item = Self>, usual: u8, most: u8) -> u8 {
        let needs: Vec<Self> = needs
            .into_iter()
            .filter(|need| *need != Self::Nothing)
            .collect();
        let unlimited = needs.is_empty() || needs.contains(&Self::Unlimited);
        let quota = |need: &Self| match need {
            Self::Millis(millis) => *millis,
            Self::Nothing | Self::Unlimited => 0,
        };
        let millis = needs.iter().map(quota).fold(0, u64::saturating_add);
        let limited = u8::try_from(millis.div_ceil(1000)).unwrap_or(u8::MAX);
        let least = if unlimited { usual } else { 1 };
        limited.max(least).clamp(1, most.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn need(annotations: &Value, resources: &Value) -> CpuNeed {
        let spec = json!({"ociVersion": "1.2.0", "annotations": annotations, "linux": {"resources": resources}});
        CpuNeed::of(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn quotas_are_needs() {
        let quota = |quota: i64| {
            need(
                &json!({}),
                &json!({"cpu": {"quota": quota, "period": 50_000}}),
            )
        };
        assert_eq!(quota(75_000), CpuNeed::Millis(1500));
        assert_eq!(quota(-1), CpuNeed::Unlimited);
        assert_eq!(need(&json!({}), &json!({})), CpuNeed::Unlimited);
        let pause = json!({"io.kubernetes.cri.container-type": "sandbox"});
        assert_eq!(need(&pause, &json!({})), CpuNeed::Nothing);
        let shares: LinuxResources = serde_json::from_value(json!({"cpu": {"shares": 2}})).unwrap();
        assert_eq!(CpuNeed::Millis(7).updated(&shares), CpuNeed::Millis(7));
    }

    #[test]
    fn the_sum_of_all_limits_is_online() {
        use CpuNeed::{Millis, Nothing, Unlimited};
        let cpus = |needs: &[CpuNeed]| CpuNeed::cpus(needs.iter().copied(), 2, 4);
        assert_eq!(cpus(&[]), 2);
        assert_eq!(cpus(&[Nothing, Millis(100)]), 1);
        assert_eq!(cpus(&[Millis(600), Millis(600), Millis(900)]), 3);
        assert_eq!(cpus(&[Millis(100), Unlimited]), 2);
        assert_eq!(cpus(&[Unlimited, Millis(3000)]), 3);
        assert_eq!(cpus(&[Millis(9000)]), 4);
    }
}
