//! One process of the shim's: a container's init, or an exec.
//!
//! ```text
//!            start                 it ends
//!   Created ───────► Running ───────────────► Stopped
//!      └───────────────────────────────────────► ▲
//!              killed, or the program can't run
//! ```

use crate::container::{self, ChildStdio, Started};
use crate::events::MemoryWatch;
use crate::reaper::{Ended, Expectation};
use crate::streams::StreamEnd;
use coffer_proto::agent;
use coffer_proto::ids::{ContainerId, ExecId, InvalidId};
use coffer_proto::stream::Stream;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::Pid;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::unix::pipe;
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
    #[error("{0} has no {1}")]
    NoStream(ProcessId, &'static str),
    #[error("the {1} of {0} is attached already")]
    Attached(ProcessId, &'static str),
    #[error("{0} has no terminal")]
    NoTerminal(ProcessId),
    #[error("signal {0} does not exist")]
    NoSuchSignal(u32),
    #[error("a terminal of {rows} rows and {columns} columns is not possible")]
    TerminalSize { rows: u32, columns: u32 },
    #[error("can't make the standard streams of {id}")]
    Streams {
        id: ProcessId,
        #[source]
        cause: io::Error,
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
    /// The streams it has; None where one is attached.
    streams: Mutex<HashMap<Stream, Option<StreamEnd>>>,
    close_stdin: watch::Sender<bool>,
    /// Master of its terminal.
    terminal: Option<OwnedFd>,
    /// We sent it a SIGKILL ourselves.
    killed: AtomicBool,
}

/// The agent's ends of the standard streams, made before the process.
#[derive(Debug, Default)]
pub struct Stdio {
    ends: HashMap<Stream, StreamEnd>,
    terminal: Option<(bool, bool)>,
    close_stdin: watch::Sender<bool>,
}

/// Room of a stdio pipe: the writer and the agent take turns less often than with the kernel's 64 KiB.
const PIPE_BYTES: i32 = 256 << 10;

impl Stdio {
    /// Makes the pipes that `wire` asks for. Inside a tokio runtime.
    pub fn new(id: &ProcessId, wire: &agent::Stdio) -> Result<(Self, ChildStdio), ProcessError> {
        let mut stdio = Self::default();
        if wire.terminal {
            let (rows, columns) = terminal_size(wire.rows, wire.columns)?;
            stdio.terminal = Some((wire.stdin, wire.stdout));
            return Ok((stdio, ChildStdio::Terminal { rows, columns }));
        }
        let failed = |cause| ProcessError::Streams {
            id: id.clone(),
            cause,
        };
        let child = ChildStdio::Streams {
            stdin: wire
                .stdin
                .then(|| stdio.input())
                .transpose()
                .map_err(failed)?,
            stdout: wire
                .stdout
                .then(|| stdio.output(Stream::Stdout))
                .transpose()
                .map_err(failed)?,
            stderr: wire
                .stderr
                .then(|| stdio.output(Stream::Stderr))
                .transpose()
                .map_err(failed)?,
        };
        Ok((stdio, child))
    }

    /// Returns the child's end.
    fn input(&mut self) -> io::Result<OwnedFd> {
        let (theirs, ours) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        make_ready(&ours)?;
        let end = StreamEnd::Input {
            to: pipe::Sender::from_owned_fd(ours)?,
            closing: self.close_stdin.subscribe(),
        };
        self.ends.insert(Stream::Stdin, end);
        Ok(theirs)
    }

    /// Returns the child's end.
    fn output(&mut self, stream: Stream) -> io::Result<OwnedFd> {
        let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        make_ready(&ours)?;
        self.ends.insert(
            stream,
            StreamEnd::Output(pipe::Receiver::from_owned_fd(ours)?),
        );
        Ok(theirs)
    }

    /// Adds the terminal that came with the process.
    fn add_terminal(&mut self, master: &OwnedFd) -> io::Result<()> {
        let (stdin, stdout) = self.terminal.unwrap_or_default();
        fcntl(master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
        // Not a pipe, but read, written and polled like one.
        if stdin {
            let to = pipe::Sender::from_owned_fd_unchecked(master.try_clone()?)?;
            self.ends.insert(
                Stream::Stdin,
                StreamEnd::Input {
                    to,
                    closing: self.close_stdin.subscribe(),
                },
            );
        }
        if stdout {
            let from = pipe::Receiver::from_owned_fd_unchecked(master.try_clone()?)?;
            self.ends.insert(Stream::Stdout, StreamEnd::Output(from));
        }
        Ok(())
    }
}

/// Sets up our end of a pipe: never blocking, and large where the kernel allows it.
fn make_ready(ours: &OwnedFd) -> io::Result<()> {
    let _ = fcntl(ours, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
    fcntl(ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}

fn terminal_size(rows: u32, columns: u32) -> Result<(u16, u16), ProcessError> {
    match (rows.try_into(), columns.try_into()) {
        (Ok(rows), Ok(columns)) => Ok((rows, columns)),
        _ => Err(ProcessError::TerminalSize { rows, columns }),
    }
}

fn name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdin => "stdin",
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    }
}

impl Process {
    /// Takes over a process that was just made, and follows it to its end.
    pub fn follow(
        id: ProcessId,
        mut created: Started,
        mut stdio: Stdio,
        expectation: &Expectation,
        memory: Arc<MemoryWatch>,
    ) -> Result<Arc<Self>, ProcessError> {
        let terminal = created.terminal.take();
        if let Some(master) = &terminal {
            stdio
                .add_terminal(master)
                .map_err(|cause| ProcessError::Streams {
                    id: id.clone(),
                    cause,
                })?;
        }
        let process = Arc::new(Self {
            id,
            pid: created.pid,
            state: watch::Sender::new(State::Created),
            created: Mutex::new(Some(created)),
            streams: Mutex::new(
                stdio
                    .ends
                    .into_iter()
                    .map(|(stream, end)| (stream, Some(end)))
                    .collect(),
            ),
            close_stdin: stdio.close_stdin,
            terminal,
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

    /// Hands out one stream, once.
    pub fn attach(&self, stream: Stream) -> Result<StreamEnd, ProcessError> {
        match lock(&self.streams).get_mut(&stream) {
            Some(end) => end
                .take()
                .ok_or_else(|| ProcessError::Attached(self.id.clone(), name(stream))),
            None => Err(ProcessError::NoStream(self.id.clone(), name(stream))),
        }
    }

    /// Ends the stdin after what was sent. A terminal has no end of input of its own: there this does nothing.
    pub fn close_stdin(&self) -> Result<(), ProcessError> {
        if self.terminal.is_some() {
            return Ok(());
        }
        let mut streams = lock(&self.streams);
        let end = streams.get_mut(&Stream::Stdin);
        let end =
            end.ok_or_else(|| ProcessError::NoStream(self.id.clone(), name(Stream::Stdin)))?;
        // An end that is not attached has nothing to wait for.
        drop(end.take());
        self.close_stdin.send_replace(true);
        Ok(())
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

    /// Sets the size of its terminal; the kernel sends SIGWINCH.
    #[allow(unsafe_code)]
    pub fn resize(&self, rows: u32, columns: u32) -> Result<(), ProcessError> {
        let (rows, columns) = terminal_size(rows, columns)?;
        let master = self
            .terminal
            .as_ref()
            .ok_or_else(|| ProcessError::NoTerminal(self.id.clone()))?;
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
        match unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } {
            0 => Ok(()),
            _ => Err(ProcessError::Streams {
                id: self.id.clone(),
                cause: io::Error::last_os_error(),
            }),
        }
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

    #[tokio::test]
    async fn only_the_streams_asked_for_are_made() {
        let id = ProcessId::new("c", "").unwrap();
        let wire = agent::Stdio {
            stdin: true,
            stderr: true,
            ..Default::default()
        };
        let (stdio, child) = Stdio::new(&id, &wire).unwrap();
        assert!(matches!(
            child,
            ChildStdio::Streams {
                stdin: Some(_),
                stdout: None,
                stderr: Some(_)
            }
        ));
        assert!(
            stdio.ends.contains_key(&Stream::Stdin) && !stdio.ends.contains_key(&Stream::Stdout)
        );
        let wire = agent::Stdio {
            terminal: true,
            rows: 70_000,
            ..Default::default()
        };
        assert!(matches!(
            Stdio::new(&id, &wire),
            Err(ProcessError::TerminalSize { rows: 70_000, .. })
        ));
    }
}
