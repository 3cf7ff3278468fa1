//! The agent's container layer in a real guest.
//!
//! `cargo test -p coffer-agent --test guest` puts this very executable into an initrd with busybox, boots it under QEMU
//! (`microvm`, software emulation) with the guest kernel, and reports every case. In the guest the executable is PID 1
//! and runs the cases; started as the container stage it is the stage. A name as argument runs only cases that contain it.
//!
//! The kernel is `COFFER_GUEST_KERNEL`, or the newest one that `cargo xtask setup` has built.

#[path = "../../src/container/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    reason = "the users and unit tests of the module are the agent's"
)]
mod container;

mod cases;
mod fixture;
mod host;
mod initrd;
mod pid1;
mod probe;

fn main() {
    match std::env::args().next().as_deref() {
        Some(container::STAGE_NAME) => container::stage_main(),
        Some(probe::NAME) => probe::main(),
        _ if std::process::id() == 1 => pid1::main(),
        _ => host::main(),
    }
}
