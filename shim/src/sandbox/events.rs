//! What the outside sees of a pod: its state, its processes, what happens to them.

use super::process::{Exit, ProcessKey, ProcessState, StdioPaths, VM_DIED};
use coffer_proto::ids::{ContainerId, ExecId};
use std::path::PathBuf;
use std::time::SystemTime;

/// Where the pod is in its life; the diagram is in [`super`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SandboxState {
    /// The supervisor serves; nobody has asked for a container.
    New,
    /// The first container was asked for and the VM boots.
    Creating,
    /// The agent has answered.
    Running,
    /// The VM is ending or has died, and what it owned on the host is being freed.
    Stopping { reason: String },
    /// Nothing of the VM is left. Containers keep their exit status until they are deleted.
    Stopped { reason: String },
}

impl SandboxState {
    /// No verb that needs the guest works any more.
    pub fn has_ended(&self) -> bool {
        self.end_reason().is_some()
    }

    /// Why it ends or has ended.
    pub fn end_reason(&self) -> Option<&str> {
        match self {
            Self::Stopping { reason } | Self::Stopped { reason } => Some(reason),
            Self::New | Self::Creating | Self::Running => None,
        }
    }
}

/// What the outside is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TaskEvent {
    Create {
        container: ContainerId,
        bundle: PathBuf,
        stdio: StdioPaths,
        pid: u32,
    },
    Start {
        container: ContainerId,
        pid: u32,
    },
    ExecAdded {
        container: ContainerId,
        exec: ExecId,
    },
    ExecStarted {
        container: ContainerId,
        exec: ExecId,
        pid: u32,
    },
    Oom {
        container: ContainerId,
    },
    Paused {
        container: ContainerId,
    },
    Resumed {
        container: ContainerId,
    },
    Exit {
        process: ProcessKey,
        pid: u32,
        exit: Exit,
    },
    Delete {
        process: ProcessKey,
        pid: u32,
        exit: Exit,
    },
}

/// What is known of the sandbox as a whole.
#[derive(Debug, Clone)]
pub struct SandboxDescription {
    /// 0 before there is a VM.
    pub pid: u32,
    pub state: SandboxState,
    pub created: SystemTime,
    /// When the last of the VM was gone.
    pub ended: Option<SystemTime>,
    /// Its end was asked for.
    pub ended_in_order: bool,
}

impl SandboxDescription {
    /// As of a process: 0 after an end in order, 137 when the VM died.
    pub fn exit_status(&self) -> u32 {
        if self.ended_in_order { 0 } else { VM_DIED }
    }
}

/// What `State` answers.
#[derive(Debug, Clone)]
pub struct Description {
    pub bundle: PathBuf,
    pub pid: u32,
    pub state: ProcessState,
    pub stdio: StdioPaths,
    pub exit: Option<Exit>,
}
