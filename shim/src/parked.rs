//! A process that does nothing in a namespace, for others to name it by.
//!
//! It ends when this process lets go of the other end of its pipe, or dies.
#![allow(unsafe_code, reason = "fork, and system calls between fork and exit")]

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Which namespace the process is in, besides those of this one.
#[derive(Debug, Clone, Copy)]
pub enum Namespace<'a> {
    /// A new one of this kind.
    New(CloneFlags),
    /// This network namespace.
    Network(BorrowedFd<'a>),
    Inherited,
}

/// The process. Dropping it ends it.
#[derive(Debug)]
pub struct Parked {
    pid: Pid,
    /// The process reads from the other end until this one is closed.
    _lease: OwnedFd,
}

impl Parked {
    /// Starts the process; it is in its namespace when this returns.
    pub fn start(namespace: Namespace<'_>) -> io::Result<Self> {
        let (lease, ours) = pipe2(OFlag::O_CLOEXEC)?;
        let (result, status) = pipe2(OFlag::O_CLOEXEC)?;
        let fds = [
            lease.as_raw_fd(),
            status.as_raw_fd(),
            match namespace {
                Namespace::Network(joined) => joined.as_raw_fd(),
                Namespace::New(_) | Namespace::Inherited => lease.as_raw_fd(),
            },
        ];
        // SAFETY: the child only makes system calls, which need no lock that another thread could hold.
        let pid = match Errno::result(unsafe { libc::fork() })? {
            // SAFETY: this is the child of the fork.
            0 => unsafe { park(fds, namespace) },
            pid => Pid::from_raw(pid),
        };
        let parked = Self { pid, _lease: ours };
        drop((lease, status));
        let mut errno = [0; size_of::<i32>()];
        File::from(result).read_exact(&mut errno)?;
        match i32::from_ne_bytes(errno) {
            0 => Ok(parked),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Its namespace of this kind, as in `/proc/<pid>/ns`.
    pub fn namespace(&self, kind: &str) -> io::Result<File> {
        File::open(format!("/proc/{}/ns/{kind}", self.pid))
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        // It is our child and not reaped yet, so the pid is its own.
        let _ = kill(self.pid, Signal::SIGKILL);
        while waitpid(self.pid, None) == Err(Errno::EINTR) {}
    }
}

/// The process, from the fork to its end. `fds` are the lease, where to write the errno of the set-up, and the namespace.
///
/// # Safety
/// For the child of a fork only: it closes every descriptor.
unsafe fn park(fds: [RawFd; 3], namespace: Namespace<'_>) -> ! {
    // SAFETY: system calls on numbers and on buffers of this frame; the process shares its memory with nobody.
    unsafe {
        // Above the standard streams in two steps, so that no descriptor is overwritten before it is copied.
        let [lease, status, joined] = fds.map(|fd| libc::fcntl(fd, libc::F_DUPFD, 3));
        libc::dup2(lease, 0);
        libc::dup2(status, 1);
        libc::dup2(joined, 2);
        libc::close_range(3, libc::c_uint::MAX, 0);
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"coffer-parked".as_ptr());
        let set_up = match namespace {
            Namespace::New(kind) => libc::unshare(kind.bits()),
            Namespace::Network(_) => libc::setns(2, libc::CLONE_NEWNET),
            Namespace::Inherited => 0,
        };
        let errno = if set_up == 0 {
            0
        } else {
            *libc::__errno_location()
        };
        libc::write(1, (&raw const errno).cast(), size_of::<i32>());
        libc::dup2(0, 1);
        libc::dup2(0, 2);
        let mut byte = 0_u8;
        // Nothing is ever written: it returns at the end of the lease, or for a signal that does not end the process.
        while libc::read(0, (&raw mut byte).cast(), 1) < 0 {}
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::linux::fs::MetadataExt;

    fn inode(namespace: &File) -> u64 {
        namespace.metadata().unwrap().st_ino()
    }

    #[test]
    fn it_holds_a_network_namespace_until_it_is_dropped() {
        let own = File::open("/proc/self/ns/net").unwrap();
        let first = Parked::start(Namespace::New(CloneFlags::CLONE_NEWNET)).unwrap();
        let namespace = first.namespace("net").unwrap();
        assert_ne!(inode(&namespace), inode(&own));
        let second = Parked::start(Namespace::Network(namespace.as_fd())).unwrap();
        assert_ne!(first.pid(), second.pid());
        assert_eq!(inode(&second.namespace("net").unwrap()), inode(&namespace));
        let inherited = Parked::start(Namespace::Inherited).unwrap();
        assert_eq!(inode(&inherited.namespace("net").unwrap()), inode(&own));
        let pid = first.pid();
        drop(first);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        let no_namespace = File::open("/dev/null").unwrap();
        assert!(Parked::start(Namespace::Network(no_namespace.as_fd())).is_err());
    }
}
