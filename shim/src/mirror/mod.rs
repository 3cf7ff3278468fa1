//! Small volumes of the host of which the guest gets a copy, so that changes raise inotify events there.
//!
//! virtio-fs tells the guest nothing when the host changes a file. Programs that wait for that watch configuration, which Kubernetes
//! brings as volumes of four kinds (configMap, secret, projected, downwardAPI): small directories, read-only for the container, in
//! which kubelet swaps a symlink. These are not shared but mirrored:
//!
//! ```text
//! kubelet ──► volume on the host ── inotify ──► look at it, compare ── ChangeMirror ──► tmpfs of the guest
//!                                                                      in order          real events
//! ```
//!
//! An event only says that it is time to look; what is sent are the steps from the last look to this one ([`tree`]). So nothing
//! is lost when the event queue overflows, and where the host has no inotify instance left, looking now and then does as well.

mod follower;
mod tree;

use crate::agent::{Agent, AgentError};
use coffer_proto::agent::{Empty, MirrorChange, mirror_change::Kind};
use coffer_proto::ids::ContainerId;
use follower::Follower;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use tree::{Attributes, Limits, ScanError, Step, Tree};

/// A volume up to this is mirrored. Kubernetes has 1 MiB as the limit of a configMap or secret; a projected volume may
/// have several. The copy is memory of the guest.
const MAX_VOLUME: Limits = Limits {
    entries: 1024,
    bytes: 4 << 20,
};
/// One that is mirrored may grow up to this: while kubelet updates it, the old contents are there beside the new.
const MAX_GROWN: Limits = Limits {
    entries: 3 * MAX_VOLUME.entries,
    bytes: 3 * MAX_VOLUME.bytes,
};
/// Most of a file that is sent; more does not fit into a message.
const MAX_FILE: u64 = 3 << 20;
/// Contents that are sent with one message, if more than one file is in it.
const BATCH_BYTES: usize = 1 << 20;
/// Steps in one message: with paths of common length, far below its limit.
const BATCH_STEPS: usize = 256;

/// Directories below kubelet's `pods/<uid>/volumes/`, by the plugin that made the volume.
const MIRRORED_PLUGINS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// Why a volume is not mirrored.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    #[error("can't mirror the volume {path}")]
    Scan { path: PathBuf, source: ScanError },
    #[error("can't read {path} to mirror it")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} has more than {MAX_FILE} bytes, which is too much to mirror it")]
    FileTooLarge { path: PathBuf },
    #[error("the volume {path} did not reach the guest")]
    Agent { path: PathBuf, source: AgentError },
}

/// Whether a volume that the container may only read is mirrored: one of kubelet's that is small enough.
pub fn is_for(volume: &Path) -> bool {
    let plugin = volume.parent().and_then(Path::file_name);
    let of_kubelet = MIRRORED_PLUGINS
        .iter()
        .any(|name| plugin == Some(name.as_ref()))
        && volume
            .parent()
            .and_then(Path::parent)
            .is_some_and(|dir| dir.ends_with("volumes"));
    if !of_kubelet {
        return false;
    }
    match Tree::scan(volume, MAX_VOLUME, |_| {}) {
        Ok(_) => true,
        Err(error) => {
            tracing::info!(volume = %volume.display(), %error, "shared without inotify events");
            false
        }
    }
}

/// The mirrored volumes of a sandbox. They are followed until this is dropped.
#[derive(Debug, Default)]
pub struct Mirrors(Follower);

impl Mirrors {
    /// Copies a volume into the guest, as mount number `index` of a container, and follows its changes.
    pub async fn add(
        &self,
        agent: &Agent,
        container: &ContainerId,
        index: usize,
        source: &Path,
    ) -> Result<(), MirrorError> {
        let volume = Volume {
            container: container.clone(),
            mount: u32::try_from(index).unwrap_or(u32::MAX),
            source: source.to_owned(),
            sent: None,
        };
        self.0.add(volume, agent).await
    }

    /// The container is gone, and its copies with it.
    pub async fn remove_container(&self, id: &ContainerId) {
        self.0.remove_container(id).await;
    }
}

/// One volume, and what the guest has of it.
#[derive(Debug)]
struct Volume {
    container: ContainerId,
    mount: u32,
    source: PathBuf,
    /// None until the guest has got something.
    sent: Option<Tree>,
}

