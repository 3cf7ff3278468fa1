//! A sandbox: one VM and the containers in it.
//!
//! ```text
//!        first container        agent answered        stop, or the VM died        nothing left on the host
//!   New ─────────────────► Creating ────────► Running ───────────────► Stopping ──────────────────► Stopped{reason}
//!    │                        │ boot failed                                 ▲                              │
//!    │                        └─────────────────────────────────────────────┘                              ▼
//!    └──────────────────── no container came in time ──────────────────────────────────────────────►   Deleted
//! ```
//!
//! Deleted is the end of the supervisor, which takes the sandbox's directory with it.
//!
//! The state is a [`Pod`], owned by one task; everything that wants to see or change it sends that task a closure
//! ([`Sandbox::apply`]). The verbs ([`create`], `verbs`, `end`) are recipes that do the slow work (the boot, agent calls, mounts) between
//! two such transitions, so no slow work ever keeps another caller waiting.

mod api;
pub mod create;
mod end;
mod error;
pub mod events;
mod host_hooks;
mod loop_device;
mod names;
mod pod;
pub mod process;
pub mod rootfs;
mod stand_in;
mod verbs;

pub use error::Error;

use crate::agent::AgentError;
use crate::machine::{Machine, SandboxOptions};
use crate::parked::Parked;
use crate::spec::HostTmpfs;
use crate::state::StateFile;
use coffer_proto::ids::ContainerId;
use events::{SandboxState, TaskEvent};
use host_hooks::ContainerHooks;
use pod::Pod;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// Transitions that wait for their turn; each takes microseconds.
const MAX_WAITING: usize = 64;

/// From a broken connection to the reason why it broke.
const REASON_COMES: Duration = Duration::from_secs(3);

type Transition = Box<dyn FnOnce(&mut Pod) + Send>;

/// The sandbox. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Sandbox {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: SandboxOptions,
    /// Those that came with the first container.
    late_options: OnceLock<SandboxOptions>,
    state: StateFile,
    owner: mpsc::Sender<Transition>,
    /// Set by the boot, taken away when the VM is gone.
    machine: watch::Sender<Option<Arc<Machine>>>,
    /// Follows the pod's state, for those who wait for a change.
    status: watch::Sender<SandboxState>,
    own_network: OnceLock<OwnNetwork>,
    /// What is to run on the host when a container has started and ended.
    hooks: Mutex<BTreeMap<ContainerId, Arc<ContainerHooks>>>,
    /// The pod's network namespace where it came with a process that stands for a container.
    netns: OnceLock<File>,
    /// The host's tmpfs whose part the guest's /dev/shm plays: that of the first container which has one.
    shared_memory: OnceLock<HostTmpfs>,
}

/// The pod's network namespace where nobody made one before the pod.
#[derive(Debug)]
struct OwnNetwork {
    /// It is in the namespace, and its pid stands for the pod.
    process: Parked,
    namespace: File,
}

impl Sandbox {
    /// A sandbox without a VM. Must be called within the runtime.
    pub fn new(
        options: SandboxOptions,
        state: StateFile,
        events: mpsc::UnboundedSender<TaskEvent>,
    ) -> Self {
        let (owner, mut transitions) = mpsc::channel::<Transition>(MAX_WAITING);
        let status = watch::Sender::new(SandboxState::New);
        let published = status.clone();
        tokio::spawn(async move {
            let mut pod = Pod::new(events);
            while let Some(transition) = transitions.recv().await {
                transition(&mut pod);
                published.send_if_modified(|status| {
                    let changed = status != pod.state();
                    if changed {
                        tracing::info!(state = ?pod.state(), "sandbox");
                        status.clone_from(pod.state());
                    }
                    changed
                });
            }
        });
        let machine = watch::Sender::new(None);
        Self {
            shared: Arc::new(Shared {
                options,
                late_options: OnceLock::new(),
                state,
                owner,
                machine,
                status,
                own_network: OnceLock::new(),
                hooks: Mutex::default(),
                netns: OnceLock::new(),
                shared_memory: OnceLock::new(),
            }),
        }
    }

    pub fn options(&self) -> &SandboxOptions {
        self.shared
            .late_options
            .get()
            .unwrap_or(&self.shared.options)
    }

    /// Other options than those it was made with, before there is a VM. Once there is one, nothing changes.
    pub async fn reconfigure(&self, options: SandboxOptions) -> Result<(), Error> {
        let sandbox = self.clone();
        self.apply(move |pod| {
            if *pod.state() == SandboxState::New {
                sandbox
                    .shared
                    .state
                    .update(|state| state.options = options.clone())?;
                // The owner task runs one transition at a time, so this is the first.
                let _ = sandbox.shared.late_options.set(options);
            }
            Ok(())
        })
        .await
    }

    /// One transition of the pod, or a look at it.
    pub async fn apply<T: Send + 'static>(
        &self,
        transition: impl FnOnce(&mut Pod) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (done, result) = oneshot::channel();
        let transition: Transition = Box::new(move |pod| drop(done.send(transition(pod))));
        self.shared
            .owner
            .send(transition)
            .await
            .map_err(|_| Error::Ending)?;
        result.await.map_err(|_| Error::Ending)?
    }

    /// A transition that can't be refused.
    async fn change<T: Send + 'static>(
        &self,
        transition: impl FnOnce(&mut Pod) -> T + Send + 'static,
    ) -> Result<T, Error> {
        self.apply(move |pod| Ok(transition(pod))).await
    }

    /// The machine, once it is there. Waits while another caller boots it.
    async fn machine(&self) -> Result<Arc<Machine>, Error> {
        let mut machine = self.shared.machine.subscribe();
        let mut status = self.shared.status.subscribe();
        tokio::select! {
            machine = machine.wait_for(Option::is_some) => {
                machine.ok().and_then(|machine| machine.clone()).ok_or(Error::Ending)
            }
            ended = status.wait_for(SandboxState::has_ended) => {
                let reason = ended.ok().and_then(|state| state.end_reason().map(str::to_owned));
                Err(reason.map_or(Error::Ending, Error::Stopped))
            }
        }
    }

    /// The better reason for a failure that the VM's death caused, of which the sandbox hears a moment later.
    async fn explain(&self, error: Error) -> Error {
        use crate::io::StdioError::{Connect, Deadline};
        if let Error::Boot(_) = error {
            // A boot that was stopped on purpose fails somewhere.
            let stopped = self.shared.status.borrow().end_reason().map(str::to_owned);
            return stopped.map_or(error, Error::Stopped);
        }
        if !matches!(
            error,
            Error::Agent(AgentError::Broken { .. })
                | Error::Stdio(Connect { .. } | Deadline { .. })
        ) {
            return error;
        }
        let mut status = self.shared.status.subscribe();
        let ended = status.wait_for(SandboxState::has_ended);
        match timeout(REASON_COMES, ended).await {
            Ok(Ok(state)) => state
                .end_reason()
                .map_or(error, |reason| Error::Stopped(reason.to_owned())),
            _ => error,
        }
    }

    /// How long the sandbox has been without a container.
    pub async fn idle(&self) -> Option<Duration> {
        self.change(|pod| pod.idle_since().map(|since| since.elapsed()))
            .await
            .ok()
            .flatten()
    }

    /// Ids of all containers.
    pub async fn containers(&self) -> Vec<ContainerId> {
        self.change(|pod| pod.container_ids())
            .await
            .unwrap_or_default()
    }
}

/// Runs work on file systems of the host, which may be slow or, as NFS, not answer at all, where no other task waits behind it.
async fn on_host<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    // It is given up only where the runtime ends before it begins.
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or(Err(Error::Ending))
}
