//! The second hypervisor: QEMU microvm behind the control protocol of coffer-vmm.
