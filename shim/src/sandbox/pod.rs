//! The pod's state machine: plain data, changed by its owner task only, one transition at a time.
//!
//! Nothing here waits or does I/O; the recipes in [`super`] do, between two transitions. Events go out in the order of the
//! transitions, which is the order containerd requires: create, start, exit, delete.

mod prepared;
mod running;

use super::error::Error;
use super::events::{Description, SandboxState, TaskEvent};
use super::process::{Exit, Process, ProcessKey, ProcessState, StdioPaths, VM_DIED};
use crate::io::ProcessIo;
use crate::machine::Death;
use crate::parked::Parked;
use crate::spec::Need;
use coffer_proto::ids::{ContainerId, ExecId};
use prepared::Preparation;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Instant, SystemTime};
use tokio::sync::mpsc;

/// Who makes the VM for a new container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// The caller: it is the first.
    Boot,
    /// It is there, or another caller is booting it.
    Join,
}

/// A container: its init process and its execs.
#[derive(Debug)]
pub struct Container {
    pub bundle: PathBuf,
    /// What it needs of the VM.
    pub need: Need,
    /// The host's process that stands for this container alone, where it has one.
    stand: Option<Parked>,
    pub init: Process,
    pub execs: BTreeMap<ExecId, Process>,
    /// Somebody was told that it hit its memory limit.
    oom_told: bool,
}

/// All the pod's state.
#[derive(Debug)]
pub struct Pod {
    state: SandboxState,
    /// The hypervisor process's pid, which stands for the guest's processes on the host; 0 before there is one.
    pid: u32,
    containers: BTreeMap<ContainerId, Container>,
    events: mpsc::UnboundedSender<TaskEvent>,
    /// Since when there is no container.
    idle_since: Option<Instant>,
    /// How the Sandbox API made it and ends it, instead of its first and last container.
    preparation: Preparation,
    /// When the last of the VM was gone.
    ended: Option<SystemTime>,
    ended_in_order: bool,
}

impl Pod {
    /// A pod without containers. `events` gets every [`TaskEvent`]; its receiver bounds them.
    pub fn new(events: mpsc::UnboundedSender<TaskEvent>) -> Self {
        Self {
            state: SandboxState::New,
            pid: 0,
            containers: BTreeMap::new(),
            events,
            idle_since: Some(Instant::now()),
            preparation: Preparation::Unprepared,
            ended: None,
            ended_in_order: false,
        }
    }

    pub fn state(&self) -> &SandboxState {
        &self.state
    }

    /// Whether nobody would miss the VM.
    pub fn is_unneeded(&self) -> bool {
        self.containers.is_empty() && !self.is_prepared()
    }

    pub fn container_ids(&self) -> Vec<ContainerId> {
        self.containers.keys().cloned().collect()
    }

    pub fn idle_since(&self) -> Option<Instant> {
        self.idle_since
    }

    // The sandbox.

    /// Creating → Running.
    pub fn booted(&mut self, pid: u32) {
        self.pid = pid;
        if self.state == SandboxState::Creating {
            self.state = SandboxState::Running;
        }
    }

    /// Creating or Running → Stopping, by our own wish. False when it is past that.
    pub fn begin_stop(&mut self, reason: &str) -> bool {
        if self.state.has_ended() {
            return false;
        }
        self.state = SandboxState::Stopping {
            reason: reason.to_owned(),
        };
        true
    }

    /// The VM is gone. Gives the cause that stays: the first one.
    pub fn vm_gone(&mut self, death: &Death) -> Death {
        let out_of_memory = self.begin_stop(&death.reason) && death.out_of_memory;
        let reason = self.state.end_reason().unwrap_or(&death.reason).to_owned();
        Death {
            reason,
            out_of_memory,
        }
    }

    /// Whatever still ran in the VM has ended with it.
    pub fn all_died(&mut self, death: Death) {
        let exit = Exit {
            status: VM_DIED,
            at: SystemTime::now(),
            reason: Some(death.reason),
            oom_killed: death.out_of_memory,
        };
        for id in self.container_ids() {
            self.end_container(&id, &exit);
        }
    }

    /// Stopping → Stopped.
    pub fn stopped(&mut self) {
        if let SandboxState::Stopping { reason } = &self.state {
            self.state = SandboxState::Stopped {
                reason: reason.clone(),
            };
            self.ended = Some(SystemTime::now());
        }
    }

    pub(super) fn alive(&self) -> Result<(), Error> {
        self.state
            .end_reason()
            .map_or(Ok(()), |reason| Err(Error::Stopped(reason.to_owned())))
    }

    // Creation.

