//! Paths in a container's root file system, which is hostile: it may hold any symlink, and another process may swap
//! one while we look. Every path is resolved by the kernel inside the root, to a descriptor.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// openat2(2) gives EAGAIN while others rename below the root; a root that does so for ever is given up.
const RENAME_RETRIES: usize = 128;

/// The root directory of a container.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// The root of the calling process.
    pub fn current() -> nix::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        nix::fcntl::open("/", flags, Mode::empty()).map(Self)
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Opens what `path` names; symlinks stay inside the root.
    pub fn open(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        resolve(self.fd(), path, flags, ResolveFlag::RESOLVE_IN_ROOT)
    }

    /// As [`Root::open`], and refuses any symlink on the way (ELOOP).
    pub fn open_without_symlinks(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS;
        resolve(self.fd(), path, flags, how)
    }

    /// The directory `path`, made with its parents (0755) where missing.
    pub fn directory(&self, path: &Path) -> nix::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let mut so_far = PathBuf::from("/");
        let mut directory = self.open(&so_far, flags)?;
        for name in names(path) {
            so_far.push(&name);
            directory = match self.open(&so_far, flags) {
                Err(Errno::ENOENT) => {
                    match mkdirat(
                        &directory,
                        name.as_os_str(),
                        Mode::from_bits_truncate(0o755),
                    ) {
                        Ok(()) | Err(Errno::EEXIST) => {}
                        Err(error) => return Err(error),
                    }
                    beneath(directory.as_fd(), Path::new(&name), flags)?
                }
                found => found?,
            };
        }
        Ok(directory)
    }

    /// The file `path`, made empty (0644, parents 0755) where missing.
    pub fn file(&self, path: &Path) -> nix::Result<OwnedFd> {
        match self.open(path, OFlag::O_PATH) {
            Err(Errno::ENOENT) => {}
            found => return found,
        }
        let (parent, name) = self.parent(path)?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(
            &parent,
            name.as_os_str(),
            flags,
            Mode::from_bits_truncate(0o644),
        ) {
            Ok(_) | Err(Errno::EEXIST) => beneath(parent.as_fd(), Path::new(&name), OFlag::O_PATH),
            Err(error) => Err(error),
        }
    }

    /// The directory that holds `path`, made where missing, and the last name of `path`.
    pub fn parent(&self, path: &Path) -> nix::Result<(OwnedFd, OsString)> {
        let name = names(path).pop().ok_or(Errno::EINVAL)?;
        let parent = self.directory(path.parent().unwrap_or(Path::new("/")))?;
        Ok((parent, name))
    }
}

/// Opens a path below `directory` that may have no symlink and no `..` out of it.
pub fn beneath(directory: BorrowedFd<'_>, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    resolve(directory, path, flags, how)
}

fn resolve(
    directory: BorrowedFd<'_>,
    path: &Path,
    flags: OFlag,
    how: ResolveFlag,
) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(how | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    for _ in 0..RENAME_RETRIES {
        match openat2(directory, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

/// The names of an absolute path. `..` never gets here: the spec's paths were checked for it.
fn names(path: &Path) -> Vec<OsString> {
    let normal = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        _ => None,
    });
    normal.collect()
}
