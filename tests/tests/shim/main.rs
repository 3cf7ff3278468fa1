//! `containerd-shim-coffer-v2` against the contract of containerd's runtime v2, with the test in containerd's place.

mod command;
mod create;
mod placement;
mod task;
