//! Mounts by file descriptor.
//!
//! A mount is made detached, configured, and only then attached to a place that is also held by descriptor. No step
//! looks a path up twice, so nobody can swap a symlink in between.
//!
//! | | System calls |
//! |---|---|
//! | [`clone_tree`] | open_tree(2) with `OPEN_TREE_CLONE` |
//! | [`new_mount`] | fsopen(2), fsconfig(2), fsmount(2) |
//! | [`change`], [`map_owners`] | mount_setattr(2) |
//! | [`attach`] | move_mount(2) |
//!
//! The numbers are those of `linux/mount.h` and `linux/fcntl.h`. The C library plays no part.
#![allow(unsafe_code, reason = "neither nix nor libc wraps these system calls")]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use bitflags::bitflags;
use nix::errno::Errno;

const OPEN_TREE_CLONE: libc::c_int = 1;
const AT_RECURSIVE: libc::c_int = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_int = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_int = 0x40;
const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
const FSOPEN_CLOEXEC: libc::c_int = 1;
const FSMOUNT_CLOEXEC: libc::c_int = 1;
const FSCONFIG_SET_FLAG: libc::c_int = 0;
const FSCONFIG_SET_STRING: libc::c_int = 1;
const FSCONFIG_CMD_CREATE: libc::c_int = 6;

/// Longest message of a file system context that is kept; the kernel's own are one line.
const MAX_MESSAGE: usize = 256;

/// One mount, or with all that is mounted below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    One,
    Recursive,
}

impl Depth {
    fn flag(self) -> libc::c_int {
        match self {
            Self::One => 0,
            Self::Recursive => AT_RECURSIVE,
        }
    }
}

bitflags! {
    /// `MOUNT_ATTR_*` of `linux/mount.h`.
    #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
    pub struct Attributes: u64 {
        const RDONLY = 0x1;
        const NOSUID = 0x2;
        const NODEV = 0x4;
        const NOEXEC = 0x8;
        const NOATIME = 0x10;
        const STRICTATIME = 0x20;
        /// Mask of the access time modes, which are one field and not flags; 0 in it is relatime.
        const ATIME = 0x70;
        const NODIRATIME = 0x80;
        const NOSYMFOLLOW = 0x20_0000;
    }
}

/// Which mounts and unmounts pass between a mount and its peers (mount_namespaces(7), "Shared subtrees").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Both ways.
    Shared,
    /// Only towards this one.
    Slave,
    /// None.
    Private,
    /// None, and it can't be cloned.
    Unbindable,
}

impl Propagation {
    fn flag(self) -> u64 {
        match self {
            Self::Shared => libc::MS_SHARED,
            Self::Slave => libc::MS_SLAVE,
            Self::Private => libc::MS_PRIVATE,
            Self::Unbindable => libc::MS_UNBINDABLE,
        }
    }
}

/// What [`change`] is to do to a mount. What is in neither set stays as it is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// After those of `clear`: to choose an access time mode, the whole of [`Attributes::ATIME`] has to be cleared too.
    pub set: Attributes,
    pub clear: Attributes,
    /// None leaves it.
    pub propagation: Option<Propagation>,
}

impl From<Attributes> for Change {
    fn from(set: Attributes) -> Self {
        Self {
            set,
            ..Self::default()
        }
    }
}

impl From<Propagation> for Change {
    fn from(propagation: Propagation) -> Self {
        Self {
            propagation: Some(propagation),
            ..Self::default()
        }
    }
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// A detached copy of the mount at `at`, from the file or directory on that `at` refers to; O_PATH is enough.
pub fn clone_tree(at: impl AsFd, depth: Depth) -> nix::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC | libc::AT_EMPTY_PATH | depth.flag();
    let at = at.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open during the call, and the path is an empty string that ends with a NUL.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, at, c"".as_ptr(), flags) })
}

