//! System call filters, one for each class of thread. The policies are data: `seccomp/vmm-x86_64.json` for coffer-vmm,
//! `seccomp/qemu-x86_64.json` for coffer-qemu.
//!
//! A call that is not listed kills the process. Each thread of coffer-vmm enters its own filter: vCPUs before they first
//! run the guest, the main thread when the last other thread was started. coffer-qemu has one filter for all its threads
//! ([`enter_all_threads`]); QEMU has one of its own (`-sandbox`).

use seccompiler::{BpfMap, BpfProgramRef, TargetArch};
use std::sync::OnceLock;

const VMM_POLICY: &[u8] = include_bytes!("../seccomp/vmm-x86_64.json");
const QEMU_POLICY: &[u8] = include_bytes!("../seccomp/qemu-x86_64.json");

/// A class of threads with a filter of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadClass {
    /// The event loop: devices and the control socket.
    Main,
    /// Runs the guest and its register accesses.
    Vcpu,
    /// File I/O of one disk.
    Disk,
    /// Any thread of coffer-qemu, once its machine runs.
    Qemu,
}

impl ThreadClass {
    fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Disk => "disk",
            Self::Qemu => "qemu",
        }
    }
}

/// Why a filter can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("the system call policy can't be compiled: {0}")]
    Policy(String),
    #[error("the system call policy has no filter \"{0}\"")]
    Missing(&'static str),
    #[error("the kernel refuses the system call filter \"{0}\"")]
    Install(&'static str, #[source] seccompiler::Error),
}

/// The compiled filter of a class. A process needs one of the policies, and compiles no other.
fn filter(class: ThreadClass) -> Result<BpfProgramRef<'static>, SeccompError> {
    type Compiled = OnceLock<Result<BpfMap, String>>;
    static VMM: Compiled = OnceLock::new();
    static QEMU: Compiled = OnceLock::new();
    let (compiled, policy) = match class {
        ThreadClass::Main | ThreadClass::Vcpu | ThreadClass::Disk => (&VMM, VMM_POLICY),
        ThreadClass::Qemu => (&QEMU, QEMU_POLICY),
    };
    let filters = compiled.get_or_init(|| {
        seccompiler::compile_from_json(policy, TargetArch::x86_64)
            .map_err(|error| error.to_string())
    });
    filters
        .as_ref()
        .map_err(|error| SeccompError::Policy(error.clone()))?
        .get(class.name())
        .map(Vec::as_slice)
        .ok_or(SeccompError::Missing(class.name()))
}

/// Puts the calling thread under the filter of its class, for good.
pub fn enter(class: ThreadClass) -> Result<(), SeccompError> {
    seccompiler::apply_filter(filter(class)?)
        .map_err(|error| SeccompError::Install(class.name(), error))
}

/// Puts every thread of the process under the filter of a class, for good.
pub fn enter_all_threads(class: ThreadClass) -> Result<(), SeccompError> {
    seccompiler::apply_filter_all_threads(filter(class)?)
        .map_err(|error| SeccompError::Install(class.name(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASSES: [ThreadClass; 4] = [
        ThreadClass::Main,
        ThreadClass::Vcpu,
        ThreadClass::Disk,
        ThreadClass::Qemu,
    ];

    #[test]
    fn every_class_has_a_filter() {
        for class in CLASSES {
            assert!(filter(class).is_ok(), "{class:?}");
        }
    }

    /// In a child, because the punishment hits the whole process.
    #[test]
    #[allow(unsafe_code)]
    fn a_call_that_is_not_listed_kills_the_process() {
        for class in CLASSES {
            filter(class).unwrap();
            // SAFETY: the child makes system calls only; what it allocates it takes from its own copy of the heap.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let entered = enter(class).is_ok();
                // SAFETY: plain calls; the first must not return.
                unsafe {
                    libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
                    libc::_exit(i32::from(entered));
                }
            }
            let mut status = 0;
            // SAFETY: waits for our own child and fills an integer.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert!(
                libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS,
                "{class:?}: {status:#x}"
            );
        }
    }
}
