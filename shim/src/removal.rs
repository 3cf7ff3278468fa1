//! Removes directories that a container has written to.
//!
//! A tenant decides how deep such a tree is. [`std::fs::remove_dir_all`] holds a descriptor for each level, so some thousand
//! directories in one another could not be removed any more. Here no more than [`MAX_DEPTH`] are open: what is deeper moves up to the top
//! first, where its turn comes later.

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Levels that are open at a time.
const MAX_DEPTH: usize = 64;

/// Removes a directory with all that is below it. One that is gone already is no error. The tree must be one file system, and
/// nobody may write to it meanwhile.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let top = match open(path, directory_flags(), Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(()),
        opened => opened?,
    };
    let mut removal = Removal {
        top: top.as_fd(),
        moved: 0,
    };
    loop {
        let before = removal.moved;
        removal.empty(top.as_fd(), 0)?;
        if removal.moved == before {
            return fs::remove_dir(path);
        }
    }
}

struct Removal<'a> {
    top: BorrowedFd<'a>,
    /// Directories that were moved to the top so far, which gives each its name.
    moved: u64,
}

impl Removal<'_> {
    fn empty(&mut self, directory: BorrowedFd<'_>, depth: usize) -> nix::Result<()> {
        let listed: OwnedFd = openat(directory, c".", directory_flags(), Mode::empty())?;
        for entry in Dir::from_fd(listed)?.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let stat = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFDIR.bits() {
                unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)?;
            } else if depth == MAX_DEPTH {
                self.move_up(directory, name)?;
            } else {
                let below = openat(directory, name, directory_flags(), Mode::empty())?;
                self.empty(below.as_fd(), depth + 1)?;
                unlinkat(directory, name, UnlinkatFlags::RemoveDir)?;
            }
        }
        Ok(())
    }

    fn move_up(&mut self, directory: BorrowedFd<'_>, name: &CStr) -> nix::Result<()> {
        loop {
            self.moved += 1;
            match renameat(
                directory,
                name,
                self.top,
                format!("deep-{}", self.moved).as_str(),
            ) {
                // Something has that name, maybe of a removal that was cut short.
                Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
                renamed => return renamed,
            }
        }
    }
}

fn directory_flags() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::mkdirat;
    use std::os::unix::fs::symlink;

    /// So many directories in one another, with a file in each.
    fn nest(path: &Path, depth: usize) {
        fs::create_dir(path).unwrap();
        let mut at = open(path, directory_flags(), Mode::empty()).unwrap();
        for _ in 0..depth {
            mkdirat(&at, c"d", Mode::S_IRWXU).unwrap();
            openat(&at, c"f", OFlag::O_CREAT | OFlag::O_CLOEXEC, Mode::S_IRWXU).unwrap();
            at = openat(&at, c"d", directory_flags(), Mode::empty()).unwrap();
        }
    }

    #[test]
    fn a_tree_deeper_than_there_are_descriptors_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tree");
        nest(&path, 5000);
        // As a removal leaves it that was cut short.
        nest(&path.join("deep-1"), 100);
        remove_tree(&path).unwrap();
        assert!(!path.exists());
        remove_tree(&path).unwrap();
    }

    #[test]
    fn links_are_removed_and_not_followed() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("kept"), "").unwrap();
        let path = dir.path().join("tree");
        fs::create_dir(&path).unwrap();
        symlink(outside.path(), path.join("link")).unwrap();
        remove_tree(&path).unwrap();
        assert!(!path.exists() && outside.path().join("kept").exists());
        symlink(outside.path(), &path).unwrap();
        assert!(remove_tree(&path).is_err());
        assert!(outside.path().join("kept").exists());
    }
}
