//! Which volumes are in the share, and for whom.
//!
//! Two containers of a pod that have the same volume in the same way have one mount of it, so in the guest it is one file system: what
//! one writes the other sees at once, and file locks reach from one to the other.

use super::{IdMap, ShareError, mounts_below};
use coffer_proto::ids::ContainerId;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The volumes of a sandbox.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    /// How many there have been. A number is never used again: the guest may remember what was there.
    made: u64,
    held: Vec<Volume>,
}

#[derive(Debug)]
struct Volume {
    number: u64,
    content: Content,
    users: BTreeSet<ContainerId>,
}

/// What a volume is. Equal ones can be one mount.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Content {
    path: PathBuf,
    /// Of the file or directory: the path may have led elsewhere before.
    device: u64,
    inode: u64,
    /// Mounts below it, which belong to it.
    below: Vec<PathBuf>,
    read_only: bool,
    idmap: Option<IdMap>,
}

impl Content {
    pub(super) fn of(
        path: &Path,
        opened: &File,
        read_only: bool,
        idmap: Option<&IdMap>,
    ) -> Result<Self, ShareError> {
        let fail = |source| ShareError::Open {
            path: path.to_owned(),
            source,
        };
        let meta = opened.metadata().map_err(fail)?;
        let path = fs::canonicalize(path).map_err(fail)?;
        Ok(Self {
            below: mounts_below(&path)?,
            device: meta.dev(),
            inode: meta.ino(),
            path,
            read_only,
            idmap: idmap.cloned(),
        })
    }
}

impl Volumes {
    /// Lets a container have a volume that is there already; gives its number.
    pub(super) fn join(&mut self, content: &Content, id: &ContainerId) -> Option<u64> {
        let volume = self.held.iter_mut().find(|v| v.content == *content)?;
        volume.users.insert(id.clone());
        Some(volume.number)
    }

    /// A number for the next one.
    pub(super) fn next(&mut self) -> u64 {
        self.made += 1;
        self.made
    }

    /// Takes note of a new one.
    pub(super) fn add(&mut self, number: u64, content: Content, id: &ContainerId) {
        self.held.push(Volume {
            number,
            content,
            users: BTreeSet::from([id.clone()]),
        });
    }

    /// Forgets a container; gives the numbers of the volumes that nobody has any more.
    pub(super) fn leave(&mut self, id: &ContainerId) -> Vec<u64> {
        let mut unused = Vec::new();
        self.held.retain_mut(|volume| {
            let stays = !volume.users.remove(id) || !volume.users.is_empty();
            if !stays {
                unused.push(volume.number);
            }
            stays
        });
        unused
    }
}
