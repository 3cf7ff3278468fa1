//! The supervisor of one sandbox, and what its command lines share.
//!
//! ```text
//! Task RPC ─► task ─► sandbox ─► vmm   ══ socketpair ══► coffer-vmm | coffer-qemu
//!                        │  └──► agent ══ vsock ═══════► coffer-agent
//!                        └─────► io    ══ vsock ═══════► one connection per stdio stream
//! ```
//!
//! - [`supervise`](mod@supervise): the supervisor's life; [`task`]: its RPC service; [`containerd`]: how containerd starts and stops it.
//! - [`sandbox`]: the pod's state machine, and a recipe for each verb.
//! - [`machine`]: what a sandbox is asked to be, and the recipe that boots it.
//! - [`vmm`], [`agent`], [`io`]: clients of the hypervisor process, the agent, and its stdio streams.
//! - [`state`] and [`cleanup`](mod@cleanup): what is on disk, and how a sandbox leaves the host by it alone.
//! - [`removal`]: how a directory goes that a container wrote to.
//! - [`spec`], [`mount_points`], [`share`]: from the bundle to what the guest sees of the host.
//! - [`lease`]: processes of the host that stand for those of the guest; [`parked`]: one that stands for a namespace.
//! - [`mirror`](mod@mirror): volumes of which the guest has a copy, for the sake of inotify.
//! - [`network`]: the pod's network namespace, carried into the VM.
//! - [`cgroup`]: the host cgroup of the sandbox.
//! - [`oom_score`]: whom the host's kernel ends for want of memory.
//! - [`hooks`]: programs of the host that a container's spec names.
//! - [`image`]: container images on disk.
//! - [`crash`]: where a test build may be told to die.
//! - [`features`](mod@features): what of an OCI spec is honoured, as told to callers.
//! - [`config`]: the configuration file; [`check`]: what a VM needs of this machine, and who runs it.
//! - [`cli`]: the `coffer` command line.

pub mod agent;
pub mod cgroup;
pub mod check;
pub mod cleanup;
pub mod cli;
pub mod config;
pub mod containerd;
pub mod crash;
pub mod features;
pub mod hooks;
pub mod image;
pub mod io;
pub mod lease;
pub mod machine;
pub mod mirror;
pub mod mount_points;
pub mod network;
pub mod oom_score;
pub mod parked;
pub mod removal;
pub mod sandbox;
pub mod share;
pub mod spec;
pub mod state;
pub mod supervise;
pub mod task;
pub mod vmm;
