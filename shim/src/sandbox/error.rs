//! What a caller of the sandbox is told, and with which gRPC code.

use super::process::{ProcessKey, ProcessState};
use super::rootfs::RootfsError;
use crate::agent::AgentError;
use crate::cgroup::CgroupPathError;
use crate::cleanup::CleanupError;
use crate::hooks::HookError;
use crate::io::StdioError;
use crate::machine::{BootCause, BootError, DiskError, ResizeError};
use crate::mirror::MirrorError;
use crate::mount_points::MountPointError;
use crate::share::ShareError;
use crate::spec::SpecError;
use crate::state::StateError;
use crate::vmm::VmmError;
use coffer_proto::exec_failure::Unexecutable;
use coffer_proto::ids::InvalidId;
use std::io;
use std::path::PathBuf;
use ttrpc::Code;

/// Why the sandbox did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// containerd's own words, which its clients look for.
    #[error("{0} does not exist")]
    NotFound(ProcessKey),
    #[error("{0}: process already finished")]
    Finished(ProcessKey),
    #[error("{0} already exists")]
    Exists(ProcessKey),
    #[error("can't {verb} {process}: it is {state}")]
    State {
        verb: &'static str,
        process: ProcessKey,
        state: ProcessState,
    },
    #[error("the sandbox has stopped: {0}")]
    Stopped(String),
    #[error("the container belongs to sandbox {wanted}, this is sandbox {this}")]
    OtherSandbox { wanted: String, this: String },
    #[error("the sandbox exists already")]
    SandboxExists,
    #[error("the sandbox was not created")]
    NotPrepared,
    #[error("the sandbox was created, but it is not started")]
    NotStarted,
    #[error("the annotation {0:?} is not known")]
    Annotation(String),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("{what} can't be parsed")]
    Malformed {
        what: &'static str,
        source: serde_json::Error,
    },
    #[error("the signal {0} does not exist")]
    Signal(u32),
    #[error("can't start the process that stands for the container")]
    StandIn(#[source] io::Error),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("can't open the network namespace {path}")]
    NetworkNamespace { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    Network(BootCause),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("the VM's memory can't be changed")]
    Memory(#[source] VmmError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Cgroup(#[from] CgroupPathError),
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    #[error(transparent)]
    MountPoint(#[from] MountPointError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Cleanup(#[from] CleanupError),
    #[error(transparent)]
    Record(#[from] StateError),
    #[error("the supervisor is ending")]
    Ending,
}

impl From<ResizeError> for Error {
    fn from(error: ResizeError) -> Self {
        match error {
            ResizeError::Cpus(error) => Self::Agent(error),
            ResizeError::Memory(error) => Self::Memory(error),
        }
    }
}

impl Error {
    /// Why the program can't be executed, if that is what failed.
    pub fn unexecutable(&self) -> Option<Unexecutable> {
        match self {
            Self::Agent(AgentError::Exec { kind, .. }) => Some(*kind),
            _ => None,
        }
    }

    /// The gRPC status code, as containerd's shims choose it.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) | Self::Finished(_) => Code::NOT_FOUND,
            Self::Exists(_) | Self::SandboxExists => Code::ALREADY_EXISTS,
            Self::State { .. }
            | Self::OtherSandbox { .. }
            | Self::NotPrepared
            | Self::NotStarted => Code::FAILED_PRECONDITION,
            Self::Id(_)
            | Self::Malformed { .. }
            | Self::Signal(_)
            | Self::Spec(_)
            | Self::Cgroup(_)
            | Self::Annotation(_) => Code::INVALID_ARGUMENT,
            Self::Stdio(StdioError::Endpoint(error)) if error.is_bad_request() => {
                Code::INVALID_ARGUMENT
            }
            Self::Rootfs(error) if error.is_bad_request() => Code::INVALID_ARGUMENT,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Stopped(_) | Self::Ending => Code::UNAVAILABLE,
            Self::Agent(AgentError::Deadline { .. }) => Code::DEADLINE_EXCEEDED,
            Self::Agent(AgentError::Broken { .. }) => Code::UNAVAILABLE,
            Self::Agent(AgentError::Refused { code, .. }) => *code,
            Self::Agent(AgentError::Exec { .. }) => Code::ABORTED,
            Self::Agent(AgentError::TooLarge { .. }) => Code::INVALID_ARGUMENT,
            _ => Code::UNKNOWN,
        }
    }
}
