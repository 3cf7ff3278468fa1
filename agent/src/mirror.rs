//! Copies of small volumes of the host, in which a change raises the inotify events that it raised on the host.
//!
//! virtio-fs tells the guest nothing of a change that the host makes. The shim watches such volumes on the host and sends each change;
//! made again in a tmpfs of the guest, it is seen by whoever watches there:
//!
//! ```text
//! /run/coffer/mirror/<container>/<mount>/   the copy, bind mounted into the container
//! /run/coffer/mirror/<container>/new        what is about to take the place of something in it
//! ```

use crate::container::beneath;
use coffer_proto::agent::{ChangeMirrorRequest, MirrorChange, mirror_change::Kind};
use coffer_proto::ids::ContainerId;
use coffer_proto::limits::MIRROR_DIR;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// Name of what is about to be moved into a copy.
const NEW: &str = "new";

/// Why a copy was not changed.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    #[error("container {id} has no copy of its mount {mount}")]
    NoCopy { id: ContainerId, mount: u32 },
    #[error("can't make {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("can't remove {path}")]
    Remove { path: PathBuf, source: io::Error },
    #[error("can't change {path:?} in the copy of mount {mount}")]
    Change {
        path: PathBuf,
        mount: u32,
        source: io::Error,
    },
}

/// Makes the changes in their order. After an error those before it are made.
pub fn change(id: &ContainerId, request: &ChangeMirrorRequest) -> Result<(), MirrorError> {
    change_below(Path::new(MIRROR_DIR), id, request)
}

/// Removes all copies of a container.
pub fn remove(id: &ContainerId) -> Result<(), MirrorError> {
    let path = Path::new(MIRROR_DIR).join(id);
    match fs::remove_dir_all(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(MirrorError::Remove { path, source })
        }
        _ => Ok(()),
    }
}

fn change_below(
    dir: &Path,
    id: &ContainerId,
    request: &ChangeMirrorRequest,
) -> Result<(), MirrorError> {
    let mount = request.mount;
    let (staging, root) = (dir.join(id), dir.join(id).join(mount.to_string()));
    if request.create {
        fs::create_dir_all(&root).map_err(|source| MirrorError::Create {
            path: root.clone(),
            source,
        })?;
    }
    let open = |path: &Path| File::open(path).map(OwnedFd::from);
    let copy = open(&staging).and_then(|staging| {
        Ok(VolumeCopy {
            staging,
            root: open(&root)?,
        })
    });
    let copy = copy.map_err(|_| MirrorError::NoCopy {
        id: id.clone(),
        mount,
    })?;
    for change in &request.changes {
        let path = Path::new(OsStr::from_bytes(&change.path));
        copy.apply(path, change)
            .map_err(|source| MirrorError::Change {
                path: path.to_owned(),
                mount,
                source,
            })?;
    }
    Ok(())
}

/// One volume's copy. The container may have any access to it, so names in it are resolved without symlinks.
struct VolumeCopy {
    root: OwnedFd,
    /// On the same file system, but out of the container's sight.
    staging: OwnedFd,
}

impl VolumeCopy {
    fn apply(&self, path: &Path, change: &MirrorChange) -> io::Result<()> {
        let Some(name) = path.file_name() else {
            let is_root = path.as_os_str().is_empty();
            let root = is_root.then_some(&self.root).ok_or(Errno::EINVAL)?;
            return Ok(own(root.as_fd(), change)?);
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let parent = beneath(
            self.root.as_fd(),
            parent,
            OFlag::O_PATH | OFlag::O_DIRECTORY,
        )?;
        let (parent, target) = (parent.as_fd(), Path::new(name));
        match change.kind.as_ref().ok_or(Errno::EINVAL)? {
            Kind::Directory(_) => {
                match mkdirat(parent, target, Mode::S_IRWXU) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                own(beneath(parent, target, OFlag::O_DIRECTORY)?.as_fd(), change)?;
            }
            Kind::Write(contents) => write(parent, target, contents, change)?,
            Kind::Replace(contents) => {
                self.clear_staging()?;
                write(self.staging.as_fd(), Path::new(NEW), contents, change)?;
                renameat(&self.staging, NEW, parent, target)?;
            }
            Kind::Symlink(to) => self.symlink(OsStr::from_bytes(to), parent, target, change)?,
            Kind::Attributes(_) => {
                own(
                    beneath(parent, target, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?.as_fd(),
                    change,
                )?;
            }
            Kind::Removed(_) => remove_at(parent, target)?,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        }
        Ok(())
    }

    fn symlink(
        &self,
        to: &OsStr,
        parent: BorrowedFd<'_>,
        name: &Path,
        change: &MirrorChange,
    ) -> nix::Result<()> {
        let own = |dir, name: &Path| {
            let (uid, gid) = owner(change);
            fchownat(dir, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)
        };
        match symlinkat(to, parent, name) {
            Err(Errno::EEXIST) => {}
            Ok(()) => return own(parent, name),
            Err(error) => return Err(error),
        }
        self.clear_staging()?;
        symlinkat(to, &self.staging, NEW)?;
        own(self.staging.as_fd(), Path::new(NEW))?;
        renameat(&self.staging, NEW, parent, name)
    }

    /// An attempt that failed may have left something.
    fn clear_staging(&self) -> nix::Result<()> {
        remove_at(self.staging.as_fd(), Path::new(NEW))
    }
}

/// What is gone already is no error.
fn remove_at(parent: BorrowedFd<'_>, name: &Path) -> nix::Result<()> {
    let removed = match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR) => unlinkat(parent, name, UnlinkatFlags::RemoveDir),
        removed => removed,
    };
    match removed {
        Err(Errno::ENOENT) => Ok(()),
        removed => removed,
    }
}