impl Volume {
    /// Brings the guest's copy to what the volume is now. `enter` is called for each directory before it is read.
    async fn refresh(
        &mut self,
        agent: &Agent,
        enter: impl FnMut(&Path),
    ) -> Result<(), MirrorError> {
        let mut now =
            Tree::scan(&self.source, MAX_GROWN, enter).map_err(|source| MirrorError::Scan {
                path: self.source.clone(),
                source,
            })?;
        let empty = Tree::default();
        let steps = now.steps_from(self.sent.as_ref().unwrap_or(&empty));
        let mut create = self.sent.is_none();
        let (mut batch, mut bytes, mut vanished) = (Vec::new(), 0, Vec::new());
        for step in &steps {
            let Some((change, size)) = self.change(step)? else {
                vanished.push(step.path().to_owned());
                continue;
            };
            if !batch.is_empty() && (bytes + size > BATCH_BYTES || batch.len() == BATCH_STEPS) {
                self.send(agent, create, std::mem::take(&mut batch)).await?;
                (create, bytes) = (false, 0);
            }
            batch.push(change);
            bytes += size;
        }
        if !batch.is_empty() {
            self.send(agent, create, batch).await?;
        }
        for path in vanished {
            now.forget(&path);
        }
        self.sent = Some(now);
        Ok(())
    }

    async fn send(
        &self,
        agent: &Agent,
        create: bool,
        changes: Vec<MirrorChange>,
    ) -> Result<(), MirrorError> {
        let sent = agent.change_mirror(&self.container, self.mount, create, changes);
        sent.await.map_err(|source| MirrorError::Agent {
            path: self.source.clone(),
            source,
        })
    }

    /// The step as the agent is told of it, and the bytes of its contents. None: the file has gone meanwhile.
    fn change(&self, step: &Step<'_>) -> Result<Option<(MirrorChange, usize)>, MirrorError> {
        let kind = match step {
            Step::Directory(..) => Kind::Directory(Empty::new()),
            Step::Attributes(..) => Kind::Attributes(Empty::new()),
            Step::Remove(_) => Kind::Removed(Empty::new()),
            Step::Symlink(_, target, _) => Kind::Symlink(target.as_os_str().as_bytes().to_vec()),
            Step::Write(path, _) | Step::Replace(path, _) => {
                let Some(contents) = self.contents(path)? else {
                    return Ok(None);
                };
                match step {
                    Step::Write(..) => Kind::Write(contents),
                    _ => Kind::Replace(contents),
                }
            }
        };
        let size = match &kind {
            Kind::Write(contents) | Kind::Replace(contents) => contents.len(),
            _ => 0,
        };
        let attributes = step.attributes();
        let change = MirrorChange {
            path: step.path().as_os_str().as_bytes().to_vec(),
            kind: Some(kind),
            mode: attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            ..Default::default()
        };
        Ok(Some((change, size)))
    }

    fn contents(&self, path: &Path) -> Result<Option<Vec<u8>>, MirrorError> {
        let path = self.source.join(path);
        let read = || -> io::Result<Vec<u8>> {
            let mut options = fs::OpenOptions::new();
            let file = options
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)?;
            let mut contents = Vec::new();
            file.take(MAX_FILE + 1).read_to_end(&mut contents)?;
            Ok(contents)
        };
        match read() {
            Ok(contents) if contents.len() as u64 > MAX_FILE => {
                Err(MirrorError::FileTooLarge { path })
            }
            Ok(contents) => Ok(Some(contents)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(MirrorError::Read { path, source }),
        }
    }
}

impl Step<'_> {
    fn path(&self) -> &Path {
        match self {
            Self::Directory(path, _)
            | Self::Write(path, _)
            | Self::Replace(path, _)
            | Self::Symlink(path, _, _)
            | Self::Attributes(path, _)
            | Self::Remove(path) => path,
        }
    }

    fn attributes(&self) -> Attributes {
        match self {
            Self::Directory(_, attributes)
            | Self::Write(_, attributes)
            | Self::Replace(_, attributes)
            | Self::Symlink(_, _, attributes)
            | Self::Attributes(_, attributes) => *attributes,
            Self::Remove(_) => Attributes::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_small_volumes_of_kubelet_are_mirrored() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        assert!(is_for(&make("volumes/kubernetes.io~configmap/app")));
        assert!(is_for(&make("volumes/kubernetes.io~projected/token")));
        assert!(!is_for(&make("volumes/kubernetes.io~empty-dir/cache")));
        assert!(!is_for(&make("kubernetes.io~secret/mine")));
        assert!(!is_for(&make("volumes/kubernetes.io~secret/deep/below")));
        let large = make("volumes/kubernetes.io~secret/large");
        fs::write(large.join("f"), vec![0; 5 << 20]).unwrap();
        assert!(!is_for(&large));
    }
}
