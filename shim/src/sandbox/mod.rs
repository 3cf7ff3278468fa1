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
//! ([`Sandbox::apply`]). The verbs below are recipes that do the slow work (the boot, agent calls, mounts) between
//! two such transitions, so no slow work ever keeps another caller waiting.

pub mod create;
pub mod error;
pub mod pod;
pub mod process;
pub mod rootfs;

pub use error::Error;

use crate::agent::{AgentError, Ended};
use crate::cleanup;
use crate::machine::{Machine, Notice, SandboxOptions};
use crate::state::{ExitRecord, StateFile, Status};
use crate::vmm::chain;
use coffer_proto::agent::{Process as GuestProcess, StatContainerResponse};
use coffer_proto::ids::ContainerId;
use pod::{Description, Pod, SandboxState, TaskEvent};
use process::{Exit, ProcessKey, ProcessState};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// Transitions that wait for their turn; each takes microseconds.
const MAX_WAITING: usize = 64;
/// After init's end the execs end too, by the PID namespace; then they are counted as killed.
const EXECS_END: Duration = Duration::from_secs(2);
/// What a process wrote before its end is passed on before the end is told, if a reader takes it this fast.
const DRAIN_BEFORE_EXIT: Duration = Duration::from_millis(500);
/// A reader that is still there when the process is deleted gets this long for the rest.
const DRAIN_BEFORE_DELETE: Duration = Duration::from_secs(2);
/// From a SIGKILL that the agent took to the end of the process.
const KILL_TAKES: Duration = Duration::from_secs(5);

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
    state: StateFile,
    owner: mpsc::Sender<Transition>,
    /// Set by the boot, taken away when the VM is gone.
    machine: watch::Sender<Option<Arc<Machine>>>,
    /// Follows the pod's state, for those who wait for a change.
    status: watch::Sender<SandboxState>,
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
                state,
                owner,
                machine,
                status,
            }),
        }
    }

    pub fn options(&self) -> &SandboxOptions {
        &self.shared.options
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

    // Verbs.

    /// Lets a created process run; gives the pid that stands for it.
    pub async fn start(&self, key: ProcessKey) -> Result<u32, Error> {
        let machine = self.machine().await?;
        let starting = key.clone();
        self.apply(move |pod| pod.begin_start(&starting)).await?;
        if key.exec.is_none()
            && let Err(cause) = machine.follow_network().await
        {
            return Err(self.start_failed(key, Error::Network(cause)).await);
        }
        if let Err(error) = machine.agent.start_process(&key).await {
            let error = self.explain(error.into()).await;
            return Err(self.start_failed(key, error).await);
        }
        if key.exec.is_some() {
            self.watch_process(&machine, key.clone());
        }
        self.apply(move |pod| pod.started(&key)).await
    }

    async fn start_failed(&self, key: ProcessKey, error: Error) -> Error {
        let exit = Exit {
            status: 255,
            at: SystemTime::now(),
            reason: Some(chain(&error)),
            oom_killed: false,
        };
        let _ = self.change(move |pod| pod.start_failed(&key, exit)).await;
        error
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

    /// Waits for the end of a process. Any number of callers, at any time until it is deleted.
    pub async fn wait(&self, key: ProcessKey) -> Result<Exit, Error> {
        let mut exit = self
            .apply(move |pod| Ok(pod.process(&key)?.waiter()))
            .await?;
        let exit = exit
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Error::Ending)?;
        exit.clone().ok_or(Error::Ending)
    }

    /// Sends a signal. SIGKILL to an init that the guest can't deliver ends the VM.
    pub async fn kill(&self, key: ProcessKey, signal: u32, all: bool) -> Result<(), Error> {
        if signal > 64 {
            return Err(Error::Signal(signal));
        }
        let target = key.clone();
        self.apply(move |pod| pod.check_signal(&target)).await?;
        if signal == 0 {
            return Ok(());
        }
        let machine = self.machine().await?;
        let deadly = signal == libc::SIGKILL.unsigned_abs() && key.exec.is_none();
        match machine.agent.signal_process(&key, signal, all).await {
            Ok(()) => {}
            Err(AgentError::Refused {
                code: ttrpc::Code::NOT_FOUND,
                ..
            }) => return Err(Error::Finished(key)),
            Err(AgentError::Deadline { .. }) if deadly => {
                tracing::warn!(%key, "the agent did not take a SIGKILL in time, the VM is ended");
                self.fail(&machine, "the agent did not deliver a SIGKILL in time")
                    .await;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        if deadly {
            self.enforce_kill(machine, key);
        }
        Ok(())
    }

    /// A killed init that does not end, in a pod where nothing else runs, takes the VM with it.
    fn enforce_kill(&self, machine: Arc<Machine>, key: ProcessKey) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            let takes = KILL_TAKES * sandbox.options().hypervisor.slowness();
            if timeout(takes, sandbox.wait(key)).await.is_ok() {
                return;
            }
            if sandbox
                .change(|pod| pod.live_containers())
                .await
                .is_ok_and(|live| live == 1)
            {
                sandbox
                    .fail(&machine, "a killed container did not end in time")
                    .await;
            }
        });
    }

    /// Deletes a process that has ended or never ran; gives its end. With the last container the VM goes too.
    pub async fn delete(&self, key: ProcessKey) -> Result<(u32, Exit), Error> {
        let target = key.clone();
        let io = self.apply(move |pod| pod.begin_delete(&target)).await?;
        let machine = self.shared.machine.borrow().clone();
        if let Some(machine) = &machine
            && let Err(error) = machine.agent.delete_process(&key).await
        {
            // The guest may be dead; what the host has of the container goes all the same.
            tracing::warn!(%key, error = chain(&error), "the agent did not delete");
        }
        if let Some(io) = io {
            let _ = timeout(DRAIN_BEFORE_DELETE, io.drained()).await;
        }
        if key.exec.is_none() {
            self.remove_from_host(&key.container, machine.as_deref());
        }
        let (deleted, is_exec) = (key.clone(), key.exec.is_some());
        let (end, empty) = self
            .apply(move |pod| Ok((pod.deleted(&deleted)?, pod.is_empty())))
            .await?;
        if empty && !is_exec {
            let sandbox = self.clone();
            tokio::spawn(async move { sandbox.stop("its last container was deleted").await });
        }
        Ok(end)
    }

    /// Freezes a container.
    pub async fn pause(&self, id: ContainerId) -> Result<(), Error> {
        let key = ProcessKey::init(id.clone());
        self.apply(move |pod| pod.expect_state(&key, ProcessState::Running, "pause"))
            .await?;
        self.machine().await?.agent.pause_container(&id).await?;
        self.apply(move |pod| pod.paused(&id)).await
    }

    /// Thaws a container.
    pub async fn resume(&self, id: ContainerId) -> Result<(), Error> {
        let key = ProcessKey::init(id.clone());
        self.apply(move |pod| pod.expect_state(&key, ProcessState::Paused, "resume"))
            .await?;
        self.machine().await?.agent.resume_container(&id).await?;
        self.apply(move |pod| pod.resumed(&id)).await
    }

    /// Sets the size of a terminal. One that has just gone is no error.
    pub async fn resize(&self, key: ProcessKey, rows: u32, columns: u32) -> Result<(), Error> {
        let target = key.clone();
        let state = self
            .apply(move |pod| Ok(pod.process(&target)?.state()))
            .await?;
        if matches!(state, ProcessState::Creating | ProcessState::Stopped) {
            return Ok(());
        }
        match self
            .machine()
            .await?
            .agent
            .resize_terminal(&key, rows, columns)
            .await
        {
            Err(AgentError::Refused {
                code: ttrpc::Code::NOT_FOUND,
                ..
            }) => Ok(()),
            other => Ok(other?),
        }
    }

    /// No more input for a process. May be repeated.
    pub async fn close_stdin(&self, key: ProcessKey) -> Result<(), Error> {
        self.apply(move |pod| {
            if let Some(io) = &mut pod.process_mut(&key)?.io {
                io.close_stdin();
            }
            Ok(())
        })
        .await
    }

    /// Applies OCI resources to a container in the guest.
    pub async fn update(&self, id: ContainerId, resources: Vec<u8>) -> Result<(), Error> {
        let target = id.clone();
        self.apply(move |pod| pod.container(&target).map(|_| ()))
            .await?;
        Ok(self
            .machine()
            .await?
            .agent
            .update_container(&id, resources)
            .await?)
    }

    /// The container's figures, from the guest's cgroup.
    pub async fn stats(&self, id: ContainerId) -> Result<StatContainerResponse, Error> {
        let target = id.clone();
        self.apply(move |pod| pod.container(&target).map(|_| ()))
            .await?;
        Ok(self.machine().await?.agent.stat_container(&id).await?)
    }

    /// The guest's processes of a container.
    pub async fn processes(&self, id: ContainerId) -> Result<Vec<GuestProcess>, Error> {
        let target = id.clone();
        self.apply(move |pod| pod.container(&target).map(|_| ()))
            .await?;
        Ok(self.machine().await?.agent.list_processes(&id).await?)
    }

    /// What is known of a process; never waits for the guest.
    pub async fn describe(&self, key: ProcessKey) -> Result<Description, Error> {
        self.apply(move |pod| pod.describe(&key)).await
    }

    // The end.

    /// Ends the VM in order and frees what the sandbox has on the host. Returns when that is done, whoever began it.
    pub async fn stop(&self, reason: &'static str) {
        let began = self
            .change(move |pod| pod.begin_stop(reason))
            .await
            .unwrap_or(false);
        let machine = self.shared.machine.borrow().clone();
        match machine {
            // The watch over the machine sees its end and does the rest.
            Some(machine) if began => machine.shut_down().await,
            // No VM, or a boot under way, which fails when its processes end.
            None if began => self.finish(reason.to_owned()).await,
            _ => {}
        }
        let mut status = self.shared.status.subscribe();
        let _ = status
            .wait_for(|state| matches!(state, SandboxState::Stopped { .. }))
            .await;
    }

    /// Ends the VM at once, for a reason that every container is then told.
    async fn fail(&self, machine: &Machine, reason: &'static str) {
        let _ = self.change(move |pod| pod.begin_stop(reason)).await;
        machine.kill().await;
    }

    /// Watches over a machine until it is gone.
    fn watch_machine(&self, machine: Arc<Machine>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            let reason = loop {
                match machine.notice().await {
                    Notice::OutOfMemory(id) => {
                        tracing::warn!(container = %id, "out of memory");
                        let _ = sandbox.change(move |pod| pod.out_of_memory(&id)).await;
                    }
                    Notice::Gone(reason) => break reason,
                }
            };
            tracing::info!(reason, "the VM is gone");
            sandbox.finish(reason).await;
        });
    }

    /// The VM is gone or never was: tells every container and frees the host.
    async fn finish(&self, reason: String) {
        let Ok(reason) = self.change(move |pod| pod.vm_gone(&reason)).await else {
            return;
        };
        self.shared.machine.send_replace(None);
        self.record_death(&reason);
        let owned = self.shared.state.get();
        match tokio::task::spawn_blocking(move || cleanup::release(&owned)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(error = chain(&error), "something of the sandbox is left");
            }
            Err(error) => tracing::error!(%error, "the cleanup crashed"),
        }
        let _ = self.change(Pod::stopped).await;
    }

    fn record_death(&self, reason: &str) {
        let exit = ExitRecord {
            status: process::VM_DIED,
            at: SystemTime::now(),
            reason: Some(reason.to_owned()),
            oom_killed: false,
        };
        self.record(|state| {
            state.status = Status::Stopped {
                reason: reason.to_owned(),
            };
            for container in state.containers.values_mut() {
                container.exit.get_or_insert_with(|| exit.clone());
            }
        });
    }

    /// Writes the state where a failure must not keep the sandbox from going on.
    fn record(&self, change: impl FnOnce(&mut crate::state::State)) {
        if let Err(error) = self.shared.state.update(change) {
            tracing::error!(
                error = chain(&error),
                "the sandbox's state is only in memory"
            );
        }
    }

    /// Follows a process of the guest to its end.
    fn watch_process(&self, machine: &Arc<Machine>, key: ProcessKey) {
        let (sandbox, agent) = (self.clone(), machine.agent.clone());
        tokio::spawn(async move {
            let exit = match agent.wait_process(&key).await {
                Ok(Ended { status, oom_killed }) => Exit {
                    status,
                    at: SystemTime::now(),
                    reason: None,
                    oom_killed,
                },
                // The VM's end says it for everyone.
                Err(AgentError::Broken { .. }) => return,
                Err(error) => Exit {
                    status: 255,
                    at: SystemTime::now(),
                    reason: Some(chain(&error)),
                    oom_killed: false,
                },
            };
            sandbox.process_ended(key, exit).await;
        });
    }

    async fn process_ended(&self, key: ProcessKey, exit: Exit) {
        let target = key.clone();
        let found = self.apply(move |pod| {
            let drained = pod
                .process(&target)?
                .io
                .as_ref()
                .map(crate::io::ProcessIo::drained);
            let execs = pod
                .container(&target.container)?
                .execs
                .values()
                .map(process::Process::waiter);
            let execs: Vec<_> = if target.exec.is_none() {
                execs.collect()
            } else {
                Vec::new()
            };
            Ok((drained, execs))
        });
        // Deleted already: nobody is interested any more.
        let Ok((drained, execs)) = found.await else {
            return;
        };
        let _ = timeout(EXECS_END, async {
            for mut exec in execs {
                let _ = exec.wait_for(Option::is_some).await;
            }
        })
        .await;
        if let Some(drained) = drained {
            let _ = timeout(DRAIN_BEFORE_EXIT, drained).await;
        }
        if key.exec.is_none() {
            let record = ExitRecord {
                status: exit.status,
                at: exit.at,
                reason: exit.reason.clone(),
                oom_killed: exit.oom_killed,
            };
            self.record(|state| {
                if let Some(container) = state.containers.get_mut(&key.container) {
                    container.exit = Some(record);
                }
            });
        }
        let _ = self.change(move |pod| pod.exited(&key, exit)).await;
    }

    /// Takes away what a container has on the host.
    fn remove_from_host(&self, id: &ContainerId, machine: Option<&Machine>) {
        if let Some(machine) = machine
            && let Err(error) = machine.share.remove_container(id)
        {
            tracing::error!(container = %id, error = chain(&error), "a mount of the container is left until the sandbox stops");
        }
        let mounted = self
            .shared
            .state
            .get()
            .containers
            .get(id)
            .and_then(|container| container.mounted_rootfs.clone());
        if let Some(Err(error)) = mounted.as_deref().map(cleanup::unmount) {
            tracing::error!(container = %id, error = chain(&error), "the container's root is left mounted");
            return;
        }
        self.record(|state| drop(state.containers.remove(id)));
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
