//! Bounds and well-known names that more than one process relies on.

/// vsock port of the host to which the agent dials home, once ("CO" in ASCII).
pub const HOME_PORT: u32 = 0x434f;
/// vsock port of the agent on which it accepts stdio streams ([`crate::stream`]).
pub const STREAM_PORT: u32 = 0x4353;
/// The guest's context id; private to each VM's muxer, so it can be the same in all.
pub const GUEST_CID: u64 = 3;

/// Where the agent mounts the pod's virtio-fs share in the guest.
pub const SHARE_DIR: &str = "/run/coffer/share";
/// Directory of the share with the volumes, each under a number. Not below a container's, for two of a pod may have the same one;
/// no container has such a name.
pub const VOLUMES: &str = ".volumes";
/// Where the agent keeps its copies of small volumes: `<container>/<index of the mount>`.
pub const MIRROR_DIR: &str = "/run/coffer/mirror";
/// virtio-fs tag of the pod's share.
pub const SHARE_TAG: &str = "coffer";

/// I/O port of the boot timer, a 4-byte write-only register of coffer-vmm: the value written is a phase number and
/// the VMM stamps it. An I/O port, so that the agent reaches it with ioperm(2) and the guest needs no /dev/mem.
pub const BOOT_TIMER_PORT: u16 = 0x05c0;
/// Writes to the boot timer that are recorded; a guest that writes more is ignored.
pub const MAX_BOOT_PHASES: usize = 16;
/// The value the agent writes when its server is up.
pub const BOOT_PHASE_AGENT_READY: u32 = 0x01;

/// Size of the console ring in the memory file the shim passes: enough for a whole boot with an oops, and all a
/// flooding guest ever costs the host.
pub const CONSOLE_RING_BYTES: usize = 256 << 10;

/// A control message between shim and hypervisor process, in bytes. The largest is the VM configuration.
pub const MAX_CONTROL_MESSAGE: usize = 64 << 10;
/// File descriptors in one control message (SCM_MAX_FD is 253).
pub const MAX_CONTROL_FDS: usize = 64;

/// ttrpc's own limit for one message (`MESSAGE_LENGTH_MAX`); specs larger than this are refused by the shim.
pub const MAX_RPC_MESSAGE: usize = 4 << 20;
/// Most processes the shim takes in one `ListProcesses` answer.
pub const MAX_LISTED_PROCESSES: usize = 65_536;

/// Virtual CPUs of one VM.
pub const MAX_VCPUS: u8 = 64;
/// Network interfaces of one VM; each has an interrupt line from boot.
pub const MAX_NICS: usize = 4;
/// Block devices of one VM; each has an interrupt line from boot.
pub const MAX_DISKS: usize = 4;
