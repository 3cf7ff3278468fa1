//! What a volume looks like, and the steps from one look to the next.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Entries by their path below the volume's root, parents before their children. The root itself is "".
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree(BTreeMap<PathBuf, Entry>);

/// One file, directory or symlink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub kind: Kind,
    pub attributes: Attributes,
    inode: u64,
}

/// What an entry is. Anything else is not mirrored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File {
        size: u64,
        /// Seconds and nanoseconds of the last change of the contents.
        modified: (i64, i64),
    },
    Symlink(PathBuf),
}

/// Permissions and owner.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// How much of a volume is mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub entries: usize,
    pub bytes: u64,
}

/// Why a volume could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    #[error("it is no directory any more")]
    NoDirectory,
    #[error("it has more than {} entries or {} bytes", .0.entries, .0.bytes)]
    TooLarge(Limits),
    #[error("can't read {path}")]
    Read { path: PathBuf, source: io::Error },
}

/// One step from an old look to a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<'a> {
    /// A directory that is new or has other attributes.
    Directory(&'a Path, Attributes),
    /// A file that is new, or has other contents in the same place.
    Write(&'a Path, Attributes),
    /// A file that took another's place.
    Replace(&'a Path, Attributes),
    Symlink(&'a Path, &'a Path, Attributes),
    Attributes(&'a Path, Attributes),
    Remove(&'a Path),
}

impl Entry {
    fn new(path: &Path, meta: &Metadata) -> io::Result<Option<Self>> {
        let kind = if meta.is_dir() {
            Kind::Directory
        } else if meta.is_file() {
            Kind::File {
                size: meta.len(),
                modified: (meta.mtime(), meta.mtime_nsec()),
            }
        } else if meta.is_symlink() {
            Kind::Symlink(fs::read_link(path)?)
        } else {
            return Ok(None);
        };
        Ok(Some(Self {
            kind,
            attributes: Attributes {
                mode: meta.mode() & 0o7777,
                uid: meta.uid(),
                gid: meta.gid(),
            },
            inode: meta.ino(),
        }))
    }

    fn is_directory(&self) -> bool {
        self.kind == Kind::Directory
    }
}

impl Tree {
    /// Looks at a directory and all below it, not following symlinks. `enter` is called for each directory before it is read.
    pub fn scan(
        root: &Path,
        limits: Limits,
        mut enter: impl FnMut(&Path),
    ) -> Result<Self, ScanError> {
        let mut tree = Self::default();
        let (mut bytes, mut next) = (0, vec![PathBuf::new()]);
        while let Some(below) = next.pop() {
            // `join` would add a slash, through which a symlink in place of the root is followed.
            let path = if below.as_os_str().is_empty() {
                root.to_owned()
            } else {
                root.join(&below)
            };
            let fail = |source| ScanError::Read {
                path: path.clone(),
                source,
            };
            let Some(entry) = present(look(&path)).map_err(fail)?.flatten() else {
                continue;
            };
            if entry.is_directory() {
                enter(&path);
                for child in present(fs::read_dir(&path))
                    .map_err(fail)?
                    .into_iter()
                    .flatten()
                {
                    next.push(below.join(child.map_err(fail)?.file_name()));
                }
            }
            if let Kind::File { size, .. } = entry.kind {
                bytes += size;
            }
            tree.0.insert(below, entry);
            if tree.0.len() + next.len() > limits.entries || bytes > limits.bytes {
                return Err(ScanError::TooLarge(limits));
            }
        }
        match tree.0.first_key_value() {
            Some((_, root)) if root.is_directory() => Ok(tree),
            _ => Err(ScanError::NoDirectory),
        }
    }

    /// The steps from `old` to this one. Whoever looks in between sees what could have been seen on the host: new files come
    /// first, then the symlinks that may point to them, those that were there before the new ones, and what goes goes last.
    pub fn steps_from<'a>(&'a self, old: &'a Self) -> Vec<Step<'a>> {
        let in_the_way = |path: &Path| {
            let changed = |path: &Path| match (old.0.get(path), self.0.get(path)) {
                (Some(before), Some(now)) => before.is_directory() != now.is_directory(),
                _ => false,
            };
            path.ancestors().any(changed)
        };
        let gone = |path: &PathBuf| in_the_way(path) || !self.0.contains_key(path);
        let removed = old.0.keys().rev().filter(|path| gone(path));
        let (first, last): (Vec<_>, Vec<_>) = removed.partition(|path| in_the_way(path));
        let before = |path: &PathBuf| old.0.get(path).filter(|_| !in_the_way(path));

        let mut steps: Vec<Step<'_>> = first.into_iter().map(|path| Step::Remove(path)).collect();
        let (mut swapped, mut added) = (Vec::new(), Vec::new());
        for (path, now) in &self.0 {
            let before = before(path);
            match step(path, before, now) {
                Some(step @ Step::Symlink(..)) if before.is_some() => swapped.push(step),
                Some(step @ Step::Symlink(..)) => added.push(step),
                step => steps.extend(step),
            }
        }
        steps.extend(swapped.into_iter().chain(added));
        steps.extend(last.into_iter().map(|path| Step::Remove(path)));
        steps
    }

    /// Forgets a file, so that the next look finds it new.
    pub fn forget(&mut self, path: &Path) {
        self.0.remove(path);
    }
}

fn step<'a>(path: &'a Path, before: Option<&Entry>, now: &'a Entry) -> Option<Step<'a>> {
    let attributes = now.attributes;
    if before == Some(now) {
        return None;
    }
    let same_file = before.is_some_and(|before| before.inode == now.inode);
    match (before.map(|before| &before.kind), &now.kind) {
        // A directory's inode is of no interest: what is in it is looked at by itself.
        (Some(Kind::Directory), Kind::Directory)
            if before.is_some_and(|before| before.attributes == attributes) =>
        {
            None
        }
        (_, Kind::Directory) => Some(Step::Directory(path, attributes)),
        (_, Kind::Symlink(target)) => Some(Step::Symlink(path, target, attributes)),
        (None, Kind::File { .. }) => Some(Step::Write(path, attributes)),
        (Some(kind), now) if same_file && kind == now => Some(Step::Attributes(path, attributes)),
        (Some(Kind::File { .. }), _) if same_file => Some(Step::Write(path, attributes)),
        _ => Some(Step::Replace(path, attributes)),
    }
}

fn look(path: &Path) -> io::Result<Option<Entry>> {
    Entry::new(path, &fs::symlink_metadata(path)?)
}

/// Nothing where the entry has gone meanwhile.
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(None),
        result => result.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const ROOMY: Limits = Limits {
        entries: 100,
        bytes: 1000,
    };

    fn scan(root: &Path) -> Tree {
        Tree::scan(root, ROOMY, |_| {}).unwrap()
    }

    /// The steps as text, without attributes.
    fn shown(old: &Tree, new: &Tree) -> Vec<String> {
        let show = |step: &Step<'_>| match step {
            Step::Directory(path, _) => format!("directory {}", path.display()),
            Step::Write(path, _) => format!("write {}", path.display()),
            Step::Replace(path, _) => format!("replace {}", path.display()),
            Step::Symlink(path, to, _) => format!("{} -> {}", path.display(), to.display()),
            Step::Attributes(path, _) => format!("attributes {}", path.display()),
            Step::Remove(path) => format!("remove {}", path.display()),
        };
        new.steps_from(old).iter().map(show).collect()
    }

    fn version(root: &Path, name: &str, keys: &[&str]) {
        fs::create_dir(root.join(name)).unwrap();
        for key in keys {
            fs::write(root.join(name).join(key), name).unwrap();
        }
        symlink(name, root.join("..tmp")).unwrap();
        fs::rename(root.join("..tmp"), root.join("..data")).unwrap();
    }

    #[test]
    fn a_config_map_is_swapped_before_its_old_version_goes() {
        let dir = tempfile::tempdir().unwrap();
        version(dir.path(), "..9", &["a", "b"]);
        for key in ["a", "b"] {
            symlink(Path::new("..data").join(key), dir.path().join(key)).unwrap();
        }
        let first = scan(dir.path());
        assert_eq!(
            shown(&Tree::default(), &first),
            [
                "directory ",
                "directory ..9",
                "write ..9/a",
                "write ..9/b",
                "..data -> ..9",
                "a -> ..data/a",
                "b -> ..data/b"
            ]
        );
        version(dir.path(), "..10", &["a", "c"]);
        symlink("..data/c", dir.path().join("c")).unwrap();
        fs::remove_file(dir.path().join("b")).unwrap();
        fs::remove_dir_all(dir.path().join("..9")).unwrap();
        let second = scan(dir.path());
        assert_eq!(
            shown(&first, &second),
            [
                "directory ..10",
                "write ..10/a",
                "write ..10/c",
                "..data -> ..10",
                "c -> ..data/c",
                "remove b",
                "remove ..9/b",
                "remove ..9/a",
                "remove ..9"
            ]
        );
        assert_eq!(shown(&second, &second), [""; 0]);
    }

    #[test]
    fn a_file_is_written_replaced_or_given_attributes() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kept", "written", "replaced", "mode"] {
            fs::write(dir.path().join(name), "old").unwrap();
        }
        let old = scan(dir.path());
        fs::write(dir.path().join("written"), "a new text").unwrap();
        fs::write(dir.path().join("new"), "new").unwrap();
        fs::rename(dir.path().join("new"), dir.path().join("replaced")).unwrap();
        let private = fs::Permissions::from_mode(0o600);
        fs::set_permissions(dir.path().join("mode"), private).unwrap();
        assert_eq!(
            shown(&old, &scan(dir.path())),
            ["attributes mode", "replace replaced", "write written"]
        );
    }

    #[test]
    fn what_is_in_the_way_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/inner"), "").unwrap();
        fs::write(dir.path().join("f"), "").unwrap();
        let old = scan(dir.path());
        fs::remove_dir_all(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d"), "").unwrap();
        fs::remove_file(dir.path().join("f")).unwrap();
        fs::create_dir(dir.path().join("f")).unwrap();
        fs::write(dir.path().join("f/inner"), "").unwrap();
        assert_eq!(
            shown(&old, &scan(dir.path())),
            [
                "remove f",
                "remove d/inner",
                "remove d",
                "write d",
                "directory f",
                "write f/inner"
            ]
        );
    }

    #[test]
    fn a_volume_beyond_the_limits_is_not_looked_at_whole() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "12345").unwrap();
        let refused = |entries, bytes| {
            let limits = Limits { entries, bytes };
            matches!(
                Tree::scan(dir.path(), limits, |_| {}),
                Err(ScanError::TooLarge(_))
            )
        };
        assert!(refused(100, 4) && refused(1, 100) && !refused(2, 5));
    }
}
