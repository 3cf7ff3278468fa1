//! One process of the shim's: a container's init, or an exec.
//!
//! ```text
//!            start                 it ends
//!   Created ───────► Running ───────────────► Stopped
//!      └───────────────────────────────────────► ▲
//!              killed, or the program can't run
//! ```

use crate::container::{self, Started};
use crate::events::MemoryWatch;
use crate::reaper::{Ended, Expectation};
use crate::stdio::{Planned, Stdio, StdioError};
use coffer_proto::ids::{ContainerId, ExecId, InvalidId};
use nix::unistd::Pid;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

/// Names a process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcessId {
    pub container: ContainerId,
    /// None for the container's init.
    pub exec: Option<ExecId>,
}

impl ProcessId {
    /// Checks both names; an empty `exec` means the container's init.
    pub fn new(container: &str, exec: &str) -> Result<Self, InvalidId> {
        let exec = if exec.is_empty() {
            None
        } else {
            Some(ExecId::new(exec)?)
        };
        Ok(Self {
            container: ContainerId::new(container)?,
            exec,
        })
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
            None => write!(f, "container {}", self.container),
        }
    }
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Set up, with its namespaces and limits, but not yet running the user's program.
    Created,
    /// Runs the user's program.
    Running,
    /// Has ended and is reaped.
    Stopped(Exit),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    pub ended: Ended,
    /// The kernel killed it because the container had reached its memory limit.
    pub oom_killed: bool,
}

/// Why something could not be done with a process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("{0} was started before")]
    StartedBefore(ProcessId),
    #[error("{0} has ended")]
    Ended(ProcessId),
    #[error("{0} still runs")]
    Running(ProcessId),
    #[error("signal {0} does not exist")]
    NoSuchSignal(u32),
    #[error("the standard streams of {id}")]
    Stdio {
        id: ProcessId,
        #[source]
        cause: StdioError,
    },
    #[error("can't send signal {signal} to {id}")]
    Signal {
        id: ProcessId,
        signal: i32,
        #[source]
        cause: io::Error,
    },
    #[error("can't start {id}")]
    Start {
        id: ProcessId,
        #[source]
        cause: container::Error,
    },
}

/// Exit status of a process that got SIGKILL.
const KILLED: u8 = 128 + 9;

/// A process and what belongs to it.
#[derive(Debug)]
pub struct Process {
    pub id: ProcessId,
    /// In the guest's root PID namespace.
    pub pid: Pid,
    state: watch::Sender<State>,
    /// The process that waits to run its program; None once it was told to.
    created: Mutex<Option<Started>>,
    stdio: Stdio,
    /// We sent it a SIGKILL ourselves.
    killed: AtomicBool,
}

impl Process {
    /// Takes over a process that was just made, and follows it to its end.
    pub fn follow(
        id: ProcessId,
        mut created: Started,
        stdio: Planned,
        expectation: &Expectation,
        memory: Arc<MemoryWatch>,
    ) -> Result<Arc<Self>, ProcessError> {
        let stdio =
            stdio
                .complete(created.terminal.take())
                .map_err(|cause| ProcessError::Stdio {
                    id: id.clone(),
                    cause,
                })?;
        let process = Arc::new(Self {
            id,
            pid: created.pid,
            state: watch::Sender::new(State::Created),
            created: Mutex::new(Some(created)),
            stdio,
            killed: AtomicBool::new(false),
        });
        let end = expectation.claim(process.pid);
        let kills_before = memory.check();
        let followed = process.clone();
        tokio::spawn(async move {
            // The reaper drops no watcher: it lives as long as the machine.
            let Ok(ended) = end.await else { return };
            let killed_by_kernel =
                ended.status == KILLED && !followed.killed.load(Ordering::Relaxed);
            let oom_killed = killed_by_kernel && memory.check() > kills_before;
            followed
                .state
                .send_replace(State::Stopped(Exit { ended, oom_killed }));
            if followed.id.exec.is_none() {
                // In a PID namespace of its own the kernel has done this; in the pod's, nobody else would.
                let _ = spawn_blocking(move || memory.container.kill_all()).await;
            }
        });
        Ok(process)
    }

    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Waits for the end of the process.
    pub async fn wait(&self) -> Exit {
        let mut state = self.state.subscribe();
        loop {
            if let State::Stopped(exit) = *state.borrow_and_update() {
                return exit;
            }
            // The sender is a field of `self`, so there is always a next state to wait for.
            let _ = state.changed().await;
        }
    }

