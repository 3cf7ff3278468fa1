//! The machine of a sandbox.

pub mod options;

pub use options::{Hypervisor, SandboxOptions, UidRange, task_socket};
