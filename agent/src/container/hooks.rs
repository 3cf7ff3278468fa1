//! Hooks that run in the container: `createContainer` and `startContainer`.
//!
//! Both are looked up in the container's root, since the guest has no files of its own. The other kinds run on the
//! host and never get here.

use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use oci_spec::runtime::{ContainerState, Hook, State, StateBuilder};

use super::failure::{Failure, at};
use super::pidfd;

/// The state a hook reads from its stdin.
pub fn state(id: &str, status: ContainerState, annotations: Option<&Annotations>) -> State {
    let mut state = StateBuilder::default()
        .version("1.2.0")
        .id(id)
        .status(status)
        .pid(nix::unistd::getpid().as_raw())
        .bundle(format!("{}/{id}", coffer_proto::limits::SHARE_DIR))
        .build()
        .expect("every field of a state has a default");
    state.set_annotations(annotations.cloned());
    state
}

pub type Annotations = std::collections::HashMap<String, String>;

/// Runs the hooks in order; the first that fails ends it.
pub fn run_all(kind: &str, hooks: Option<&Vec<Hook>>, state: &State) -> Result<(), Failure> {
    for (i, hook) in hooks.into_iter().flatten().enumerate() {
        let step = format!("hooks.{kind}[{i}] {}", hook.path().display());
        let status = run(hook, state).map_err(at(step.as_str()))?;
        if !status.success() {
            return Err(Failure::new(step, status.to_string()));
        }
    }
    Ok(())
}

fn run(hook: &Hook, state: &State) -> std::io::Result<ExitStatus> {
    let mut command = Command::new(hook.path());
    let args = hook.args().as_deref().unwrap_or_default();
    if let Some((name, rest)) = args.split_first() {
        command.arg0(name).args(rest);
    }
    let env = hook
        .env()
        .iter()
        .flatten()
        .filter_map(|entry| entry.split_once('='));
    command
        .env_clear()
        .envs(env)
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        let json = serde_json::to_vec(state)?;
        match stdin.write_all(&json) {
            // It didn't want to know.
            Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    let timeout = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    if let Some(timeout) = timeout.map(Duration::from_secs)
        && !pidfd::ends_within(pidfd::open(child.id())?.as_fd(), timeout)?
    {
        child.kill()?;
        child.wait()?;
        let message = format!("killed after its timeout of {} s", timeout.as_secs());
        return Err(std::io::Error::new(ErrorKind::TimedOut, message));
    }
    child.wait()
}
