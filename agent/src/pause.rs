//! PID 1 of the PID namespace that the pod's containers share, where the pod asks for one.
//!
//! It must outlive every container, and someone has to reap the orphans in there. The agent can't fork, so it runs
//! itself again; that process makes the namespace, forks its first process, prints that one's pid and ends.

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{ForkResult, fork, pause};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

/// `argv[0]` of the helper.
pub const NAME: &str = "coffer-pause";

/// Why there is no shared PID namespace.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    #[error("can't run the helper for the shared PID namespace")]
    Spawn(#[source] std::io::Error),
    #[error("the helper for the shared PID namespace said {0:?} instead of a pid")]
    NoPid(String),
    #[error("can't open the shared PID namespace of process {pid}")]
    Open {
        pid: u32,
        #[source]
        cause: std::io::Error,
    },
}

/// Makes the namespace and returns its handle. Blocks for the time of one exec.
pub fn make_namespace() -> Result<OwnedFd, PauseError> {
    let mut helper = Command::new("/proc/self/exe")
        .arg0(NAME)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(PauseError::Spawn)?;
    let mut said = String::new();
    // The reaper waits for the helper.
    let stdout = helper.stdout.take();
    stdout
        .map_or(Ok(0), |mut stdout| stdout.read_to_string(&mut said))
        .map_err(PauseError::Spawn)?;
    let pid = said
        .trim_end()
        .parse()
        .map_err(|_| PauseError::NoPid(said))?;
    let namespace = File::open(format!("/proc/{pid}/ns/pid"))
        .map_err(|cause| PauseError::Open { pid, cause })?;
    Ok(namespace.into())
}

/// What the helper does.
#[allow(unsafe_code)]
pub fn main() -> ! {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWPID) {
        eprintln!("can't make a PID namespace: {error}");
        std::process::exit(1);
    }
    // SAFETY: the helper has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => {
            println!("{child}");
            std::process::exit(0)
        }
        Ok(ForkResult::Child) => reap_for_ever(),
        Err(error) => {
            eprintln!("can't fork: {error}");
            std::process::exit(1)
        }
    }
}

/// With SIGCHLD ignored the kernel reaps orphans by itself; other signals don't reach a PID 1 that has no handler.
#[allow(unsafe_code)]
fn reap_for_ever() -> ! {
    // SAFETY: SigIgn is no function of ours that could run in signal context.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    // Whoever reads the pid waits for the end of this pipe.
    let _ = nix::unistd::close(1);
    loop {
        pause();
    }
}