    /// Takes the name of a new container. The first one brings the VM with it.
    pub fn begin_create(
        &mut self,
        id: &ContainerId,
        bundle: PathBuf,
        stdio: StdioPaths,
    ) -> Result<Admission, Error> {
        self.alive()?;
        if let Preparation::Prepared(_) = self.preparation {
            return Err(Error::NotStarted);
        }
        if self.containers.contains_key(id) {
            return Err(Error::Exists(ProcessKey::init(id.clone())));
        }
        let container = Container {
            bundle,
            need: Need::NOTHING,
            stand: None,
            init: Process::new(stdio),
            execs: BTreeMap::new(),
            oom_told: false,
        };
        self.containers.insert(id.clone(), container);
        self.idle_since = None;
        if self.state == SandboxState::New {
            self.state = SandboxState::Creating;
            return Ok(Admission::Boot);
        }
        Ok(Admission::Join)
    }

    /// Takes the name of a new exec.
    pub fn begin_exec(
        &mut self,
        key: &ProcessKey,
        exec: &ExecId,
        stdio: StdioPaths,
    ) -> Result<(), Error> {
        self.alive()?;
        let container = self.container_mut(&key.container)?;
        let state = container.init.state;
        if !matches!(state, ProcessState::Created | ProcessState::Running) {
            return Err(Error::State {
                verb: "exec in",
                process: ProcessKey::init(key.container.clone()),
                state,
            });
        }
        if container.execs.contains_key(exec) {
            return Err(Error::Exists(key.clone()));
        }
        container.execs.insert(exec.clone(), Process::new(stdio));
        Ok(())
    }

    /// Creating → Created: the agent has it and its streams are attached.
    pub fn created(&mut self, key: &ProcessKey, io: ProcessIo) -> Result<u32, Error> {
        self.alive()?;
        let pid = self.pid_of(&key.container);
        if key.exec.is_some() {
            self.check_signal(&ProcessKey::init(key.container.clone()))?;
        }
        let container = self.container_mut(&key.container)?;
        let bundle = container.bundle.clone();
        let process = process_of(container, key)?;
        process.state = ProcessState::Created;
        process.io = Some(io);
        let (container, stdio) = (key.container.clone(), process.stdio.clone());
        self.emit(match key.exec.clone() {
            None => TaskEvent::Create {
                container,
                bundle,
                stdio,
                pid,
            },
            Some(exec) => TaskEvent::ExecAdded { container, exec },
        });
        Ok(pid)
    }

    /// Takes a process out that came to nothing, or that was deleted.
    pub fn forget(&mut self, key: &ProcessKey) {
        match &key.exec {
            None => drop(self.containers.remove(&key.container)),
            Some(exec) => drop(
                self.containers
                    .get_mut(&key.container)
                    .and_then(|c| c.execs.remove(exec)),
            ),
        }
        if self.containers.is_empty() && !self.is_prepared() && self.idle_since.is_none() {
            self.idle_since = Some(Instant::now());
        }
    }

    // Start and end of a process.

    /// Created → Starting.
    pub fn begin_start(&mut self, key: &ProcessKey) -> Result<(), Error> {
        self.alive()?;
        let process = self.process_mut(key)?;
        if process.state != ProcessState::Created {
            return Err(Error::State {
                verb: "start",
                process: key.clone(),
                state: process.state,
            });
        }
        process.state = ProcessState::Starting;
        Ok(())
    }

    /// Starting → Running, and on to Stopped if the end came first.
    pub fn started(&mut self, key: &ProcessKey) -> Result<u32, Error> {
        let pid = self.pid_of(&key.container);
        let process = self.process_mut(key)?;
        if process.state != ProcessState::Starting {
            // The VM died meanwhile, and its end was told.
            return Ok(pid);
        }
        process.state = ProcessState::Running;
        let early = process.early_exit.take();
        let container = key.container.clone();
        self.emit(match key.exec.clone() {
            None => TaskEvent::Start { container, pid },
            Some(exec) => TaskEvent::ExecStarted {
                container,
                exec,
                pid,
            },
        });
        if let Some(exit) = early {
            self.exited(key, exit);
        }
        Ok(pid)
    }

    /// The agent could not let it run: it has ended without ever having been started.
    pub fn start_failed(&mut self, key: &ProcessKey, exit: Exit) {
        if let Ok(process) = self.process_mut(key) {
            process.stop(exit);
        }
    }

    /// Starting → Created: it was killed before the agent could let it run. Its end is told as that of one which never ran.
    pub fn ended_unstarted(&mut self, key: &ProcessKey) {
        let Ok(process) = self.process_mut(key) else {
            return;
        };
        if process.state == ProcessState::Starting {
            process.state = ProcessState::Created;
            if let Some(exit) = process.early_exit.take() {
                self.exited(key, exit);
            }
        }
    }

    /// A process has ended. The end of init ends every exec first. Waits for the start where that is under way.
    pub fn exited(&mut self, key: &ProcessKey, exit: Exit) {
        let Ok(process) = self.process_mut(key) else {
            return;
        };
        if process.state == ProcessState::Starting {
            process.early_exit = Some(exit);
            return;
        }
        if key.exec.is_none() {
            self.end_container(&key.container, &exit);
        } else {
            self.end_process(key, exit);
        }
    }

