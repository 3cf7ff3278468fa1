//! Processes by descriptor: a pid can be somebody else's by now, a pidfd can't.
#![allow(unsafe_code, reason = "nix has no pidfd calls")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;

use super::readiness::ready_by;

/// The pidfd of a child that was not waited for.
pub fn open(pid: u32) -> nix::Result<OwnedFd> {
    // SAFETY: takes two integers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(libc::c_int::try_from(fd).unwrap_or_default()) })
}

/// SIGKILL. Fine if the process has ended.
pub fn kill(pidfd: BorrowedFd<'_>) {
    let info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: an open descriptor, and no siginfo, which makes it that of kill(2).
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            info,
            0,
        )
    };
}

/// Whether the process ends in this time.
pub fn ends_within(pidfd: BorrowedFd<'_>, timeout: Duration) -> nix::Result<bool> {
    ready_by(pidfd, PollFlags::POLLIN, Instant::now() + timeout)
}
