//! System call filters, one for each class of thread. The policy is data: `seccomp/x86_64.json`.
//!
//! A call that is not listed kills the process. Each thread enters its own filter: vCPUs before they first run the
//! guest, the main thread when the last other thread was started.

use seccompiler::{BpfMap, TargetArch};
use std::sync::OnceLock;

const POLICY: &[u8] = include_bytes!("../seccomp/x86_64.json");

/// A class of threads with a filter of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadClass {
    /// The event loop: devices and the control socket.
    Main,
    /// Runs the guest and its register accesses.
    Vcpu,
    /// File I/O of one disk.
    Disk,
}

impl ThreadClass {
    fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Disk => "disk",
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

fn policy() -> Result<&'static BpfMap, SeccompError> {
    static COMPILED: OnceLock<Result<BpfMap, String>> = OnceLock::new();
    COMPILED
        .get_or_init(|| {
            seccompiler::compile_from_json(POLICY, TargetArch::x86_64)
                .map_err(|error| error.to_string())
        })
        .as_ref()
        .map_err(|error| SeccompError::Policy(error.clone()))
}

/// Puts the calling thread under the filter of its class, for good.
pub fn enter(class: ThreadClass) -> Result<(), SeccompError> {
    let filter = policy()?
        .get(class.name())
        .ok_or(SeccompError::Missing(class.name()))?;
    seccompiler::apply_filter(filter).map_err(|error| SeccompError::Install(class.name(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_a_filter() {
        for class in [ThreadClass::Main, ThreadClass::Vcpu, ThreadClass::Disk] {
            assert!(policy().unwrap().contains_key(class.name()), "{class:?}");
        }
    }

    /// In a child, because the punishment hits the whole process.
    #[test]
    #[allow(unsafe_code)]
    fn a_call_that_is_not_listed_kills_the_process() {
        for class in [ThreadClass::Main, ThreadClass::Vcpu, ThreadClass::Disk] {
            policy().unwrap();
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
