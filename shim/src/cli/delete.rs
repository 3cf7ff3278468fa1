//! The end of a sandbox: asked of its supervisor, and then made sure of.

use super::client::{Process, Task};
use super::{Error, Found, KILL_TAKES, staging_directory, supervisor};
use crate::config::Config;
use coffer_proto::ids::{ContainerId, SandboxId};
use std::fs;
use std::io;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// From Shutdown to the supervisor's end, and how often is looked.
const END: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(20);
/// A supervisor that does not answer State this fast is not waited for when all is deleted by force anyway.
const ANSWER: Duration = Duration::from_secs(5);

/// `coffer delete`. Without force only for containers that have ended.
pub(super) async fn delete(config: &Config, id: &SandboxId, force: bool) -> Result<(), Error> {
    match Found::sandbox(config, id) {
        Ok(found) if found.alive() => {
            let asked = ask(&found, force).await;
            if !force {
                asked?;
            }
            wait_for_end(&found).await;
        }
        Ok(_) => {}
        // What can't be read can still be removed.
        Err(Error::State(_)) if force => {}
        Err(Error::NoSandbox { .. }) if force || Found::directory(config, id).is_ok() => {}
        Err(error) => return Err(error),
    }
    supervisor::remove(config.root.clone(), id.clone()).await?;
    let staging = staging_directory(&config.root, id);
    match fs::remove_dir_all(&staging) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Io {
            what: format!("can't remove {staging:?}"),
            source,
        }),
        _ => Ok(()),
    }
}

/// Has the supervisor delete all containers, and end.
async fn ask(found: &Found, force: bool) -> Result<(), Error> {
    let task = Task::connect(&found.root, &found.id)
        .await
        .map_err(|error| found.why_gone(error))?;
    for container in found.state.containers.keys() {
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
        task.delete(&process).await?;
    }
    Ok(task.shutdown(&found.id).await?)
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
    let (task, process) = super::live(config, id).await?;
    let _ = task.wait(&process).await;
    delete(config, id, true).await
}
