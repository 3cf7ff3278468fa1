//! The verbs that act on containers and processes which exist.

use super::events::Description;
use super::process::{Exit, ProcessKey, ProcessState};
use super::{Error, Sandbox};
use crate::agent::AgentError;
use crate::crash;
use crate::machine::Machine;
use crate::spec::Need;
use coffer_proto::agent::{Process as GuestProcess, StatContainerResponse};
use coffer_proto::error_chain::chain;
use coffer_proto::ids::ContainerId;
use oci_spec::runtime::LinuxResources;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::timeout;

/// SIGRTMAX of Linux; the guest's libc may know fewer.
const LAST_SIGNAL: u32 = 64;
/// A reader that is still there when the process is deleted gets this long for the rest.
const DRAIN_BEFORE_DELETE: Duration = Duration::from_secs(2);
/// From a SIGKILL that the agent took to the end of the process.
const KILL_TAKES: Duration = Duration::from_secs(5);

impl Sandbox {
    /// Lets a created process run; gives the pid that stands for it.
    pub async fn start(&self, key: ProcessKey) -> Result<u32, Error> {
        let machine = self.machine().await?;
        let starting = key.clone();
        self.apply(move |pod| pod.begin_start(&starting)).await?;
        if key.exec.is_none() {
            if let Err(cause) = machine.follow_network().await {
                return Err(self.start_failed(key, Error::Network(cause)).await);
            }
            self.serve_names(&machine, &key.container).await;
        }
        crash::point("start.begun");
        match machine.agent.start_process(&key).await {
            Ok(_) => {}
            Err(AgentError::Refused {
                code: ttrpc::Code::FAILED_PRECONDITION,
                ..
            }) => {
                let ended = key.clone();
                self.change(move |pod| pod.ended_unstarted(&ended)).await?;
                return Err(Error::Finished(key));
            }
            Err(error) => {
                let error = self.explain(error.into()).await;
                return Err(self.start_failed(key, error).await);
            }
        }
        crash::point("start.in-guest");
        let started = key.clone();
        let pid = self.apply(move |pod| pod.started(&started)).await?;
        if key.exec.is_none() {
            self.run_poststart_hooks(&key.container).await;
        }
        Ok(pid)
    }

    async fn start_failed(&self, key: ProcessKey, error: Error) -> Error {
        let exit = Exit {
            status: error
                .unexecutable()
                .map_or(255, |kind| kind.exit_status().into()),
            at: SystemTime::now(),
            reason: Some(chain(&error)),
            oom_killed: false,
        };
        let _ = self.change(move |pod| pod.start_failed(&key, exit)).await;
        error
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
        if signal > LAST_SIGNAL {
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
            // It has ended in the guest; here that is known when its output has been passed on.
            Err(AgentError::Refused {
                code: ttrpc::Code::NOT_FOUND | ttrpc::Code::FAILED_PRECONDITION,
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
        crash::point("delete.in-guest");
        if let Some(io) = io {
            let _ = timeout(DRAIN_BEFORE_DELETE, io.drained()).await;
        }
        if key.exec.is_none() {
            self.remove_from_host(&key.container, machine.as_ref())
                .await;
        }
        crash::point("delete.on-host");
        let (deleted, is_exec) = (key.clone(), key.exec.is_some());
        let (end, empty) = self
            .apply(move |pod| Ok((pod.deleted(&deleted)?, pod.is_unneeded())))
            .await?;
        if let Some(machine) = &machine
            && !is_exec
            && !empty
        {
            let needs = self.change(|pod| pod.needs()).await?;
            if let Err(error) = machine.fit(&needs).await {
                tracing::warn!(error = chain(&error), "the VM stays larger than it need be");
            }
        }
        if !is_exec {
            self.run_poststop_hooks(&key.container).await;
        }
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

    /// Applies OCI resources to a container: in the guest's cgroup, and to the size of the VM. The VM grows before a limit
    /// does, and shrinks after it.
    pub async fn update(&self, id: ContainerId, resources: Vec<u8>) -> Result<(), Error> {
        let target = id.clone();
        self.apply(move |pod| pod.container(&target).map(|_| ()))
            .await?;
        let parsed: LinuxResources =
            serde_json::from_slice(&resources).map_err(|source| Error::Malformed {
                what: "the resources",
                source,
            })?;
        let machine = self.machine().await?;
        let (target, limits) = (id.clone(), parsed.clone());
        let needs = self.apply(move |pod| pod.needs_with(&target, |need| need.updated(&limits)));
        machine.grow(&needs.await?).await?;
        if let Err(error) = machine.agent.update_container(&id, resources).await {
            let needs = self.change(|pod| pod.needs()).await?;
            if let Err(error) = machine.fit(&needs).await {
                tracing::warn!(error = chain(&error), "the VM stays larger than it need be");
            }
            return Err(error.into());
        }
        self.need(&machine, &id, move |need| need.updated(&parsed))
            .await
    }

    /// Changes what a container needs of the VM, and gives the VM the size that all need together.
    pub(super) async fn need(
        &self,
        machine: &Machine,
        id: &ContainerId,
        change: impl FnOnce(Need) -> Need + Send + 'static,
    ) -> Result<(), Error> {
        let id = id.clone();
        let needs = self.apply(move |pod| {
            let container = pod.container_mut(&id)?;
            container.need = change(container.need);
            Ok(pod.needs())
        });
        Ok(machine.fit(&needs.await?).await?)
    }

    /// The container's figures, from the guest's cgroup.
    pub async fn stats(&self, id: ContainerId) -> Result<StatContainerResponse, Error> {
        let target = id.clone();
        self.apply(move |pod| pod.container(&target).map(|_| ()))
            .await?;
        Ok(self.machine().await?.agent.stat_container(&id).await?)
    }

    /// The guest's processes of a container; none of one that has ended.
    pub async fn processes(&self, id: ContainerId) -> Result<Vec<GuestProcess>, Error> {
        let init = self.describe(ProcessKey::init(id.clone())).await?;
        if init.state == ProcessState::Stopped {
            return Ok(Vec::new());
        }
        Ok(self.machine().await?.agent.list_processes(&id).await?)
    }

    /// What is known of a process; never waits for the guest.
    pub async fn describe(&self, key: ProcessKey) -> Result<Description, Error> {
        self.apply(move |pod| pod.describe(&key)).await
    }
}
