//! The end of a sandbox: asked of its supervisor, and then made sure of.

use super::client::{Process, Task, TaskError};
use super::find::{Found, live};
use super::inspect::hook_state;
use super::{Error, KILL_TAKES, staging_directory, supervisor};
use crate::cgroup::{CgroupPath, SandboxCgroup};
use crate::cleanup;
use crate::config::Config;
use crate::hooks;
use crate::machine::child::ProcessId;
use crate::removal;
use crate::state::{State, StateFile};
use coffer_proto::ids::{ContainerId, SandboxId};
use containerd_shim_protos::ttrpc::Code;
use std::path::Path;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// From Shutdown to the supervisor's end, and how often is looked.
const END: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(20);
/// A supervisor that does not answer State this fast is not waited for when all is deleted by force anyway.
const ANSWER: Duration = Duration::from_secs(5);
/// A stand-in passes the last output on after its container's end, if somebody reads it.
const STAND_IN_ENDS: Duration = Duration::from_secs(10);

/// `coffer delete`: a container, and with the last one its sandbox. Without force only if it has ended or never ran.
pub(super) async fn delete(config: &Config, id: &SandboxId, force: bool) -> Result<(), Error> {
    let found = match Found::by_id(config, id) {
        Ok(found) => found,
        // What can't be read can still be removed.
        Err(Error::State(_)) if force => return remove_sandbox(&config.root, id).await,
        Err(Error::NoSandbox { .. }) if force || Found::directory(config, id).is_ok() => {
            return remove_sandbox(&config.root, id).await;
        }
        Err(error) => return Err(error),
    };
    let ended = if found.alive() {
        ask_and_wait(&found, force).await?;
        !found.alive()
    } else {
        true
    };
    after(&found, ended).await?;
    if ended {
        forget(&found).await?;
    }
    Ok(())
}

/// Returns when the container is deleted, and with the last one when the supervisor has ended.
async fn ask_and_wait(found: &Found, force: bool) -> Result<(), Error> {
    let asked = ask(found, force).await;
    if asked.is_err() && !force {
        return asked;
    }
    let left = State::load(&found.root, &found.id)?;
    let left = left.map(|state| state.containers).unwrap_or_default();
    // What was deleted is not in the state any more. A supervisor that ends, because its VM boots for nobody or `create` was killed,
    // keeps it there, and may refuse what is asked of it meanwhile.
    let stays = meant(found).any(|container| left.contains_key(container));
    if stays || left.is_empty() {
        wait_for_end(found).await;
    }
    if stays && found.alive() {
        asked
    } else {
        Ok(())
    }
}

/// The container that was named, or all if it was the sandbox.
fn meant(found: &Found) -> impl Iterator<Item = &ContainerId> {
    let all = found.state.containers.keys();
    let one = found.state.containers.contains_key(&found.wanted);
    all.filter(move |container| !one || **container == found.wanted)
}

/// What the host has of a container beside its sandbox: the stand-in, its cgroup, hooks that wait for this moment.
async fn after(found: &Found, ended: bool) -> Result<(), Error> {
    let Some(stand_in) = found.stand_in() else {
        return Ok(());
    };
    wait_for_stand_in(&stand_in.process).await;
    let record = &stand_in.record;
    let around_vm = found.state.cgroup.as_ref().and_then(CgroupPath::around_vm);
    // Killing what is in that of the VM's first container would end the VM under the others.
    let own = record.cgroup.as_ref();
    let own = own.filter(|own| ended || around_vm.as_ref() != Some(own));
    for path in own.into_iter().chain(around_vm.as_ref().filter(|_| ended)) {
        SandboxCgroup::at(path).remove()?;
    }
    let bundle = found.state.containers.get(&found.wanted);
    let bundle = bundle
        .map(|record| record.bundle.as_path())
        .unwrap_or(Path::new(""));
    let state = hook_state(
        &found.wanted,
        "stopped",
        0,
        bundle,
        Some(&record.annotations),
    );
    hooks::run_all("poststop", &record.poststop, &state).await;
    Ok(())
}

