//! Pseudo-terminals, from the container's own devpts.
#![allow(unsafe_code, reason = "terminal ioctls without wrapper")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use coffer_mount::Depth;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat, major, minor};
use nix::sys::statfs::fstatfs;

use super::failure::{Failure, at};
use super::root::Root;

/// f_type of devpts (linux/magic.h).
const DEVPTS_SUPER_MAGIC: libc::c_long = 0x1cd1;
/// Device number of every ptmx.
const PTMX: (u64, u64) = (5, 2);

/// Both ends of a terminal.
#[derive(Debug)]
pub struct Terminal {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

/// Makes a terminal of this size. The container may have put anything at /dev/pts/ptmx, so what was opened is checked.
pub fn open(root: &Root, rows: u16, columns: u16) -> Result<Terminal, Failure> {
    let step = "open /dev/pts/ptmx";
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let master = root
        .open(Path::new("/dev/pts/ptmx"), flags)
        .map_err(at(step))?;
    check_is_ptmx(master.as_fd()).map_err(at(step))?;
    fcntl(&master, FcntlArg::F_SETFL(OFlag::O_RDWR)).map_err(at(step))?;
    let slave = open_slave(master.as_fd()).map_err(at("open the terminal"))?;
    resize(master.as_fd(), rows, columns).map_err(at("set the size of the terminal"))?;
    Ok(Terminal { master, slave })
}

fn check_is_ptmx(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let stat = fstat(fd)?;
    let device = (major(stat.st_rdev), minor(stat.st_rdev));
    let is_char = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits();
    let on_devpts = fstatfs(fd)?.filesystem_type().0 == DEVPTS_SUPER_MAGIC;
    if is_char && device == PTMX && on_devpts {
        Ok(())
    } else {
        Err(Errno::ENOTTY)
    }
}

/// Unlocks and opens the other end through the master, not by a name that the container could change.
fn open_slave(master: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    // SAFETY: the kernel has just made this descriptor for us.
    Errno::result(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn resize(master: BorrowedFd<'_>, rows: u16, columns: u16) -> nix::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize.
    Errno::result(unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCSWINSZ,
            std::ptr::from_ref(&size),
        )
    })
    .map(|_| ())
}

/// Makes the terminal /dev/console of the container.
pub fn bind_console(root: &Root, slave: BorrowedFd<'_>) -> Result<(), Failure> {
    let step = "mount the terminal on /dev/console";
    let target = root.file(Path::new("/dev/console")).map_err(at(step))?;
    let tree = coffer_mount::clone_tree(slave, Depth::One).map_err(at(step))?;
    coffer_mount::attach(tree, target).map_err(at(step))
}

/// Makes the terminal the controlling one of the calling session leader.
pub fn control(slave: BorrowedFd<'_>) -> Result<(), Failure> {
    // SAFETY: TIOCSCTTY takes an int by value.
    Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) })
        .map(|_| ())
        .map_err(at("take the controlling terminal"))
}