fn write(
    parent: BorrowedFd<'_>,
    name: &Path,
    contents: &[u8],
    change: &MirrorChange,
) -> io::Result<()> {
    let flags = OFlag::O_WRONLY
        | OFlag::O_CREAT
        | OFlag::O_TRUNC
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_CLOEXEC;
    let mut file = File::from(openat(parent, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
    file.write_all(contents)?;
    Ok(own(file.as_fd(), change)?)
}

fn owner(change: &MirrorChange) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(change.uid)),
        Some(Gid::from_raw(change.gid)),
    )
}

fn own(file: BorrowedFd<'_>, change: &MirrorChange) -> nix::Result<()> {
    let (uid, gid) = owner(change);
    fchown(file, uid, gid)?;
    // After the owner, whose change takes the set-id bits away.
    fchmod(file, Mode::from_bits_truncate(change.mode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_proto::agent::Empty;
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    use std::os::unix::fs::PermissionsExt as _;

    fn step(path: &str, kind: Kind) -> MirrorChange {
        MirrorChange {
            path: path.into(),
            kind: Some(kind),
            mode: 0o750,
            ..Default::default()
        }
    }

    fn apply(dir: &Path, create: bool, changes: Vec<MirrorChange>) -> Result<(), MirrorError> {
        let request = ChangeMirrorRequest {
            mount: 3,
            create,
            changes,
            ..Default::default()
        };
        change_below(dir, &ContainerId::new("c").unwrap(), &request)
    }

    fn directory() -> Kind {
        Kind::Directory(Empty::new())
    }

    fn removed() -> Kind {
        Kind::Removed(Empty::new())
    }

    /// The way in which kubelet updates a configMap.
    fn version(n: u8) -> Vec<MirrorChange> {
        vec![
            step(&format!("..{n}"), directory()),
            step(&format!("..{n}/key"), Kind::Write(vec![b'0' + n])),
            step("..data", Kind::Symlink(format!("..{n}").into())),
        ]
    }

    #[test]
    fn an_update_arrives_whole_and_raises_its_events_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let link = step("key", Kind::Symlink(b"..data/key".to_vec()));
        apply(dir.path(), true, [version(1), vec![link]].concat()).unwrap();
        let copy = dir.path().join("c/3");
        assert_eq!(fs::read_to_string(copy.join("key")).unwrap(), "1");
        let mode = fs::metadata(copy.join("key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o750);

        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        inotify
            .add_watch(&copy, AddWatchFlags::IN_ALL_EVENTS)
            .unwrap();
        let old = [step("..1/key", removed()), step("..1", removed())];
        apply(dir.path(), false, [&version(2)[..], &old[..]].concat()).unwrap();
        assert_eq!(fs::read_to_string(copy.join("key")).unwrap(), "2");
        let seen: Vec<_> = inotify.read_events().unwrap();
        let named = |flag: AddWatchFlags, name: &str| {
            let is = |e: &nix::sys::inotify::InotifyEvent| {
                e.mask.contains(flag) && e.name.as_deref() == Some(name.as_ref())
            };
            seen.iter().position(is)
        };
        let created = named(AddWatchFlags::IN_CREATE, "..2");
        let swapped = named(AddWatchFlags::IN_MOVED_TO, "..data");
        let deleted = named(AddWatchFlags::IN_DELETE, "..1");
        assert!(
            created.is_some() && created < swapped && swapped < deleted,
            "{seen:?}"
        );
        assert!(seen.iter().all(|e| e.name.as_deref() != Some(NEW.as_ref())));
    }

    #[test]
    fn a_file_is_written_or_replaced_as_it_was_on_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let write = |text: &str| step("f", Kind::Write(text.into()));
        apply(dir.path(), true, vec![write("a longer text")]).unwrap();
        let path = dir.path().join("c/3/f");
        let open = File::open(&path).unwrap();
        apply(dir.path(), false, vec![write("short")]).unwrap();
        assert_eq!(io::read_to_string(&open).unwrap(), "short");
        let replaced = step("f", Kind::Replace(b"another".to_vec()));
        apply(dir.path(), false, vec![replaced]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "another");
        let gone = || vec![step("f", removed())];
        apply(dir.path(), false, gone()).unwrap();
        apply(dir.path(), false, gone()).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn no_path_leads_out_of_the_copy() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let link = step(
            "link",
            Kind::Symlink(outside.as_os_str().as_bytes().to_vec()),
        );
        apply(dir.path(), true, vec![link]).unwrap();
        for path in ["link/f", "../f", "../../outside/f", "/f", "..", "/"] {
            let result = apply(dir.path(), false, vec![step(path, Kind::Write(vec![1]))]);
            assert!(
                matches!(result, Err(MirrorError::Change { .. })),
                "{path}: {result:?}"
            );
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn a_change_that_comes_late_brings_nothing_back() {
        let dir = tempfile::tempdir().unwrap();
        let late = apply(dir.path(), false, version(1));
        assert!(matches!(late, Err(MirrorError::NoCopy { .. })), "{late:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
