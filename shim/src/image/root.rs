//! A directory that is some container's `/`.
//!
//! Its content is not ours: any path in it may be a symbolic link that points anywhere. Every access therefore starts
//! at an open directory and is resolved by the kernel with that directory as root (openat2 with RESOLVE_IN_ROOT), so
//! that `/etc -> ../../etc` still ends inside.

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, mkdirat};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Mode of directories that nobody described.
const DEFAULT_DIRECTORY_MODE: Mode = Mode::from_bits_truncate(0o755);

/// A container's root directory, held open.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// Opens the directory itself; a symbolic link is not followed.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(Self(open(path, flags, Mode::empty())?))
    }

    /// Opens a path inside as if this were `/`.
    pub fn open_inside(&self, path: &Path, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        // The kernel gives EAGAIN when a rename raced with `..`; the tree is quiet when we look, so it soon passes.
        for _ in 0..8 {
            match openat2(&self.0, path, how) {
                Err(nix::Error::EAGAIN) => {}
                result => return result,
            }
        }
        Err(nix::Error::EAGAIN)
    }

    /// Opens a directory inside for use with the `*at` calls, made with its parents where it is missing.
    pub fn make_directory(&self, path: &Path) -> nix::Result<OwnedFd> {
        match self.directory(path) {
            Err(nix::Error::ENOENT) => {}
            result => return result,
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(nix::Error::ENOENT);
        };
        let parent = self.make_directory(parent)?;
        mkdirat(&parent, name, DEFAULT_DIRECTORY_MODE)?;
        self.directory(path)
    }

    /// Opens a directory inside, readable.
    pub fn directory(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.open_inside(path, OFlag::O_DIRECTORY | OFlag::O_RDONLY, Mode::empty())
    }

    /// Reads a regular file of at most `limit` bytes; None where there is none.
    pub fn read(&self, path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open_inside(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK, Mode::empty())
        {
            Ok(fd) => File::from(fd),
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() > limit {
            return Err(io::Error::other(format!(
                "it is no regular file of at most {limit} bytes"
            )));
        }
        let mut content = Vec::new();
        file.take(limit).read_to_end(&mut content)?;
        Ok(Some(content))
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
