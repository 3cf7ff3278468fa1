//! `coffer run --bundle DIR ID`: create, start, wait and delete in one command, as an OCI runtime has it.

use super::create::New;
use super::options::RunOptions;
use super::order::StandInProcess;
use super::session::Caller;
use super::stand_in;
use super::{Error, delete, lifecycle};
use crate::config::Config;
use coffer_proto::ids::{ContainerId, SandboxId};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use std::path::Path;

/// Runs it; gives the exit status of the container, or 0 when it is detached.
pub(super) async fn run(
    config: &Config,
    id: &str,
    bundle: &Path,
    options: &RunOptions,
) -> Result<u8, Error> {
    let wrong = |error: coffer_proto::ids::InvalidId| Error::Usage(error.to_string());
    let (id, sandbox) = (
        ContainerId::new(id).map_err(wrong)?,
        SandboxId::new(id).map_err(wrong)?,
    );
    let mut caller = Caller::listen(&stand_in::relayed())?;
    let container = New {
        id,
        bundle,
        options: &options.detached,
        foreground: !options.detach,
    };
    let process = container.create(config).await?;
    if let Err(error) = lifecycle::start(config, &sandbox).await {
        delete::delete(config, &sandbox, true).await?;
        return Err(error);
    }
    if options.detach {
        return Ok(0);
    }
    let status = stay(process, &mut caller).await?;
    if !options.keep {
        delete::delete(config, &sandbox, true).await?;
    }
    Ok(status)
}

/// Passes signals on to the stand-in, which passes them on to the container, until it ends.
async fn stay(process: StandInProcess, caller: &mut Caller) -> Result<u8, Error> {
    let pid = Pid::from_raw(process.pid().cast_signed());
    let ended = process.ended();
    tokio::pin!(ended);
    loop {
        tokio::select! {
            status = &mut ended => return status.map_err(|source| Error::Io {
                what: "can't wait for the container".into(),
                source,
            }),
            signal = caller.next_signal() => relay(pid, signal),
        }
    }
}

/// Also real-time signals, for which there is no name. One that has just ended is no error.
#[allow(unsafe_code)]
fn relay(pid: Pid, signal: i32) {
    match nix::sys::signal::Signal::try_from(signal) {
        Ok(signal) => drop(kill(pid, signal)),
        Err(_) => {
            // SAFETY: no memory is passed; the child is not reaped before the loop that calls this has ended.
            unsafe { libc::kill(pid.as_raw(), signal) };
        }
    }
}
