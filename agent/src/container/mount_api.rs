//! The file descriptor based mount system calls (`fsopen(2)`, `open_tree(2)`, `move_mount(2)`, `mount_setattr(2)`).
//!
//! A mount is made detached, configured, and only then attached to a directory that is also held by descriptor. No step
//! looks a path up twice, so nobody can swap a symlink in between.
#![allow(unsafe_code, reason = "neither nix nor libc wraps these system calls")]

use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

// linux/mount.h
pub const MOUNT_ATTR_RDONLY: u64 = 0x1;
pub const MOUNT_ATTR_NOSUID: u64 = 0x2;
pub const MOUNT_ATTR_NODEV: u64 = 0x4;
pub const MOUNT_ATTR_NOEXEC: u64 = 0x8;
/// Mask of the access time modes; 0 in it is relatime.
pub const MOUNT_ATTR_ATIME: u64 = 0x70;
pub const MOUNT_ATTR_NOATIME: u64 = 0x10;
pub const MOUNT_ATTR_STRICTATIME: u64 = 0x20;
pub const MOUNT_ATTR_NODIRATIME: u64 = 0x80;
pub const MOUNT_ATTR_NOSYMFOLLOW: u64 = 0x20_0000;

const OPEN_TREE_CLONE: libc::c_int = 1;
const AT_RECURSIVE: libc::c_int = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_int = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_int = 0x40;
const FSOPEN_CLOEXEC: libc::c_int = 1;
const FSMOUNT_CLOEXEC: libc::c_int = 1;
const FSCONFIG_SET_FLAG: libc::c_int = 0;
const FSCONFIG_SET_STRING: libc::c_int = 1;
const FSCONFIG_CMD_CREATE: libc::c_int = 6;

/// A mount's own tree, or with all that is mounted below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    One,
    Recursive,
}

impl Depth {
    fn flag(self) -> libc::c_int {
        if self == Self::Recursive {
            AT_RECURSIVE
        } else {
            0
        }
    }
}

/// `struct mount_attr` of `mount_setattr(2)`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MountAttr {
    pub set: u64,
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0 to leave it.
    pub propagation: u64,
    pub userns_fd: u64,
}

fn check(result: libc::c_long) -> nix::Result<libc::c_int> {
    Errno::result(result).map(|value| libc::c_int::try_from(value).unwrap_or_default())
}

fn owned(result: libc::c_long) -> nix::Result<OwnedFd> {
    // SAFETY: the system call has just made this descriptor for us.
    check(result).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A detached copy of the mount at `at`, which may be any descriptor, O_PATH too.
pub fn clone_tree(at: BorrowedFd<'_>, depth: Depth) -> nix::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC | libc::AT_EMPTY_PATH | depth.flag();
    // SAFETY: an open descriptor and a NUL-terminated empty path.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, at.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches a detached tree on top of what `to` refers to.
pub fn attach(tree: BorrowedFd<'_>, to: BorrowedFd<'_>) -> nix::Result<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: two open descriptors and NUL-terminated empty paths.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            to.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    })?;
    Ok(())
}

/// Changes the attributes of the mount that `mount` is the root of.
pub fn set_attr(mount: BorrowedFd<'_>, depth: Depth, attr: &MountAttr) -> nix::Result<()> {
    if *attr == MountAttr::default() {
        return Ok(());
    }
    // SAFETY: `attr` is a `struct mount_attr` of the size given, alive during the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | depth.flag(),
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    })?;
    Ok(())
}

/// Makes a new file system instance and its detached mount. A parameter without value is a flag.
pub fn new_mount(
    kind: &CStr,
    parameters: &[(String, Option<String>)],
    attr: u64,
) -> io::Result<OwnedFd> {
    // SAFETY: a NUL-terminated name.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    // The source only shows in mountinfo; every kernel file system takes it.
    configure(
        &context,
        FSCONFIG_SET_STRING,
        Some("source"),
        kind.to_str().ok(),
    )?;
    for (key, value) in parameters {
        let command = if value.is_some() {
            FSCONFIG_SET_STRING
        } else {
            FSCONFIG_SET_FLAG
        };
        configure(&context, command, Some(key), value.as_deref())?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: an open file system context.
    Ok(owned(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attr,
        )
    })?)
}

fn configure(
    context: &OwnedFd,
    command: libc::c_int,
    key: Option<&str>,
    value: Option<&str>,
) -> io::Result<()> {
    let key = key.map(CString::new).transpose()?;
    let value = value.map(CString::new).transpose()?;
    let pointer = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
    // SAFETY: both pointers are null or NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            pointer(&key),
            pointer(&value),
            0,
        )
    };
    check(result)
        .map(|_| ())
        .map_err(|errno| explain(context, errno))
}

/// The kernel says in the context's log what was wrong with a parameter.
fn explain(context: &OwnedFd, errno: Errno) -> io::Error {
    let mut log = [0; 256];
    let said = context
        .try_clone()
        .and_then(|fd| std::fs::File::from(fd).read(&mut log))
        .map(|n| String::from_utf8_lossy(&log[..n]).trim().to_owned())
        .unwrap_or_default();
    match said.split_once(' ') {
        Some((_, text)) => {
            io::Error::new(io::Error::from(errno).kind(), format!("{errno}: {text}"))
        }
        None => errno.into(),
    }
}
