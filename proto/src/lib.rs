//! What the processes of one sandbox say to each other.
//!
//! - [`agent`] and [`agent_ttrpc`]: shim → agent in the guest, ttrpc over vsock.
//! - [`stream`]: the handshake that opens a vsock connection as one stdio stream.
//! - [`vmm`]: shim → hypervisor process, over an inherited socket.
//! - [`cri`]: what Kubernetes says of a pod, passed on by containerd.
//! - [`error_chain`]: an error with its causes, as one says it to another.
//! - [`exec_failure`]: which exit status a program that can't be executed has, beside the error that says so.
//! - [`ids`] and [`limits`]: names and bounds that both sides must agree on.

pub mod error_chain;
pub mod exec_failure;
pub mod ids;
pub mod limits;
pub mod stream;
pub mod vmm;

#[allow(
    missing_debug_implementations,
    unused_qualifications,
    clippy::all,
    clippy::pedantic
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}
pub use generated::{agent, agent_ttrpc, cri};

/// The version that shim and agent compare in `StartSandbox`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
