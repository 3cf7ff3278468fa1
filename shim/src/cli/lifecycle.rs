//! The verbs of the OCI runtime specification on a container that exists: start, kill, pause, resume.
//!
//! The words of the errors are those that engines look for, which were written for runc.

use super::client::{Process, Task, TaskError};
use super::find::Found;
use super::options::KillOptions;
use super::{Error, inspect};
use crate::config::Config;
use crate::hooks;
use coffer_proto::ids::{ContainerId, SandboxId};
use containerd_shim_protos::ttrpc::Code;
use std::time::Duration;

/// A supervisor that does not say this fast in which state a container is will not do anything with it either.
const ANSWER: Duration = Duration::from_secs(30);

/// A container, and the supervisor that has it.
pub(super) struct Known {
    pub(super) found: Found,
    pub(super) process: Process,
    pub(super) status: &'static str,
    /// None where the supervisor is gone, and so the container has stopped.
    task: Option<Task>,
}

impl Known {
    pub(super) async fn look(config: &Config, id: &SandboxId) -> Result<Self, Error> {
        let found = Found::by_id(config, id)?;
        let (container, _) = found.container()?;
        let process = Process {
            container: container.to_string(),
            exec: String::new(),
        };
        let mut known = Self {
            found,
            process,
            status: "stopped",
            task: None,
        };
        let Ok(task) = Task::connect(&known.found.root, &known.found.id).await else {
            return Ok(known);
        };
        match task.state(&known.process.container, ANSWER).await {
            Ok(state) => known.status = state.status,
            Err(TaskError::Gone) => return Ok(known),
            Err(error) => return Err(error.into()),
        }
        known.task = Some(task);
        Ok(known)
    }

    fn refuse<T>(&self, what: &'static str) -> Result<T, Error> {
        let id = ContainerId::new(&self.process.container).expect("it came from one");
        Err(Error::Refused { what, id })
    }

    /// The supervisor, where the container is in one of these states.
    pub(super) fn task_in(&self, states: &[&str], otherwise: &'static str) -> Result<&Task, Error> {
        match &self.task {
            Some(task) if states.contains(&self.status) => Ok(task),
            _ => self.refuse(otherwise),
        }
    }

    /// A container that has ended meanwhile is told as one that had before.
    pub(super) fn told<T>(&self, result: Result<T, TaskError>) -> Result<T, Error> {
        match result {
            Err(
                TaskError::Gone
                | TaskError::Refused {
                    code: Code::NOT_FOUND | Code::UNAVAILABLE,
                    ..
                },
            ) => self.refuse(NOT_RUNNING),
            other => Ok(other?),
        }
    }
}

pub(super) const NOT_RUNNING: &str = "container not running";

/// `coffer start`
pub(super) async fn start(config: &Config, id: &SandboxId) -> Result<(), Error> {
    let known = Known::look(config, id).await?;
    let refusal = match known.status {
        "stopped" => "cannot start a container that has stopped",
        "paused" => "cannot start a paused container",
        _ => "cannot start an already running container",
    };
    let task = known.task_in(&["created"], refusal)?;
    task.start(&known.process).await?;
    if let Some(stand_in) = known.found.stand_in() {
        let record = &stand_in.record;
        let pid = stand_in.process.pid.unsigned_abs();
        let (container, of) = known.found.container()?;
        let annotations = Some(&record.annotations);
        let state = inspect::hook_state(&container, "running", pid, &of.bundle, annotations);
        hooks::run_all("poststart", &record.poststart, &state).await;
    }
    Ok(())
}

/// `coffer kill`
pub(super) async fn kill(config: &Config, options: &KillOptions) -> Result<(), Error> {
    let known = Known::look(config, &options.target.id).await?;
    let task = known.task_in(&["created", "running", "paused"], NOT_RUNNING)?;
    known.told(
        task.kill(&known.process, options.signal.0, options.all)
            .await,
    )
}

/// `coffer pause`
pub(super) async fn pause(config: &Config, id: &SandboxId) -> Result<(), Error> {
    let known = Known::look(config, id).await?;
    let task = known.task_in(&["running"], NOT_RUNNING)?;
    known.told(task.pause(&known.process.container).await)
}

/// `coffer resume`
pub(super) async fn resume(config: &Config, id: &SandboxId) -> Result<(), Error> {
    let known = Known::look(config, id).await?;
    let task = known.task_in(&["paused"], "container not paused")?;
    known.told(task.resume(&known.process.container).await)
}
