//! Looks at the mirrored volumes whenever something in them has changed.

use super::{MirrorError, Volume};
use crate::agent::{Agent, AgentError};
use coffer_proto::error_chain::chain;
use coffer_proto::ids::ContainerId;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Whoever changes a volume makes several steps; it is looked at when they pause.
const QUIET: Duration = Duration::from_millis(50);
/// One who never pauses is not waited for longer than this.
const BUSY: Duration = Duration::from_secs(1);
/// How often a look is taken where the user has no inotify instance left (fs.inotify.max_user_instances).
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

const CHANGES: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_ONLYDIR)
    .union(AddWatchFlags::IN_DONT_FOLLOW);

/// One task and at most one inotify instance for all volumes of a sandbox: a user has only 128 of them by default.
#[derive(Debug, Default)]
pub(super) struct Follower {
    volumes: Arc<Mutex<Followed>>,
    task: std::sync::Mutex<JoinSet<()>>,
}

#[derive(Debug, Default)]
struct Followed {
    volumes: Vec<Volume>,
    watch: Option<Arc<Watch>>,
}

impl Follower {
    pub(super) async fn add(&self, mut volume: Volume, agent: &Agent) -> Result<(), MirrorError> {
        let mut followed = self.volumes.lock().await;
        let start = followed.volumes.is_empty() && followed.watch.is_none();
        if start {
            followed.watch = Watch::new()
                .inspect_err(|error| tracing::warn!(%error, "mirrored volumes are looked at every {LOOK_INTERVAL:?}, for want of inotify"))
                .ok()
                .map(Arc::new);
        }
        volume
            .refresh(agent, watching(followed.watch.as_deref()))
            .await?;
        followed.volumes.push(volume);
        let mut task = self
            .task
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if task.is_empty() {
            let watch = followed.watch.clone();
            task.spawn(follow(self.volumes.clone(), watch, agent.clone()));
        }
        Ok(())
    }

    pub(super) async fn remove_container(&self, id: &ContainerId) {
        let mut followed = self.volumes.lock().await;
        followed.volumes.retain(|volume| volume.container != *id);
    }
}

async fn follow(followed: Arc<Mutex<Followed>>, watch: Option<Arc<Watch>>, agent: Agent) {
    loop {
        match &watch {
            Some(watch) => watch.changed().await,
            None => sleep(LOOK_INTERVAL).await,
        }
        let mut followed = followed.lock().await;
        let mut kept = Vec::new();
        for mut volume in std::mem::take(&mut followed.volumes) {
            let refreshed = volume.refresh(&agent, watching(watch.as_deref())).await;
            match refreshed {
                Ok(()) => {}
                // The VM is gone; of that the sandbox hears by itself.
                Err(MirrorError::Agent {
                    source: AgentError::Broken { .. },
                    ..
                }) => return,
                // It is sent again with the next change.
                Err(error) => tracing::warn!(
                    error = chain(&error),
                    "a change of a volume did not reach the guest"
                ),
            }
            kept.push(volume);
        }
        followed.volumes = kept;
    }
}

/// Has a directory watched before it is read, so that no change falls between.
fn watching(watch: Option<&Watch>) -> impl FnMut(&Path) {
    move |directory| {
        if let Some(Err(error)) =
            watch.map(|watch| watch.0.get_ref().0.add_watch(directory, CHANGES))
            && error != Errno::ENOENT
        {
            tracing::warn!(directory = %directory.display(), error = error.desc(), "can't watch a directory of a mirrored volume");
        }
    }
}

/// The sandbox's inotify instance.
#[derive(Debug)]
struct Watch(AsyncFd<Instance>);

#[derive(Debug)]
struct Instance(Inotify);

impl AsRawFd for Instance {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    #[allow(unsafe_code)]
    fn new() -> io::Result<Self> {
        let instance = Instance(Inotify::init(
            InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC,
        )?);
        // SAFETY: the instance owns its descriptor, which is the same and open for as long as it lives.
        Ok(Self(unsafe { AsyncFd::register(instance) }?))
    }

    /// Waits for a change and then for the pause after it.
    async fn changed(&self) {
        self.events().await;
        let _ = timeout(BUSY, async {
            while timeout(QUIET, self.events()).await.is_ok() {}
        })
        .await;
    }

    /// Waits for events and takes them all. What they say does not matter.
    async fn events(&self) {
        while let Ok(mut ready) = self.0.readable().await {
            let read = ready.try_io(|instance| Ok(instance.get_ref().0.read_events()?));
            if matches!(read, Ok(Ok(_))) {
                return;
            }
        }
    }
}