/// One that nobody reads from any more, or whose supervisor died, is not waited for longer.
async fn wait_for_stand_in(process: &ProcessId) {
    let ended = async {
        while process.is_alive() {
            sleep(LOOK).await;
        }
    };
    if timeout(STAND_IN_ENDS, ended).await.is_err() {
        let _ = process.kill(ANSWER);
    }
}

/// The supervisor is gone: takes the container off the state it left, and the sandbox with its last one.
async fn forget(found: &Found) -> Result<(), Error> {
    let others = State::load(&found.root, &found.id)?.filter(|state| {
        state
            .containers
            .keys()
            .any(|container| *container != found.wanted)
    });
    let Some(mut state) = others.filter(|state| state.containers.contains_key(&found.wanted))
    else {
        return remove_sandbox(&found.root, &found.id).await;
    };
    let owned = state.clone();
    let released = tokio::task::spawn_blocking(move || cleanup::release(&owned)).await;
    released.expect("cleanup does not panic")?;
    state.containers.remove(&found.wanted);
    state
        .stand_ins
        .retain(|known| known.container != found.wanted);
    StateFile::create(state)?;
    Ok(())
}

async fn remove_sandbox(root: &Path, id: &SandboxId) -> Result<(), Error> {
    supervisor::remove(root.to_owned(), id.clone()).await?;
    let staging = staging_directory(root, id);
    removal::remove_tree(&staging).map_err(|source| Error::Io {
        what: format!("can't remove {staging:?}"),
        source,
    })
}

/// Has the supervisor delete the container, or all if the sandbox was meant, and end if none is left.
async fn ask(found: &Found, force: bool) -> Result<(), Error> {
    let task = Task::connect(&found.root, &found.id)
        .await
        .map_err(|error| found.why_gone(error))?;
    for container in meant(found) {
        let process = Process {
            container: container.to_string(),
            exec: String::new(),
        };
        let state = task.state(container.as_str(), ANSWER).await?;
        if matches!(state.status, "running" | "paused") {
            if !force {
                return Err(Error::Running {
                    id: container.clone(),
                    status: state.status,
                });
            }
            kill(&task, &process, container, state.status).await;
        }
        if let (Some(stand_in), true) = (found.stand_in(), state.status != "created") {
            // It still looks at how its container ended.
            wait_for_stand_in(&stand_in.process).await;
        }
        match task.delete(&process).await {
            Err(TaskError::Refused {
                code: Code::FAILED_PRECONDITION,
                ..
            }) if force => {
                delete_unfinished(found, &task, &process).await?;
            }
            deleted => deleted?,
        }
    }
    Ok(task.shutdown(&found.id).await?)
}

/// A container that is still being created: whoever wanted it was killed. A VM that boots for it alone is not waited for.
async fn delete_unfinished(found: &Found, task: &Task, process: &Process) -> Result<(), Error> {
    let ended = async {
        loop {
            let state = State::load(&found.root, &found.id)?;
            if state.is_none_or(|state| state.containers.len() < 2) {
                return Ok(task.shutdown_now(&found.id).await?);
            }
            match task.delete(process).await {
                Err(TaskError::Refused {
                    code: Code::FAILED_PRECONDITION,
                    ..
                }) => {}
                deleted => return Ok(deleted?),
            }
            sleep(LOOK).await;
        }
    };
    timeout(KILL_TAKES, ended)
        .await
        .unwrap_or(Err(TaskError::Deadline.into()))
}

/// Errors are left to the cleanup, which ends the VM.
async fn kill(task: &Task, process: &Process, container: &ContainerId, status: &str) {
    if status == "paused" {
        let _ = task.resume(container.as_str()).await;
    }
    if task
        .kill(process, libc::SIGKILL.unsigned_abs(), true)
        .await
        .is_ok()
    {
        let _ = timeout(KILL_TAKES, task.wait(process)).await;
    }
}

async fn wait_for_end(found: &Found) {
    let ended = async {
        while found.alive() {
            sleep(LOOK).await;
        }
    };
    let _ = timeout(END, ended).await;
}

/// `coffer reap`: stays until the container ends, and then removes the sandbox.
pub(super) async fn reap(config: &Config, id: &SandboxId) -> Result<(), Error> {
    let (task, process) = live(config, id).await?;
    let _ = task.wait(&process).await;
    delete(config, id, true).await
}
