//! A client of one sandbox's Task API, the same that containerd uses (`containerd.task.v3.Task` over ttrpc).

use crate::machine::task_socket;
use coffer_proto::exec_failure::Unexecutable;
use coffer_proto::ids::SandboxId;
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::{self, Code, context};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

/// For calls that only need the supervisor and the agent. The supervisor has shorter deadlines of its own.
const SHORT: Duration = Duration::from_secs(60);
/// For Create, which boots the VM; emulated it takes up to two minutes.
const BOOT: Duration = Duration::from_secs(180);
/// Wait has none: a container may run for years, and the connection's end ends it.
const NEVER: Duration = Duration::ZERO;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error("can't reach the supervisor of sandbox {id}")]
    Connect { id: SandboxId, source: io::Error },
    /// The supervisor's own words.
    #[error("{message}")]
    Refused { code: Code, message: String },
    /// The guest could not execute the program.
    #[error("{message}")]
    Exec { kind: Unexecutable, message: String },
    #[error("the supervisor of the sandbox is gone")]
    Gone,
    #[error("the supervisor of the sandbox did not answer in time")]
    Deadline,
    #[error("the supervisor of the sandbox gave an answer that can't be parsed")]
    Answer,
}

impl From<ttrpc::Error> for TaskError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status)
                if status.code() == Code::DEADLINE_EXCEEDED && status.message.is_empty() =>
            {
                Self::Deadline
            }
            ttrpc::Error::RpcStatus(status) => {
                let message = one_line(&status.message);
                match Unexecutable::find(&status) {
                    Some(kind) => Self::Exec { kind, message },
                    None => Self::Refused {
                        code: status.code(),
                        message,
                    },
                }
            }
            _ => Self::Gone,
        }
    }
}

/// The message passed the guest's agent: no control characters may reach a terminal.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// A process of the sandbox: the container's init, or an exec.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) container: String,
    /// Empty for init.
    pub(super) exec: String,
}

/// Where a process's streams are on the host.
#[derive(Debug, Clone, Default)]
pub(super) struct StdioPaths {
    pub(super) terminal: bool,
    pub(super) stdin: String,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

/// What the supervisor knows of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ProcessState {
    /// OCI's word.
    pub(super) status: &'static str,
    pub(super) pid: u32,
    pub(super) exit_status: u32,
}

/// A connection to one supervisor.
#[derive(Clone)]
pub(super) struct Task {
    client: TaskClient,
}

impl Task {
    /// Connects through the sandbox's open directory, so that the length of the state root does not count.
    pub(super) async fn connect(root: &Path, id: &SandboxId) -> Result<Self, TaskError> {
        let failed = |source| TaskError::Connect {
            id: id.clone(),
            source,
        };
        let socket = task_socket(root, id);
        let (directory, name) = (
            socket.parent().unwrap_or(root),
            socket.file_name().unwrap_or_default(),
        );
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(directory)
            .map_err(failed)?;
        let address = format!(
            "unix:///proc/self/fd/{}/{}",
            directory.as_raw_fd(),
            name.to_string_lossy()
        );
        let client = Client::connect(&address).await;
        let client =
            client.map_err(|error| failed(io::Error::other(one_line(&error.to_string()))))?;
        Ok(Self {
            client: TaskClient::new(client),
        })
    }

    /// Boots the VM when there is none yet, and creates the container of a bundle.
    pub(super) async fn create(
        &self,
        container: &str,
        bundle: &Path,
        stdio: &StdioPaths,
    ) -> Result<(), TaskError> {
        let stdio = stdio.clone();
        let request = api::CreateTaskRequest {
            id: container.into(),
            bundle: bundle.to_string_lossy().into_owned(),
            terminal: stdio.terminal,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            ..Default::default()
        };
        self.client
            .create(context::with_duration(BOOT), &request)
            .await?;
        Ok(())
    }

