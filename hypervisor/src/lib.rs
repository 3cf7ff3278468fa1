//! The hypervisor processes of Coffer: `coffer-vmm`, our own VMM on KVM, and `coffer-qemu`, which drives QEMU.

pub mod memory;
pub mod qemu;
pub mod virtio;
