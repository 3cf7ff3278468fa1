//! The directory of a sandbox that its guest sees.
//!
//! ```text
//! <sandbox>/shared/   plain directory, written by the shim only: the mount points
//! <sandbox>/share/    `shared` once more, as a mount of its own: read-only, nodev, nosuid, nosymfollow, shared propagation.
//!   <container>/rootfs      the container's root, bind mounted
//!   .volumes/<n>            volumes, each for the containers that have it
//! ```
//!
//! coffer-fsd serves `share`. Its top is read-only, so the guest's root can't put a symlink where the shim would
//! later mount something; the bind mounts on top carry their own read-only flag, so the host enforces a read-only volume whatever
//! the guest does. Propagation brings mounts that are added later into coffer-fsd's mount namespace.
//! A source is opened once and then mounted by fd (open_tree, move_mount), never by a path that could change meanwhile.

mod idmap;
mod volumes;

pub use idmap::IdMap;

use coffer_proto::ids::ContainerId;
use coffer_proto::limits::{SHARE_DIR, VOLUMES};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::ffi::CString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use volumes::{Content, Volumes};

/// Why the share could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("can't create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("can't open {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is neither a directory nor a regular file")]
    Kind { path: PathBuf },
    #[error("can't mount {source_path} on {target}")]
    Mount {
        source_path: PathBuf,
        target: PathBuf,
        source: io::Error,
    },
    #[error("can't unmount {path}")]
    Unmount { path: PathBuf, source: io::Error },
    #[error("can't remove {path}")]
    Remove { path: PathBuf, source: io::Error },
    #[error("can't make the user namespace for an ID-mapped mount of {path}")]
    IdMap { path: PathBuf, source: io::Error },
    #[error("{path} is still a mount, its directory stays")]
    StillMounted { path: PathBuf },
}

/// A sandbox's share while the sandbox lives.
#[derive(Debug)]
pub struct Share {
    sandbox: PathBuf,
    volumes: Mutex<Volumes>,
}

impl Share {
    /// Makes the share below the sandbox's directory.
    pub fn create(sandbox: &Path) -> Result<Self, ShareError> {
        let share = Self::of(sandbox);
        for dir in [share.points(), share.served()] {
            make_dir(&dir)?;
        }
        let attributes = Attributes {
            read_only: true,
            no_symlinks: true,
            shared: true,
            owners: None,
        };
        mount(
            &share.points(),
            open(&share.points())?.as_fd(),
            &share.served(),
            &attributes,
            false,
        )?;
        Ok(share)
    }

    fn of(sandbox: &Path) -> Self {
        Self {
            sandbox: sandbox.to_owned(),
            volumes: Mutex::default(),
        }
    }

    /// What coffer-fsd serves.
    pub fn served(&self) -> PathBuf {
        self.sandbox.join("share")
    }

    fn points(&self) -> PathBuf {
        self.sandbox.join("shared")
    }

    /// Shows a directory as the container's root; gives its path in the guest.
    pub fn add_rootfs(
        &self,
        id: &ContainerId,
        source: &Path,
        read_only: bool,
    ) -> Result<String, ShareError> {
        let within = Path::new(id.as_str()).join("rootfs");
        self.add(&within, source, &open(source)?, read_only, None)
    }

    /// Shows a directory or file as a volume of a container; gives its path in the guest.
    pub fn add_volume(
        &self,
        id: &ContainerId,
        source: &Path,
        read_only: bool,
        idmap: Option<&IdMap>,
    ) -> Result<String, ShareError> {
        let opened = open(source)?;
        let content = Content::of(source, &opened, read_only, idmap)?;
        let mut volumes = self.volumes.lock().expect("no holder of this lock panics");
        if let Some(number) = volumes.join(&content, id) {
            return Ok(in_guest(&volume(number)));
        }
        let number = volumes.next();
        let path = self.add(&volume(number), source, &opened, read_only, idmap)?;
        volumes.add(number, content, id);
        Ok(path)
    }

    /// Mounts a source that was opened at a place of the share.
    fn add(
        &self,
        within: &Path,
        source: &Path,
        opened: &File,
        read_only: bool,
        idmap: Option<&IdMap>,
    ) -> Result<String, ShareError> {
        let point = self.points().join(within);
        if let Some(parent) = point.parent() {
            make_dir(parent)?;
        }
        let kind = opened
            .metadata()
            .map_err(|e| ShareError::Open {
                path: source.to_owned(),
                source: e,
            })?
            .file_type();
        if kind.is_dir() {
            make_dir(&point)?;
        } else if kind.is_file() || kind.is_fifo() || kind.is_socket() {
            File::create_new(&point).map_err(|e| ShareError::Create {
                path: point.clone(),
                source: e,
            })?;
        } else {
            return Err(ShareError::Kind {
                path: source.to_owned(),
            });
        }
        let owners = idmap.map(|idmap| {
            let user_namespace = idmap.user_namespace();
            user_namespace.map(|namespace| (namespace, idmap.recursive))
        });
        let owners = owners.transpose().map_err(|error| ShareError::IdMap {
            path: source.to_owned(),
            source: error,
        })?;
        let attributes = Attributes {
            read_only,
            owners,
            ..Attributes::default()
        };
        mount(
            source,
            opened.as_fd(),
            &self.served().join(within),
            &attributes,
            kind.is_dir(),
        )?;
        Ok(in_guest(within))
    }

