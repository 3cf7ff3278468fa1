//! One process of a container: its init, or an exec.
//!
//! ```text
//!            the agent has it        start             the agent let it run
//! Creating ────────────────► Created ─────► Starting ─────────────────────► Running ◄──► Paused (with its container)
//!     │                         │              │                               │            │
//!     ▼ create failed           └──────────────┴────── it ended ───────────────┴────────────┘
//!  (forgotten)                                            ▼
//!                                                      Stopped
//! ```

use crate::io::ProcessIo;
use coffer_proto::ids::{ContainerId, ExecId};
use std::fmt;
use std::time::SystemTime;
use tokio::sync::watch;

/// The exit status of a process whose VM died, as if SIGKILL had ended it.
pub const VM_DIED: u32 = 137;

/// Names a process of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessKey {
    pub container: ContainerId,
    /// None for the container's init process.
    pub exec: Option<ExecId>,
}

impl ProcessKey {
    /// The init process of a container.
    pub fn init(container: ContainerId) -> Self {
        Self {
            container,
            exec: None,
        }
    }
}

impl fmt::Display for ProcessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
            None => write!(f, "container {}", self.container),
        }
    }
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// The agent is preparing it, or the VM still boots.
    Creating,
    /// Prepared, its streams are attached; it does not run the user's program yet.
    Created,
    /// The agent was asked to let it run.
    Starting,
    Running,
    /// Frozen with its container.
    Paused,
    /// Ended; its exit is known for ever.
    Stopped,
}

impl fmt::Display for ProcessState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// 0-255; 128 + n for signal n.
    pub status: u32,
    /// By the host's clock; the guest's is not trusted.
    pub at: SystemTime,
    /// Set where the process was not the cause of its end.
    pub reason: Option<String>,
    pub oom_killed: bool,
}

/// Where a process's standard streams go, as the caller named them. Empty means /dev/null.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    pub terminal: bool,
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
}

/// A process as the pod's state machine keeps it.
#[derive(Debug)]
pub struct Process {
    pub(super) state: ProcessState,
    pub stdio: StdioPaths,
    /// Its streams, from their attachment to its deletion.
    pub(super) io: Option<ProcessIo>,
    /// The end came while the start was under way: it is told after the start.
    pub(super) early_exit: Option<Exit>,
    /// A delete is under way; every other caller finds nothing.
    pub(super) deleting: bool,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    pub(super) fn new(stdio: StdioPaths) -> Self {
        let exit = watch::Sender::new(None);
        Self {
            state: ProcessState::Creating,
            stdio,
            io: None,
            early_exit: None,
            deleting: false,
            exit,
        }
    }

    pub fn state(&self) -> ProcessState {
        self.state
    }

    /// Its end, if it has ended.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    /// Tells every waiter. Any number of them, before or after the end.
    pub fn waiter(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// The one way into `Stopped`. False when it was stopped already.
    pub(super) fn stop(&mut self, exit: Exit) -> bool {
        if self.state == ProcessState::Stopped {
            return false;
        }
        self.state = ProcessState::Stopped;
        self.exit.send_replace(Some(exit));
        true
    }
}