    fn end_container(&mut self, id: &ContainerId, exit: &Exit) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        let was_told_of = container.init.state != ProcessState::Creating;
        let unnoticed_oom = exit.oom_killed && !container.oom_told && was_told_of;
        let killed = Exit {
            status: VM_DIED,
            oom_killed: false,
            ..exit.clone()
        };
        for exec in container.execs.keys().cloned().collect::<Vec<_>>() {
            self.end_process(
                &ProcessKey {
                    container: id.clone(),
                    exec: Some(exec),
                },
                killed.clone(),
            );
        }
        if unnoticed_oom {
            // The agent tells of both on different ways; callers want the cause first.
            self.out_of_memory(id);
        }
        self.end_process(&ProcessKey::init(id.clone()), exit.clone());
    }

    fn end_process(&mut self, key: &ProcessKey, exit: Exit) {
        let pid = self.pid_of(&key.container);
        let Ok(process) = self.process_mut(key) else {
            return;
        };
        if process.state == ProcessState::Creating {
            // It was never told of, and its creation is about to fail.
            return;
        }
        let exit = process.early_exit.take().unwrap_or(exit);
        if !process.stop(exit.clone()) {
            return;
        }
        if let Some(io) = &mut process.io {
            io.stop_stdin();
        }
        self.emit(TaskEvent::Exit {
            process: key.clone(),
            pid,
            exit,
        });
    }

    // Looking things up.

    /// What is known of a process.
    pub fn describe(&self, key: &ProcessKey) -> Result<Description, Error> {
        let process = self.process(key)?;
        Ok(Description {
            bundle: self.container(&key.container)?.bundle.clone(),
            pid: self.pid_of(&key.container),
            state: process.state,
            stdio: process.stdio.clone(),
            exit: process.exit(),
        })
    }

    /// What each container needs of the VM.
    pub fn needs(&self) -> Vec<Need> {
        self.containers
            .values()
            .map(|container| container.need)
            .collect()
    }

    /// The same, if the need of this container changed.
    pub fn needs_with(
        &self,
        id: &ContainerId,
        change: impl FnOnce(Need) -> Need,
    ) -> Result<Vec<Need>, Error> {
        let changed = change(self.container(id)?.need);
        let others = self.containers.iter().filter(|(other, _)| *other != id);
        Ok(others
            .map(|(_, container)| container.need)
            .chain([changed])
            .collect())
    }

    /// From now on this process's pid is the container's.
    pub fn stand(&mut self, id: &ContainerId, process: Parked) -> Result<(), Error> {
        self.container_mut(id)?.stand = Some(process);
        Ok(())
    }

    /// The host's pid that stands for a container: its own, or the one of the whole pod.
    fn pid_of(&self, id: &ContainerId) -> u32 {
        let stand = self.containers.get(id).and_then(|c| c.stand.as_ref());
        stand.map_or(self.pid, Parked::pid)
    }

    /// The container that this pid stands for; None when it stands for none, or for all.
    pub fn container_of_pid(&self, pid: u32) -> Option<ContainerId> {
        let mut found = self
            .containers
            .iter()
            .filter(|(_, c)| c.stand.as_ref().is_some_and(|stand| stand.pid() == pid));
        found.next().map(|(id, _)| id.clone())
    }

    /// A process that exists and is not being deleted.
    pub fn process(&self, key: &ProcessKey) -> Result<&Process, Error> {
        let container = self.container(&key.container)?;
        let process = match &key.exec {
            None => Some(&container.init),
            Some(exec) => container.execs.get(exec),
        };
        process
            .filter(|process| !process.deleting)
            .ok_or_else(|| Error::NotFound(key.clone()))
    }

    pub fn process_mut(&mut self, key: &ProcessKey) -> Result<&mut Process, Error> {
        let process = process_of(self.container_mut(&key.container)?, key)?;
        if process.deleting {
            return Err(Error::NotFound(key.clone()));
        }
        Ok(process)
    }

    pub fn container(&self, id: &ContainerId) -> Result<&Container, Error> {
        let found = self
            .containers
            .get(id)
            .filter(|container| !container.init.deleting);
        found.ok_or_else(|| Error::NotFound(ProcessKey::init(id.clone())))
    }

    pub fn container_mut(&mut self, id: &ContainerId) -> Result<&mut Container, Error> {
        let found = self
            .containers
            .get_mut(id)
            .filter(|container| !container.init.deleting);
        found.ok_or_else(|| Error::NotFound(ProcessKey::init(id.clone())))
    }

    fn emit(&self, event: TaskEvent) {
        tracing::debug!(?event, "task event");
        // Without a receiver nobody wants to know.
        let _ = self.events.send(event);
    }
}

fn process_of<'a>(
    container: &'a mut Container,
    key: &ProcessKey,
) -> Result<&'a mut Process, Error> {
    match &key.exec {
        None => Ok(&mut container.init),
        Some(exec) => container
            .execs
            .get_mut(exec)
            .ok_or_else(|| Error::NotFound(key.clone())),
    }
}

#[cfg(test)]
mod tests;
