//! The supervisor of one sandbox, and what its command lines share.
//!
//! ```text
//! Task RPC ─► task ─► sandbox ─► vmm   ══ socketpair ══► coffer-vmm | coffer-qemu
//!                        │  └──► agent ══ vsock ═══════► coffer-agent
//!                        └─────► io    ══ vsock ═══════► one connection per stdio stream
//! ```
//!
//! - [`machine`]: what a sandbox is asked to be, and the recipe that boots it.
//! - [`spec`], [`mount_points`], [`share`]: from the bundle to what the guest sees of the host.
//! - [`network`]: the pod's network namespace, carried into the VM.
//! - [`cgroup`]: the host cgroup of the sandbox.
//! - [`image`]: container images on disk.
//! - [`config`]: the configuration file; [`check`]: what a VM needs of this machine, and who runs it.

pub mod cgroup;
pub mod check;
pub mod config;
pub mod containerd;
pub mod image;
pub mod machine;
pub mod mount_points;
pub mod network;
pub mod share;
pub mod spec;