/// Attaches a detached tree on top of what `to` refers to.
pub fn attach(tree: impl AsFd, to: impl AsFd) -> nix::Result<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    let (tree, to) = (tree.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    let empty = c"".as_ptr();
    // SAFETY: both descriptors are open during the call, and the paths are empty strings that end with a NUL.
    check(unsafe { libc::syscall(libc::SYS_move_mount, tree, empty, to, empty, flags) }).map(drop)
}

/// Changes the mount that `mount` is the root of, detached or not. A change of nothing always succeeds.
pub fn change(mount: impl AsFd, depth: Depth, change: impl Into<Change>) -> nix::Result<()> {
    let change = change.into();
    if change == Change::default() {
        return Ok(());
    }
    let attr = MountAttr {
        attr_set: change.set.bits(),
        attr_clr: change.clear.bits(),
        propagation: change.propagation.map_or(0, Propagation::flag),
        userns_fd: 0,
    };
    set_attr(mount, depth, &attr)
}

/// Shows the files of a detached mount with other owners: those that the mappings of a user namespace give them.
pub fn map_owners(tree: impl AsFd, depth: Depth, user_namespace: impl AsFd) -> nix::Result<()> {
    let namespace = user_namespace.as_fd();
    let attr = MountAttr {
        attr_set: MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(namespace.as_raw_fd().unsigned_abs()),
    };
    set_attr(tree, depth, &attr)
}

fn set_attr(mount: impl AsFd, depth: Depth, attr: &MountAttr) -> nix::Result<()> {
    let mount = mount.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open and `attr` alive during the call; `attr` is a `struct mount_attr` of the size given, and the path an
    // empty string that ends with a NUL.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | depth.flag(),
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    check(result).map(drop)
}

/// Makes a new file system instance and its detached mount. A parameter without value is a flag.
///
/// The error has what the kernel says about it, such as which parameter it does not know.
pub fn new_mount(
    kind: &CStr,
    parameters: &[(String, Option<String>)],
    attributes: Attributes,
) -> io::Result<OwnedFd> {
    // SAFETY: the name ends with a NUL.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    // The source only shows in mountinfo; every kernel file system takes it.
    let source = kind.to_str().ok();
    configure(&context, FSCONFIG_SET_STRING, Some("source"), source)?;
    for (key, value) in parameters {
        let command = if value.is_some() {
            FSCONFIG_SET_STRING
        } else {
            FSCONFIG_SET_FLAG
        };
        configure(&context, command, Some(key), value.as_deref())?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, None, None)?;
    let (fd, bits) = (context.as_raw_fd(), attributes.bits());
    // SAFETY: the descriptor is an open file system context.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, bits) };
    Ok(owned(mount)?)
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
    // SAFETY: both pointers are null or strings that end with a NUL and outlive the call.
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
        .map(drop)
        .map_err(|errno| explain(context, errno))
}

/// The kernel says in the context's log what was wrong with a parameter.
fn explain(context: &OwnedFd, errno: Errno) -> io::Error {
    let mut log = [0; MAX_MESSAGE];
    let said = context
        .try_clone()
        .and_then(|fd| File::from(fd).read(&mut log))
        .map(|n| String::from_utf8_lossy(&log[..n]).trim().to_owned())
        .unwrap_or_default();
    // "e " is an error's mark, "w " and "i " are for warnings and the rest.
    match said.split_once(' ') {
        Some((_, text)) => {
            let kind = io::Error::from(errno).kind();
            io::Error::new(kind, format!("{errno}: {text}"))
        }
        None => errno.into(),
    }
}

fn check(result: libc::c_long) -> nix::Result<libc::c_int> {
    let value = Errno::result(result)?;
    Ok(libc::c_int::try_from(value).expect("these calls give 0 or a descriptor"))
}

/// Takes what must be the result of a system call that has just made a descriptor.
fn owned(result: libc::c_long) -> nix::Result<OwnedFd> {
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    check(result).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests;
