//! What a sandbox is asked to be, decided before it starts and never changed afterwards.

use crate::cgroup::CgroupPath;
use coffer_proto::ids::SandboxId;
use coffer_proto::limits::MAX_NICS;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Which program runs the VM, and on what. `auto` of the configuration is resolved before this point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hypervisor {
    /// Our own VMM on KVM.
    CofferVmm,
    /// QEMU microvm on KVM.
    QemuKvm,
    /// QEMU microvm, every instruction emulated. For laptops, CI and tests.
    QemuEmulation,
}

impl Hypervisor {
    /// The hypervisor process's file name in [`SandboxOptions::libexec`].
    pub fn program(self) -> &'static str {
        match self {
            Self::CofferVmm => "coffer-vmm",
            Self::QemuKvm | Self::QemuEmulation => "coffer-qemu",
        }
    }

    /// Whether the hypervisor process is given `/dev/kvm`.
    pub fn uses_kvm(self) -> bool {
        !matches!(self, Self::QemuEmulation)
    }

    /// Network slots of a VM with this many disk slots. QEMU's microvm has places for eight devices, of which five are always taken.
    pub fn nic_slots(self, disks: usize) -> usize {
        match self {
            Self::CofferVmm => MAX_NICS,
            Self::QemuKvm | Self::QemuEmulation => 3_usize.saturating_sub(disks),
        }
    }

    /// How long the guest may take from its first instruction until its agent has answered.
    pub fn boot_deadline(self) -> Duration {
        match self {
            Self::CofferVmm | Self::QemuKvm => Duration::from_secs(30),
            Self::QemuEmulation => Duration::from_secs(120),
        }
    }

    /// Deadlines of agent calls are multiplied by this: an emulated guest needs that much longer for the same work.
    pub fn slowness(self) -> u32 {
        match self {
            Self::CofferVmm | Self::QemuKvm => 1,
            Self::QemuEmulation => 5,
        }
    }
}

/// Host uids from which each sandbox takes one for its hypervisor process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UidRange {
    pub first: u32,
    pub count: u32,
}

impl Default for UidRange {
    /// 65,536 ids above those that distributions hand out by themselves (systemd's container ranges end at
    /// 1,879,048,191).
    fn default() -> Self {
        Self {
            first: 1_900_000_000,
            count: 65_536,
        }
    }
}

/// All that a supervisor needs to know to make its sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxOptions {
    pub id: SandboxId,
    /// The state root, `/run/coffer` by default. The sandbox lives in `<root>/<id>/`.
    pub root: PathBuf,
    pub hypervisor: Hypervisor,
    /// Virtual CPUs, 1 to [`coffer_proto::limits::MAX_VCPUS`].
    pub vcpus: u8,
    /// Virtual CPUs that the VM has altogether: those above [`Self::vcpus`] are brought online when containers need them.
    #[serde(default)]
    pub max_vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// MiB up to which the VM grows when containers need it; see [`Self::all_memory_mib`].
    #[serde(default)]
    pub max_memory_mib: u32,
    /// MiB that a VM has above the limits of its containers.
    #[serde(default)]
    pub overhead_mib: u32,
    /// Somebody has decided with how many CPUs and how much memory the VM boots; else the pod does.
    #[serde(default)]
    pub sized: bool,
    /// Uncompressed `vmlinux` with a PVH note.
    pub kernel: PathBuf,
    /// The initrd that holds the agent.
    pub initrd: PathBuf,
    /// Appended to the kernel command line of the guest.
    pub kernel_params: Vec<String>,
    /// Directory of coffer-vmm, coffer-qemu and coffer-fsd.
    pub libexec: PathBuf,
    /// Guest kernel messages on the console, debug lines in the log.
    pub debug: bool,
    pub uids: UidRange,
    /// The cgroup for the sandbox's processes. None for one that nobody else named (see `cgroup.rs`).
    pub cgroup: Option<CgroupPath>,
    /// The supervisor joins the sandbox's cgroup if somebody named one, so that the limits of a pod hold for it too. Not that of
    /// `coffer run`, which ends with its caller's cgroup, nor one that has a unit of systemd's for itself.
    #[serde(default)]
    pub joins_cgroup: bool,
    /// containerd's namespace, which loggers are told; empty elsewhere.
    #[serde(default)]
    pub namespace: String,
}

impl SandboxOptions {
    /// The CPUs the VM is made with.
    pub fn all_vcpus(&self) -> u8 {
        self.max_vcpus.max(self.vcpus)
    }

    /// The memory the VM can have, in MiB. QEMU's microvm keeps what it booted with: it has virtio-mem on PCI only.
    pub fn all_memory_mib(&self) -> u32 {
        match self.hypervisor {
            Hypervisor::CofferVmm => self.max_memory_mib.max(self.memory_mib),
            Hypervisor::QemuKvm | Hypervisor::QemuEmulation => self.memory_mib,
        }
    }

    /// `<root>/<id>`, which holds everything the sandbox has on disk.
    pub fn dir(&self) -> PathBuf {
        self.root.join(&self.id)
    }
}

/// Where the Task API of the sandbox `id` is served.
pub fn task_socket(root: &Path, id: &SandboxId) -> PathBuf {
    root.join(id).join("task.sock")
}
