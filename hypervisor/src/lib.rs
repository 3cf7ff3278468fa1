//! The hypervisor processes of Coffer: `coffer-vmm`, our own VMM on KVM, and `coffer-qemu`, which drives QEMU.
//!
//! Reading order for `coffer-vmm`: [`machine`] builds a VM in one straight recipe, [`jail`] and [`seccomp`] lock the
//! process up, [`vcpu`] runs the guest, [`event_loop`] serves devices and the shim ([`control`]) until the VM ends.
//!
//! - [`boot`], [`layout`], [`mptable`], [`cpuid`]: what the guest's kernel finds when it starts.
//! - [`memory`]: the guest's RAM; [`growth`]: what it may get later; [`bus`] and [`virtio`]: its devices; [`ring`]: its console.
//! - [`notice`], [`metrics`], [`exits`], [`clock`]: what threads tell the main loop, what is counted, and since when.
//! - [`qemu`]: all of `coffer-qemu`.

pub mod boot;
pub mod bus;
pub mod clock;
pub mod control;
pub mod cpuid;
pub mod event_loop;
pub mod exits;
pub mod growth;
pub mod jail;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod mptable;
pub mod notice;
pub mod qemu;
pub mod ring;
pub mod seccomp;
pub mod vcpu;
pub mod virtio;

/// Writes one line to the log, which is standard error and belongs to the shim. For what happens once, or is counted by
/// the caller: a guest must not be able to call this in a loop.
pub fn report(line: &str) {
    use std::io::Write;
    // A log that can't be written must not stop a VM.
    let _ = writeln!(std::io::stderr(), "coffer-vmm: {line}");
}
