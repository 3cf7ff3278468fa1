//! Exits of the vCPUs to user space, counted by kind.

use kvm_ioctls::VcpuExit;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a vCPU left KVM_RUN, as far as the counters tell it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitKind {
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Hlt,
    Shutdown,
    /// By a kick, not by the guest.
    Interrupted,
    Other,
}

/// The names of the kinds in the metrics, in their order.
const NAMES: [&str; 8] = [
    "io_in",
    "io_out",
    "mmio_read",
    "mmio_write",
    "hlt",
    "shutdown",
    "interrupted",
    "other",
];

impl ExitKind {
    /// The kind of what KVM_RUN gave.
    pub fn of(left: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Self {
        match left {
            Ok(VcpuExit::IoIn(..)) => Self::IoIn,
            Ok(VcpuExit::IoOut(..)) => Self::IoOut,
            Ok(VcpuExit::MmioRead(..)) => Self::MmioRead,
            Ok(VcpuExit::MmioWrite(..)) => Self::MmioWrite,
            Ok(VcpuExit::Hlt) => Self::Hlt,
            Ok(VcpuExit::Shutdown) => Self::Shutdown,
            Err(error) if is_interruption(*error) => Self::Interrupted,
            Ok(_) | Err(_) => Self::Other,
        }
    }
}

/// Whether KVM_RUN came back because of a kick: without having entered the guest, or out of it.
pub fn is_interruption(error: kvm_ioctls::Error) -> bool {
    matches!(error.errno(), libc::EINTR | libc::EAGAIN)
}

/// Exits to user space by kind, of all vCPUs of a VM.
#[derive(Debug, Default)]
pub struct ExitCounts([AtomicU64; NAMES.len()]);

impl ExitCounts {
    pub fn count(&self, kind: ExitKind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Name and count of each kind.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        NAMES.into_iter().zip(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_under_its_name() {
        let counts = ExitCounts::default();
        let mut byte = [0];
        let error = kvm_ioctls::Error::new;
        let exits = [
            (Ok(VcpuExit::MmioRead(0, &mut byte)), "mmio_read"),
            (Ok(VcpuExit::Shutdown), "shutdown"),
            (Err(error(libc::EINTR)), "interrupted"),
            (Err(error(libc::EFAULT)), "other"),
            (Ok(VcpuExit::Nmi), "other"),
        ];
        for (exit, name) in &exits {
            let of = |name| counts.iter().find(|(kind, _)| *kind == name).unwrap().1;
            let before = of(*name);
            counts.count(ExitKind::of(exit));
            assert_eq!(of(*name), before + 1, "{name}");
        }
        let total: u64 = counts.iter().map(|(_, count)| count).sum();
        assert_eq!(total, exits.len() as u64);
    }
}
