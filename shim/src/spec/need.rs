//! What a container needs of the VM: the sum over all containers is how large the VM is made while it runs.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Spec};

/// The period of a quota that names none, in microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;
/// By these, engines tell a pod's own container, which only waits, from those that do the work.
const CONTAINER_TYPES: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// A container's limits, as the VM's share that it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// In thousandths of a CPU.
    pub cpu_millis: Limit,
    /// In bytes.
    pub memory: Limit,
}

/// How much of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// None: it holds the pod, and does no work.
    Nothing,
    /// No more than this.
    Of(u64),
    /// As much as there is.
    Unlimited,
}

impl Need {
    pub const NOTHING: Self = Self {
        cpu_millis: Limit::Nothing,
        memory: Limit::Nothing,
    };
    const UNLIMITED: Self = Self {
        cpu_millis: Limit::Unlimited,
        memory: Limit::Unlimited,
    };

    pub fn of(spec: &Spec) -> Self {
        let annotations = spec.annotations().as_ref();
        let kind = annotations.and_then(|a| CONTAINER_TYPES.iter().find_map(|name| a.get(*name)));
        if kind.is_some_and(|kind| kind == "sandbox") {
            return Self::NOTHING;
        }
        let linux = spec.linux().as_ref();
        match linux.and_then(|linux| linux.resources().as_ref()) {
            Some(resources) => Self::UNLIMITED.updated(resources),
            None => Self::UNLIMITED,
        }
    }

    /// What it is after an update; a limit that is not in it stays.
    pub fn updated(self, resources: &LinuxResources) -> Self {
        let cpu = resources.cpu().as_ref();
        let period = cpu.and_then(LinuxCpu::period).filter(|period| *period > 0);
        let millis = |quota: u64| {
            let millis = quota.saturating_mul(1000);
            millis.div_ceil(period.unwrap_or(DEFAULT_PERIOD_US))
        };
        let quota = cpu.and_then(LinuxCpu::quota);
        let memory = resources.memory().as_ref().and_then(LinuxMemory::limit);
        Self {
            cpu_millis: self.cpu_millis.updated(quota, millis),
            memory: self.memory.updated(memory, |bytes| bytes),
        }
    }
}

impl Limit {
    /// OCI's numbers: 0 says nothing, a negative one is no limit.
    fn updated(self, number: Option<i64>, convert: impl Fn(u64) -> u64) -> Self {
        match number {
            None | Some(0) => self,
            Some(number) => {
                u64::try_from(number).map_or(Self::Unlimited, |number| Self::Of(convert(number)))
            }
        }
    }

    fn number(self) -> u64 {
        match self {
            Self::Of(number) => number,
            Self::Nothing | Self::Unlimited => 0,
        }
    }
}

/// CPUs for all of these: `usual` where one of them has no limit, and never more than `most`.
pub fn cpus(needs: &[Need], usual: u8, most: u8) -> u8 {
    let needs = needs.iter().map(|need| need.cpu_millis);
    let needs: Vec<Limit> = needs.filter(|need| *need != Limit::Nothing).collect();
    let unlimited = needs.is_empty() || needs.contains(&Limit::Unlimited);
    let millis = needs
        .iter()
        .map(|need| need.number())
        .fold(0, u64::saturating_add);
    let limited = u8::try_from(millis.div_ceil(1000)).unwrap_or(u8::MAX);
    let least = if unlimited { usual } else { 1 };
    limited.max(least).clamp(1, most.max(1))
}

/// The memory limits of all of these, in MiB.
pub fn memory_mib(needs: &[Need]) -> u32 {
    let bytes = needs
        .iter()
        .map(|need| need.memory.number())
        .fold(0, u64::saturating_add);
    u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn need(annotations: &Value, resources: &Value) -> Need {
        let spec = json!({"ociVersion": "1.2.0", "annotations": annotations, "linux": {"resources": resources}});
        Need::of(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn limits_are_needs() {
        let limited = |quota: i64, memory: i64| {
            need(
                &json!({}),
                &json!({"cpu": {"quota": quota, "period": 50_000}, "memory": {"limit": memory}}),
            )
        };
        assert_eq!(
            limited(75_000, 4096),
            Need {
                cpu_millis: Limit::Of(1500),
                memory: Limit::Of(4096)
            }
        );
        assert_eq!(limited(-1, -1), Need::UNLIMITED);
        assert_eq!(need(&json!({}), &json!({})), Need::UNLIMITED);
        let pause = json!({"io.kubernetes.cri.container-type": "sandbox"});
        assert_eq!(need(&pause, &json!({})), Need::NOTHING);
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let update = |resources: Value| -> LinuxResources {
            serde_json::from_value(resources).expect("OCI resources")
        };
        let before = Need {
            cpu_millis: Limit::Of(7),
            memory: Limit::Of(8),
        };
        assert_eq!(
            before.updated(&update(json!({"cpu": {"shares": 2}}))),
            before
        );
        let larger = before.updated(&update(json!({"memory": {"limit": 9}})));
        assert_eq!(
            (larger.cpu_millis, larger.memory),
            (before.cpu_millis, Limit::Of(9))
        );
        let unlimited = before.updated(&update(json!({"memory": {"limit": -1}})));
        assert_eq!(unlimited.memory, Limit::Unlimited);
    }

    #[test]
    fn the_sum_of_all_limits_is_online() {
        use Limit::{Nothing, Of, Unlimited};
        let cpus = |needs: &[Limit]| {
            let need = |cpu_millis: &Limit| Need {
                cpu_millis: *cpu_millis,
                memory: Unlimited,
            };
            cpus(&needs.iter().map(need).collect::<Vec<_>>(), 2, 4)
        };
        assert_eq!(cpus(&[]), 2);
        assert_eq!(cpus(&[Nothing, Of(100)]), 1);
        assert_eq!(cpus(&[Of(600), Of(600), Of(900)]), 3);
        assert_eq!(cpus(&[Of(100), Unlimited]), 2);
        assert_eq!(cpus(&[Unlimited, Of(3000)]), 3);
        assert_eq!(cpus(&[Of(9000)]), 4);
    }

    #[test]
    fn memory_is_the_sum_of_all_limits() {
        use Limit::{Nothing, Of, Unlimited};
        let mib = |needs: &[Limit]| {
            let need = |memory: &Limit| Need {
                cpu_millis: Unlimited,
                memory: *memory,
            };
            memory_mib(&needs.iter().map(need).collect::<Vec<_>>())
        };
        assert_eq!(mib(&[Nothing, Unlimited]), 0);
        assert_eq!(mib(&[Of(1 << 20), Of(1), Unlimited]), 2);
        assert_eq!(mib(&[Of(u64::MAX), Of(u64::MAX)]), u32::MAX);
    }
}