    /// Lets the process run its program.
    pub async fn start(&self) -> Result<(), ProcessError> {
        if let State::Stopped(_) = self.state() {
            return Err(ProcessError::Ended(self.id.clone()));
        }
        let created = lock(&self.created)
            .take()
            .ok_or_else(|| ProcessError::StartedBefore(self.id.clone()))?;
        let released = spawn_blocking(move || created.release()).await;
        match released {
            Ok(Ok(())) => {
                self.state.send_if_modified(|state| {
                    let runs = *state == State::Created;
                    if runs {
                        *state = State::Running;
                    }
                    runs
                });
                Ok(())
            }
            Ok(Err(cause)) => Err(ProcessError::Start {
                id: self.id.clone(),
                cause,
            }),
            // A panic ends the machine; the runtime stops only with it.
            Err(_) => Err(ProcessError::Ended(self.id.clone())),
        }
    }

    /// Ends a process that never ran its program; one that runs is not the agent's to end.
    pub fn give_up(&self) -> Result<(), ProcessError> {
        let created = lock(&self.created).take();
        match self.state() {
            State::Stopped(_) => Ok(()),
            // Dropped here, which ends it.
            State::Created if created.is_some() => Ok(()),
            _ => Err(ProcessError::Running(self.id.clone())),
        }
    }

    /// Its standard streams, for one operation on them.
    pub fn with_stdio<T>(
        &self,
        operation: impl FnOnce(&Stdio) -> Result<T, StdioError>,
    ) -> Result<T, ProcessError> {
        operation(&self.stdio).map_err(|cause| ProcessError::Stdio {
            id: self.id.clone(),
            cause,
        })
    }

    /// Sends it one signal.
    pub fn signal(&self, signal: i32) -> Result<(), ProcessError> {
        // Its pid is not free while the state is not Stopped, but for the moment in which the reaper passes the end on; and
        // pids come round only after all others were used.
        if let State::Stopped(_) = self.state() {
            return Err(ProcessError::Ended(self.id.clone()));
        }
        if signal == libc::SIGKILL {
            self.killed.store(true, Ordering::Relaxed);
        }
        match send_signal(self.pid, signal) {
            Err(gone) if gone.raw_os_error() == Some(libc::ESRCH) => {
                Err(ProcessError::Ended(self.id.clone()))
            }
            Err(cause) => Err(ProcessError::Signal {
                id: self.id.clone(),
                signal,
                cause,
            }),
            Ok(()) => Ok(()),
        }
    }

    /// Notes that this process is killed together with its container.
    pub fn killed_with_container(&self) {
        self.killed.store(true, Ordering::Relaxed);
    }
}

/// Sends a signal, which may be a real-time one: those nix does not know.
#[allow(unsafe_code)]
pub fn send_signal(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two numbers and touches no memory.
    match unsafe { libc::kill(pid.as_raw(), signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A signal number of Linux.
pub fn checked_signal(signal: u32) -> Result<i32, ProcessError> {
    i32::try_from(signal)
        .ok()
        .filter(|signal| (1..=libc::SIGRTMAX()).contains(signal))
        .ok_or(ProcessError::NoSuchSignal(signal))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_checked_and_shown() {
        assert_eq!(ProcessId::new("c", "").unwrap().to_string(), "container c");
        assert_eq!(
            ProcessId::new("c", "e").unwrap().to_string(),
            "exec e of container c"
        );
        assert!(ProcessId::new("", "").is_err() && ProcessId::new("c", "../e").is_err());
    }

    #[test]
    fn signals_are_linux_ones() {
        assert_eq!(checked_signal(64).unwrap(), 64);
        for bad in [0, 65, u32::MAX] {
            assert!(
                checked_signal(bad)
                    .unwrap_err()
                    .to_string()
                    .contains(&bad.to_string())
            );
        }
    }
}
