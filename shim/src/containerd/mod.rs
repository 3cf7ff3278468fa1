//! containerd's way to start and stop us: `containerd-shim-coffer-v2 start`, `delete`, `-info` and `-v`.

pub mod bootstrap;
pub mod info;
pub mod options;
pub mod publisher;
pub mod start;