    /// Takes everything of one container away. Nothing to do is no error.
    pub fn remove_container(&self, id: &ContainerId) -> Result<(), ShareError> {
        unmount_below(&self.served().join(id))?;
        remove_tree(&self.points().join(id))?;
        let unused = self
            .volumes
            .lock()
            .expect("no holder of this lock panics")
            .leave(id);
        for number in unused {
            unmount_below(&self.served().join(volume(number)))?;
            remove_tree(&self.points().join(volume(number)))?;
        }
        Ok(())
    }

    /// Takes the whole share of a sandbox away, from its directory alone; what is gone already is no error.
    pub fn remove(sandbox: &Path) -> Result<(), ShareError> {
        let share = Self::of(sandbox);
        unmount_below(&share.served())?;
        match fs::remove_dir(share.served()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(ShareError::Remove {
                    path: share.served(),
                    source: e,
                });
            }
            _ => {}
        }
        remove_tree(&share.points())
    }
}

/// A volume's place in the share.
fn volume(number: u64) -> PathBuf {
    Path::new(VOLUMES).join(number.to_string())
}

fn in_guest(within: &Path) -> String {
    format!("{SHARE_DIR}/{}", within.display())
}

/// Opens a path for mounting, following symlinks of the host as the user who named it expects.
fn open(path: &Path) -> Result<File, ShareError> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open(path)
        .map_err(|source| ShareError::Open {
            path: path.to_owned(),
            source,
        })
}

fn make_dir(path: &Path) -> Result<(), ShareError> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(ShareError::Create {
            path: path.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}

/// What is set on a mount besides nodev and nosuid, which all of them have.
#[derive(Debug, Default)]
struct Attributes {
    read_only: bool,
    no_symlinks: bool,
    shared: bool,
    /// The user namespace whose mapping the mount gets, and whether the mounts below it get it too.
    owners: Option<(OwnedFd, bool)>,
}

/// Clones the tree at `source` and attaches it on `target`.
fn mount(
    source_path: &Path,
    source: BorrowedFd<'_>,
    target: &Path,
    attributes: &Attributes,
    recursive: bool,
) -> Result<(), ShareError> {
    let fail = |source| ShareError::Mount {
        source_path: source_path.to_owned(),
        target: target.to_owned(),
        source,
    };
    let tree = open_tree(source, recursive).map_err(fail)?;
    let mut set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    if attributes.read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    if attributes.no_symlinks {
        set |= libc::MOUNT_ATTR_NOSYMFOLLOW;
    }
    set_attributes(tree.as_fd(), set, libc::MS_PRIVATE, recursive).map_err(fail)?;
    if let Some((namespace, below)) = &attributes.owners {
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::try_from(namespace.as_raw_fd()).unwrap_or_default(),
        };
        mount_setattr(tree.as_fd(), &attributes, recursive && *below).map_err(fail)?;
    }
    let point = open(target)?;
    move_mount(tree.as_fd(), point.as_fd()).map_err(fail)?;
    if attributes.shared {
        // Only now: a tree that is shared before it is attached would join its source's peers.
        set_attributes(open(target)?.as_fd(), 0, libc::MS_SHARED, false).map_err(fail)?;
    }
    Ok(())
}

/// Clones the mounts at a place, unattached.
#[allow(unsafe_code)]
pub(crate) fn open_tree(source: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32;
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    // SAFETY: the fd is open for the call and the path is an empty C string.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), c"".as_ptr(), flags) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets `MOUNT_ATTR_*` flags and the propagation of a mount, or of all below it too.
pub(crate) fn set_attributes(
    tree: BorrowedFd<'_>,
    set: u64,
    propagation: u64,
    recursive: bool,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    mount_setattr(tree, &attributes, recursive)
}

#[allow(unsafe_code)]
fn mount_setattr(
    tree: BorrowedFd<'_>,
    attributes: &libc::mount_attr,
    recursive: bool,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: fd and struct are valid for the call, and the size given is the struct's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// Attaches an unattached tree on a place.
#[allow(unsafe_code)]
pub(crate) fn move_mount(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both fds are open for the call and the paths are empty C strings.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// Unmounts everything at and below a path, the newest first.
fn unmount_below(path: &Path) -> Result<(), ShareError> {
    for point in mounts_below(path)?.iter().rev() {
        let name = CString::new(point.as_os_str().as_bytes()).expect("mountinfo holds no NUL");
        match umount2(
            name.as_c_str(),
            MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
        ) {
            // A detached parent took it along.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(e) => {
                return Err(ShareError::Unmount {
                    path: point.clone(),
                    source: e.into(),
                });
            }
        }
    }
    Ok(())
}

/// Mount points at and below a path, in the order in which they were made.
fn mounts_below(path: &Path) -> Result<Vec<PathBuf>, ShareError> {
    let list = PathBuf::from("/proc/self/mountinfo");
    let text = fs::read(&list).map_err(|source| ShareError::Open { path: list, source })?;
    // The kernel prints the path without symlinks.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let points = text
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4));
    Ok(points
        .map(unescape)
        .filter(|point| point.starts_with(&path))
        .collect())
}

/// proc_pid_mountinfo(5): space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        match (first, code) {
            (b'\\', Some(code)) => {
                out.push(code);
                rest = &tail[3..];
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&out))
}

/// Removes mount points: never across a mount, which could be a user's volume.
fn remove_tree(path: &Path) -> Result<(), ShareError> {
    if let Some(mounted) = mounts_below(path)?.into_iter().next() {
        return Err(ShareError::StillMounted { path: mounted });
    }
    let is_file = path.symlink_metadata().is_ok_and(|meta| meta.is_file());
    let removed = if is_file {
        fs::remove_file(path)
    } else {
        fs::remove_dir_all(path)
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ShareError::Remove {
            path: path.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