    /// Prepares an exec; `process` is the OCI process block as JSON.
    pub(super) async fn exec(
        &self,
        process: &Process,
        block: Vec<u8>,
        stdio: &StdioPaths,
    ) -> Result<(), TaskError> {
        let stdio = stdio.clone();
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".into();
        let spec = Any {
            type_url,
            value: block,
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: process.container.clone(),
            exec_id: process.exec.clone(),
            terminal: stdio.terminal,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.client
            .exec(context::with_duration(SHORT), &request)
            .await?;
        Ok(())
    }

    pub(super) async fn start(&self, process: &Process) -> Result<u32, TaskError> {
        let (id, exec_id) = (process.container.clone(), process.exec.clone());
        let request = api::StartRequest {
            id,
            exec_id,
            ..Default::default()
        };
        Ok(self
            .client
            .start(context::with_duration(SHORT), &request)
            .await?
            .pid)
    }

    /// Waits for the process's end and gives its exit status.
    pub(super) async fn wait(&self, process: &Process) -> Result<u32, TaskError> {
        let (id, exec_id) = (process.container.clone(), process.exec.clone());
        let request = api::WaitRequest {
            id,
            exec_id,
            ..Default::default()
        };
        Ok(self
            .client
            .wait(context::with_duration(NEVER), &request)
            .await?
            .exit_status)
    }

    pub(super) async fn kill(
        &self,
        process: &Process,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let (id, exec_id) = (process.container.clone(), process.exec.clone());
        let request = api::KillRequest {
            id,
            exec_id,
            signal,
            all,
            ..Default::default()
        };
        self.client
            .kill(context::with_duration(SHORT), &request)
            .await?;
        Ok(())
    }

    pub(super) async fn resize(
        &self,
        process: &Process,
        rows: u16,
        columns: u16,
    ) -> Result<(), TaskError> {
        let (id, exec_id) = (process.container.clone(), process.exec.clone());
        let (width, height) = (columns.into(), rows.into());
        let request = api::ResizePtyRequest {
            id,
            exec_id,
            width,
            height,
            ..Default::default()
        };
        self.client
            .resize_pty(context::with_duration(SHORT), &request)
            .await?;
        Ok(())
    }

    pub(super) async fn close_stdin(&self, process: &Process) -> Result<(), TaskError> {
        let (id, exec_id) = (process.container.clone(), process.exec.clone());
        let request = api::CloseIORequest {
            id,
            exec_id,
            stdin: true,
            ..Default::default()
        };
        self.client
            .close_io(context::with_duration(SHORT), &request)
            .await?;
        Ok(())
    }

    pub(super) async fn delete(&self, process: &Process) -> Result<(), TaskError> {
        let (id, exec_id) = (process.container.clone(), process.exec.clone());
        let request = api::DeleteRequest {
            id,
            exec_id,
            ..Default::default()
        };
        self.client
            .delete(context::with_duration(SHORT), &request)
            .await?;
        Ok(())
    }

    pub(super) async fn pause(&self, container: &str) -> Result<(), TaskError> {
        let request = api::PauseRequest {
            id: container.into(),
            ..Default::default()
        };
        self.client
            .pause(context::with_duration(SHORT), &request)
            .await?;
        Ok(())
    }

    pub(super) async fn resume(&self, container: &str) -> Result<(), TaskError> {
        let request = api::ResumeRequest {
            id: container.into(),
            ..Default::default()
        };
        self.client
            .resume(context::with_duration(SHORT), &request)
            .await?;
        Ok(())
    }

    pub(super) async fn state(
        &self,
        container: &str,
        deadline: Duration,
    ) -> Result<ProcessState, TaskError> {
        let request = api::StateRequest {
            id: container.into(),
            ..Default::default()
        };
        let state = self
            .client
            .state(context::with_duration(deadline), &request)
            .await?;
        let status = match state.status.value() {
            1 => "created",
            2 => "running",
            3 => "stopped",
            4 | 5 => "paused",
            _ => "creating",
        };
        Ok(ProcessState {
            status,
            pid: state.pid,
            exit_status: state.exit_status,
        })
    }

    /// Changes the limits; `resources` is OCI's `linux.resources` as JSON.
    pub(super) async fn update(
        &self,
        container: &str,
        resources: Vec<u8>,
    ) -> Result<(), TaskError> {
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into();
        let resources = Any {
            type_url,
            value: resources,
            ..Default::default()
        };
        let request = api::UpdateTaskRequest {
            id: container.into(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.client
            .update(context::with_duration(SHORT), &request)
            .await?;
        Ok(())
    }

    pub(super) async fn stats(&self, container: &str) -> Result<Metrics, TaskError> {
        let request = api::StatsRequest {
            id: container.into(),
            ..Default::default()
        };
        let stats = self
            .client
            .stats(context::with_duration(SHORT), &request)
            .await?;
        Metrics::parse_from_bytes(&stats.stats.value).map_err(|_| TaskError::Answer)
    }

    /// Ends the supervisor, if no container is left.
    pub(super) async fn shutdown(&self, sandbox: &SandboxId) -> Result<(), TaskError> {
        self.end(sandbox, false).await
    }

    /// Ends the supervisor, whatever it is doing.
    pub(super) async fn shutdown_now(&self, sandbox: &SandboxId) -> Result<(), TaskError> {
        self.end(sandbox, true).await
    }

    async fn end(&self, sandbox: &SandboxId, now: bool) -> Result<(), TaskError> {
        let request = api::ShutdownRequest {
            id: sandbox.to_string(),
            now,
            ..Default::default()
        };
        match self
            .client
            .shutdown(context::with_duration(SHORT), &request)
            .await
        {
            // It may end before its answer is read.
            Ok(_) => Ok(()),
            Err(error) => match error.into() {
                TaskError::Gone => Ok(()),
                error => Err(error),
            },
        }
    }
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").finish_non_exhaustive()
    }
}
