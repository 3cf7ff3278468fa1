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
//! A source is opened once and then mounted by fd ([`coffer_mount`]), never by a path that could change meanwhile.

mod idmap;
mod volumes;

pub use idmap::IdMap;

use coffer_mount::{Attributes, Change, Depth, Propagation};
use coffer_proto::ids::ContainerId;
use coffer_proto::limits::{SHARE_DIR, VOLUMES};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::ffi::CString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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
        let options = Options {
            read_only: true,
            no_symlinks: true,
            shared: true,
            owners: None,
        };
        mount(
            &share.points(),
            open(&share.points())?.as_fd(),
            &share.served(),
            &options,
            Depth::One,
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
        let depth = if kind.is_dir() {
            Depth::Recursive
        } else {
            Depth::One
        };
        let options = Options {
            read_only,
            owners,
            ..Options::default()
        };
        mount(
            source,
            opened.as_fd(),
            &self.served().join(within),
            &options,
            depth,
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
struct Options {
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
    options: &Options,
    depth: Depth,
) -> Result<(), ShareError> {
    let fail = |source: Errno| ShareError::Mount {
        source_path: source_path.to_owned(),
        target: target.to_owned(),
        source: source.into(),
    };
    let tree = coffer_mount::clone_tree(source, depth).map_err(fail)?;
    let mut set = Attributes::NODEV | Attributes::NOSUID;
    set.set(Attributes::RDONLY, options.read_only);
    set.set(Attributes::NOSYMFOLLOW, options.no_symlinks);
    let private = Change {
        set,
        propagation: Some(Propagation::Private),
        ..Change::default()
    };
    coffer_mount::change(&tree, depth, private).map_err(fail)?;
    if let Some((namespace, below)) = &options.owners {
        let depth = if *below { depth } else { Depth::One };
        coffer_mount::map_owners(&tree, depth, namespace).map_err(fail)?;
    }
    coffer_mount::attach(&tree, open(target)?).map_err(fail)?;
    if options.shared {
        // Only now: a tree that is shared before it is attached would join its source's peers.
        coffer_mount::change(open(target)?, Depth::One, Propagation::Shared).map_err(fail)?;
    }
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
