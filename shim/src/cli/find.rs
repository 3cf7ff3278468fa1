//! Finding a container by its id, and the supervisor that has it.

use super::Error;
use super::client::{Process, ProcessState, Task, TaskError};
use crate::config::Config;
use crate::state::{ContainerRecord, StandIn, State, sandboxes};
use coffer_proto::error_chain::chain;
use coffer_proto::ids::{ContainerId, SandboxId};
use std::path::{Path, PathBuf};

/// The sandbox that holds a container of this id. One of the same name is looked at first; a container of a pod is
/// found by looking at all, of which one machine has some hundred at most.
pub(super) fn holder(root: &Path, id: &ContainerId) -> Result<Option<Found>, Error> {
    let own = SandboxId::new(id.as_str()).expect("both kinds of id have the same form");
    for sandbox in [own].into_iter().chain(sandboxes(root)?) {
        // One that can't be read has its own error when it is asked for by name.
        let Ok(Some(state)) = State::load(root, &sandbox) else {
            continue;
        };
        let created = state.containers.contains_key(id);
        if created || state.stand_ins.iter().any(|known| known.container == *id) {
            return Ok(Some(Found {
                id: sandbox,
                root: root.to_owned(),
                state,
                wanted: id.clone(),
            }));
        }
    }
    Ok(None)
}

/// A sandbox by what it wrote.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) id: SandboxId,
    pub(super) root: PathBuf,
    pub(super) state: State,
    /// The container that was asked for.
    pub(super) wanted: ContainerId,
}

impl Found {
    /// The sandbox that has a container of this id, or else that has this id itself.
    pub(super) fn by_id(config: &Config, id: &SandboxId) -> Result<Self, Error> {
        let wanted = ContainerId::new(id.as_str()).expect("both kinds of id have the same form");
        let (id, root) = (id.clone(), config.root.clone());
        if let Some(found) = holder(&root, &wanted)? {
            return Ok(found);
        }
        match State::load(&root, &id)? {
            Some(state) => Ok(Self {
                id,
                root,
                state,
                wanted,
            }),
            None => Err(Error::NoSandbox { id, root }),
        }
    }

    /// The sandbox's directory, which also one has whose state can't be read.
    pub(super) fn directory(config: &Config, id: &SandboxId) -> Result<PathBuf, Error> {
        let directory = config.root.join(id);
        if directory.is_dir() {
            Ok(directory)
        } else {
            Err(Error::NoSandbox {
                id: id.clone(),
                root: config.root.clone(),
            })
        }
    }

    pub(super) fn alive(&self) -> bool {
        self.state.supervisor.is_alive()
    }

    /// What stands for the wanted container's init process.
    pub(super) fn stand_in(&self) -> Option<&StandIn> {
        let mut known = self.state.stand_ins.iter();
        known.find(|known| known.container == self.wanted && known.exec.is_none())
    }

    /// The pid of the host that an engine takes for the container's; 0 when it has ended.
    pub(super) fn pid(&self, live: &ProcessState) -> u32 {
        match (live.status, self.stand_in()) {
            ("stopped", _) => 0,
            (_, Some(stand_in)) => stand_in.process.pid.unsigned_abs(),
            _ => live.pid,
        }
    }

    /// The wanted container, or the only one.
    pub(super) fn container(&self) -> Result<(ContainerId, &ContainerRecord), Error> {
        let containers = &self.state.containers;
        let own = containers.iter().find(|(id, _)| **id == self.wanted);
        let only = containers
            .first_key_value()
            .filter(|_| containers.len() == 1);
        let (id, record) = own.or(only).ok_or_else(|| {
            let names = containers
                .keys()
                .map(ContainerId::as_str)
                .collect::<Vec<_>>()
                .join(", ");
            Error::NoContainer {
                id: self.id.clone(),
                names: if names.is_empty() {
                    "none".into()
                } else {
                    names
                },
            }
        })?;
        Ok((id.clone(), record))
    }

    /// Why a container ended, where its own process was not the cause.
    pub(super) fn reason(&self, record: &ContainerRecord) -> Option<String> {
        if let Some(exit) = &record.exit {
            let oom = exit.oom_killed.then(|| "out of memory".to_owned());
            return exit.reason.clone().or(oom);
        }
        match self.state.stopped() {
            Some(reason) => Some(reason.to_owned()),
            None if !self.alive() => Some("its supervisor died".into()),
            None => None,
        }
    }

    /// A supervisor that can't be reached is dead, or about to be.
    pub(super) fn why_gone(&self, error: TaskError) -> Error {
        if !matches!(error, TaskError::Connect { .. } | TaskError::Gone) {
            return error.into();
        }
        let reason = match self.state.stopped() {
            Some(reason) => reason.to_owned(),
            None if self.alive() => chain(&error),
            None => "its supervisor died; coffer delete removes what is left".into(),
        };
        Error::Dead {
            id: self.id.clone(),
            reason,
        }
    }

    /// The end of an exec: its exit status, unless the VM died under it.
    pub(super) fn exec_ended(&self, status: u8) -> Result<u8, Error> {
        let state = State::load(&self.root, &self.id).ok().flatten();
        let died = state
            .as_ref()
            .and_then(|now| now.vm_died_under(status.into()));
        died.map_or(Ok(status), |reason| {
            Err(Error::Dead {
                id: self.id.clone(),
                reason: reason.to_owned(),
            })
        })
    }
}

/// A sandbox whose supervisor answers, and its container's init process.
pub(super) async fn live(config: &Config, id: &SandboxId) -> Result<(Task, Process), Error> {
    let found = Found::by_id(config, id)?;
    let (container, _) = found.container()?;
    let task = Task::connect(&config.root, &found.id)
        .await
        .map_err(|error| found.why_gone(error))?;
    Ok((
        task,
        Process {
            container: container.to_string(),
            exec: String::new(),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_container_is_found_in_its_own_sandbox_and_in_that_of_its_pod() {
        use crate::machine::child::ProcessId;
        use crate::state::{StateFile, tests::options};
        let root = tempfile::tempdir().unwrap();
        let options = options(root.path(), "pod");
        fs::create_dir(options.dir()).unwrap();
        let state = StateFile::create(State::new(options, ProcessId::current().unwrap())).unwrap();
        let id = |name: &str| ContainerId::new(name).unwrap();
        let record = ContainerRecord {
            bundle: "/b".into(),
            created: std::time::SystemTime::now(),
            mounted_rootfs: None,
            exit: None,
        };
        let created = state.update(|state| drop(state.containers.insert(id("app"), record)));
        created.unwrap();
        let found = holder(root.path(), &id("app")).unwrap().unwrap();
        assert_eq!((found.id.as_str(), &found.wanted), ("pod", &id("app")));
        assert!(holder(root.path(), &id("other")).unwrap().is_none());
    }
}
