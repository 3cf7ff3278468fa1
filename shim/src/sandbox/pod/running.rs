//! A pod's containers between their start and their end, and their deletion.

use super::{Pod, process_of};
use crate::io::ProcessIo;
use crate::sandbox::error::Error;
use crate::sandbox::events::TaskEvent;
use crate::sandbox::process::{Exit, ProcessKey, ProcessState, VM_DIED};
use coffer_proto::ids::ContainerId;
use std::path::PathBuf;
use std::time::SystemTime;

impl Pod {
    /// Running → Paused once the agent has frozen it.
    pub fn paused(&mut self, id: &ContainerId) -> Result<(), Error> {
        self.switch(id, ProcessState::Running, ProcessState::Paused, "pause")?;
        self.emit(TaskEvent::Paused {
            container: id.clone(),
        });
        Ok(())
    }

    /// Paused → Running once the agent has thawed it.
    pub fn resumed(&mut self, id: &ContainerId) -> Result<(), Error> {
        self.switch(id, ProcessState::Paused, ProcessState::Running, "resume")?;
        self.emit(TaskEvent::Resumed {
            container: id.clone(),
        });
        Ok(())
    }

    fn switch(
        &mut self,
        id: &ContainerId,
        from: ProcessState,
        to: ProcessState,
        verb: &'static str,
    ) -> Result<(), Error> {
        self.expect_state(&ProcessKey::init(id.clone()), from, verb)?;
        let container = self.container_mut(id)?;
        for process in container.execs.values_mut().chain([&mut container.init]) {
            if process.state == from {
                process.state = to;
            }
        }
        Ok(())
    }

    /// Refuses unless the process is in this state.
    pub fn expect_state(
        &self,
        key: &ProcessKey,
        wanted: ProcessState,
        verb: &'static str,
    ) -> Result<(), Error> {
        match self.process(key)?.state {
            state if state == wanted => Ok(()),
            state => Err(Error::State {
                verb,
                process: key.clone(),
                state,
            }),
        }
    }

    /// Whether a signal can reach it. A process that has ended is told apart from one that never was.
    pub fn check_signal(&self, key: &ProcessKey) -> Result<(), Error> {
        match self.process(key)?.state {
            ProcessState::Stopped => Err(Error::Finished(key.clone())),
            state @ ProcessState::Creating => Err(Error::State {
                verb: "signal",
                process: key.clone(),
                state,
            }),
            _ => Ok(()),
        }
    }

    /// A container hit its memory limit. Names that are not ours are the guest's invention. Gives the container's bundle.
    pub fn out_of_memory(&mut self, id: &ContainerId) -> Option<PathBuf> {
        let container = self.containers.get_mut(id)?;
        // Once it has ended, one notice is enough: the end told of it too.
        if container.init.state != ProcessState::Stopped || !container.oom_told {
            container.oom_told = true;
            self.emit(TaskEvent::Oom {
                container: id.clone(),
            });
        }
        self.containers
            .get(id)
            .map(|container| container.bundle.clone())
    }

    /// Containers that have not ended.
    pub fn live_containers(&self) -> usize {
        self.containers
            .values()
            .filter(|c| c.init.state != ProcessState::Stopped)
            .count()
    }

    // Deletion.

    /// Lets a process be deleted that has ended or never ran. Gives its streams, to be drained.
    pub fn begin_delete(&mut self, key: &ProcessKey) -> Result<Option<ProcessIo>, Error> {
        let process = self.process_mut(key)?;
        match process.state {
            ProcessState::Stopped | ProcessState::Created => {}
            state => {
                return Err(Error::State {
                    verb: "delete",
                    process: key.clone(),
                    state,
                });
            }
        }
        process.deleting = true;
        Ok(process.io.take())
    }

    /// Takes a deleted process out; gives its end.
    pub fn deleted(&mut self, key: &ProcessKey) -> Result<(u32, Exit), Error> {
        let pid = self.pid_of(&key.container);
        // Deleted before it ran: that killed it.
        let killed = Exit {
            status: VM_DIED,
            at: SystemTime::now(),
            reason: None,
            oom_killed: false,
        };
        let container = self
            .containers
            .get_mut(&key.container)
            .ok_or_else(|| Error::NotFound(key.clone()))?;
        let process = process_of(container, key)?;
        let never_ran = process.stop(killed.clone());
        let exit = process.exit().unwrap_or(killed);
        if never_ran {
            self.emit(TaskEvent::Exit {
                process: key.clone(),
                pid,
                exit: exit.clone(),
            });
        }
        self.forget(key);
        self.emit(TaskEvent::Delete {
            process: key.clone(),
            pid,
            exit: exit.clone(),
        });
        Ok((pid, exit))
    }
}
