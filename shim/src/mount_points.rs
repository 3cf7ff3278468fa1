//! Mount points in a root file system that the guest will see read-only.
//!
//! The agent makes missing mount points itself, but not where the host already enforces a read-only root. So, like runc on
//! the host, the shim makes them first. The rootfs is an image's, that is a tenant's: every step is resolved in
//! its root by fd (openat2 RESOLVE_IN_ROOT), and a symlink in it leads nowhere else.

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, mkdirat};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// Where something will be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Absolute in the container.
    pub path: PathBuf,
    /// The source is a file, not a directory.
    pub file: bool,
}

/// Why a mount point could not be made.
#[derive(Debug, thiserror::Error)]
#[error("can't make the mount point {path} in {rootfs}")]
pub struct MountPointError {
    rootfs: PathBuf,
    path: PathBuf,
    source: Errno,
}

/// Makes what is missing. Points below an earlier mount belong to that mount and are left alone.
pub fn make(rootfs: &Path, points: &[MountPoint]) -> Result<(), MountPointError> {
    let fail = |path: &Path, source| MountPointError {
        rootfs: rootfs.to_owned(),
        path: path.to_owned(),
        source,
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(rootfs, flags, Mode::empty()).map_err(|e| fail(Path::new("/"), e))?;
    for (i, point) in points.iter().enumerate() {
        if points[..i]
            .iter()
            .any(|earlier| point.path.starts_with(&earlier.path))
        {
            continue;
        }
        match make_one(root.as_fd(), point) {
            // The image is read-only as it is; what is missing the agent will name.
            Ok(()) | Err(Errno::EROFS) => {}
            Err(error) => return Err(fail(&point.path, error)),
        }
    }
    Ok(())
}

fn make_one(root: BorrowedFd<'_>, point: &MountPoint) -> Result<(), Errno> {
    let names: Vec<&OsStr> = point
        .path
        .components()
        .filter_map(|c| {
            if let Component::Normal(name) = c {
                Some(name)
            } else {
                None
            }
        })
        .collect();
    let Some((last, parents)) = names.split_last() else {
        return Ok(());
    };
    let mut dir = lookup(root, Path::new("."))?;
    let mut so_far = PathBuf::new();
    for name in parents {
        so_far.push(name);
        dir = match lookup(root, &so_far) {
            Err(Errno::ENOENT) => {
                mkdirat(dir.as_fd(), *name, Mode::from_bits_truncate(0o755))?;
                lookup(root, &so_far)?
            }
            found => found?,
        };
    }
    if lookup(root, &so_far.join(last)).is_ok() {
        return Ok(());
    }
    if point.file {
        let how = OpenHow::new()
            .flags(OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC)
            .mode(Mode::from_bits_truncate(0o644))
            .resolve(ResolveFlag::RESOLVE_BENEATH);
        return openat2(dir.as_fd(), *last, how).map(drop);
    }
    mkdirat(dir.as_fd(), *last, Mode::from_bits_truncate(0o755))
}

fn lookup(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn point(path: &str, file: bool) -> MountPoint {
        MountPoint {
            path: path.into(),
            file,
        }
    }

    #[test]
    fn missing_points_are_made_and_points_on_mounts_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let points = [
            point("/a/b", false),
            point("/a/b/c", false),
            point("/etc/hosts", true),
            point("/", false),
        ];
        make(dir.path(), &points).unwrap();
        make(dir.path(), &points).unwrap();
        assert!(dir.path().join("a/b").is_dir() && !dir.path().join("a/b/c").exists());
        assert!(dir.path().join("etc/hosts").is_file());
    }

    #[test]
    fn symlinks_of_the_image_stay_in_the_image() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(dir.path().join("real")).unwrap();
        symlink("/real", dir.path().join("inside")).unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        symlink("../../../../real", dir.path().join("up")).unwrap();
        make(
            dir.path(),
            &[point("/inside/x", false), point("/up/y", true)],
        )
        .unwrap();
        assert!(dir.path().join("real/x").is_dir() && dir.path().join("real/y").is_file());
        assert!(make(dir.path(), &[point("/out/z", false)]).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
