//! The verbs of `agent.proto`: each checks its names and objects, calls the sandbox, and puts errors into statuses.
//!
//! | status                | means                                                        |
//! |-----------------------|--------------------------------------------------------------|
//! | `INVALID_ARGUMENT`    | a name, number or OCI object that can't be honoured           |
//! | `NOT_FOUND`           | no such container or exec                                     |
//! | `ALREADY_EXISTS`      | a container or exec of this name exists, the sandbox is started |
//! | `FAILED_PRECONDITION` | not in this state: not started yet, started before, ended     |
//! | `ABORTED`             | `CreateContainer`, `StartProcess`: the program can't be run; an `ExecFailure` has 126 or 127 |
//! | `INTERNAL`            | the kernel refused                                            |

use crate::container::{self, Container};
use crate::cpus::{self, CpuError};
use crate::disks::{self, DiskError};
use crate::guest::{self, GuestError};
use crate::mirror::MirrorError;
use crate::network::{Change, NetworkError};
use crate::process::{Process, ProcessError, ProcessId, checked_signal};
use crate::sandbox::{Sandbox, SandboxError};
use crate::stdio::{Stdio, StdioError};
use async_trait::async_trait;
use coffer_proto::agent::{
    self, ChangeMirrorRequest, ContainerRef, CreateContainerRequest, Disk, DiskRef, Empty, Event,
    ExecProcessRequest, ListProcessesResponse, ProcessRef, ProcessResponse, ResizeTerminalRequest,
    Resync, SignalProcessRequest, StartSandboxRequest, StartSandboxResponse, StatContainerResponse,
    StatGuestResponse, UpdateContainerRequest, WaitProcessResponse,
};
use coffer_proto::agent_ttrpc::Agent;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::ContainerId;
use oci_spec::runtime;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};
use tokio::task::spawn_blocking;
use ttrpc::r#async::TtrpcContext;
use ttrpc::error::{get_rpc_status, get_status};
use ttrpc::{Code, Error as RpcError, Result as RpcResult};

/// The service.
#[derive(Debug)]
pub struct Verbs {
    sandbox: Arc<Sandbox>,
}

impl Verbs {
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }

    /// Runs a request that makes or deletes something to its end, also when the caller's deadline passes or its connection
    /// closes meanwhile: ttrpc drops the handler's future then.
    async fn to_the_end<T, F>(&self, request: impl FnOnce(Arc<Sandbox>) -> F) -> RpcResult<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, SandboxError>> + Send + 'static,
    {
        let done = tokio::spawn(request(self.sandbox.clone())).await;
        done.map_err(status)?.map_err(status)
    }

    fn find(&self, wire: &ProcessRef) -> RpcResult<Arc<Process>> {
        self.sandbox
            .process(&process_id(&wire.container_id, &wire.exec_id)?)
            .map_err(status)
    }

    async fn with_container<T: Send + 'static>(
        &self,
        id: &str,
        action: &'static str,
        operation: impl FnOnce(&Container) -> Result<T, container::Error> + Send + 'static,
    ) -> RpcResult<T> {
        self.sandbox
            .with_container(&container_id(id)?, action, operation)
            .await
            .map_err(status)
    }
}

#[async_trait]
impl Agent for Verbs {
    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> RpcResult<StartSandboxResponse> {
        self.to_the_end(|sandbox| async move { sandbox.start(request).await })
            .await
    }

    async fn configure_interface(
        &self,
        _: &TtrpcContext,
        request: agent::Interface,
    ) -> RpcResult<Empty> {
        let change = Change::try_from(&request).map_err(status)?;
        self.to_the_end(|sandbox| async move { sandbox.configure_interface(&change).await })
            .await?;
        Ok(Empty::new())
    }

    async fn change_mirror(
        &self,
        _: &TtrpcContext,
        request: ChangeMirrorRequest,
    ) -> RpcResult<Empty> {
        let id = container_id(&request.container_id)?;
        self.to_the_end(|sandbox| async move { sandbox.change_mirror(id, request).await })
            .await?;
        Ok(Empty::new())
    }

    async fn add_disk(&self, _: &TtrpcContext, request: DiskRef) -> RpcResult<Disk> {
        self.to_the_end(|_| async move {
            Ok(spawn_blocking(move || disks::add(&request.serial)).await??)
        })
        .await
    }

    async fn remove_disk(&self, _: &TtrpcContext, request: DiskRef) -> RpcResult<Empty> {
        self.to_the_end(|_| async move {
            Ok(spawn_blocking(move || disks::remove(&request.serial)).await??)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> RpcResult<ProcessResponse> {
        let id = process_id(&request.container_id, "")?;
        let spec: runtime::Spec = object(&id, "spec", &request.spec)?;
        let stdio = request.stdio.unwrap_or_default();
        let beside = match &*request.pid_namespace_of {
            "" => None,
            other => Some(container_id(other)?),
        };
        let made = self
            .to_the_end(|sandbox| async move {
                guest::size_shared_memory(request.shared_memory_bytes)?;
                sandbox.create(id, spec, stdio, beside).await
            })
            .await?;
        Ok(pid_of(&made))
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> RpcResult<Empty> {
        let id = process_id(&request.container_id, &request.exec_id)?;
        let exec = id
            .exec
            .clone()
            .ok_or_else(|| invalid("an exec needs an exec id"))?;
        let process: runtime::Process = object(&id, "process", &request.process)?;
        let stdio = request.stdio.unwrap_or_default();
        self.to_the_end(|sandbox| async move { sandbox.exec(id, &exec, process, stdio).await })
            .await?;
        Ok(Empty::new())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRef,
    ) -> RpcResult<ProcessResponse> {
        let process = self.find(&request)?;
        let started = process.clone();
        self.to_the_end(|_| async move { Ok(started.start().await?) })
            .await?;
        Ok(pid_of(&process))
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRef,
    ) -> RpcResult<WaitProcessResponse> {
        let exit = self.find(&request)?.wait().await;
        let since_1970 = exit.ended.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(WaitProcessResponse {
            exit_status: exit.ended.status.into(),
            exited_unix_ns: i64::try_from(since_1970.as_nanos()).unwrap_or(i64::MAX),
            oom_killed: exit.oom_killed,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> RpcResult<Empty> {
        let id = process_id(&request.container_id, &request.exec_id)?;
        let signal = checked_signal(request.signal).map_err(status)?;
        if request.all {
            self.sandbox
                .signal_all(&id.container, signal)
                .await
                .map_err(status)?;
        } else {
            let process = self.sandbox.process(&id).map_err(status)?;
            process.signal(signal).map_err(status)?;
        }
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> RpcResult<Empty> {
        let id = process_id(&request.container_id, &request.exec_id)?;
        let process = self.sandbox.process(&id).map_err(status)?;
        process
            .with_stdio(|stdio| stdio.resize(request.rows, request.columns))
            .map_err(status)?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRef) -> RpcResult<Empty> {
        self.find(&request)?
            .with_stdio(Stdio::close_stdin)
            .map_err(status)?;
        Ok(Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRef) -> RpcResult<Empty> {
        let id = process_id(&request.container_id, &request.exec_id)?;
        self.to_the_end(|sandbox| async move { sandbox.delete(&id).await })
            .await?;
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRef) -> RpcResult<Empty> {
        self.with_container(&request.container_id, "pause", Container::pause)
            .await?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRef) -> RpcResult<Empty> {
        self.with_container(&request.container_id, "resume", Container::resume)
            .await?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> RpcResult<Empty> {
        let id = process_id(&request.container_id, "")?;
        let resources: runtime::LinuxResources = object(&id, "resources", &request.resources)?;
        self.with_container(&request.container_id, "update", move |container| {
            container.update(&resources)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn stat_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRef,
    ) -> RpcResult<StatContainerResponse> {
        self.with_container(
            &request.container_id,
            "read the figures of",
            Container::stat,
        )
        .await
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRef,
    ) -> RpcResult<ListProcessesResponse> {
        let id = container_id(&request.container_id)?;
        let processes = self.sandbox.list(&id).await.map_err(status)?;
        Ok(ListProcessesResponse {
            processes,
            ..Default::default()
        })
    }

    async fn set_online_cpus(
        &self,
        _: &TtrpcContext,
        request: agent::OnlineCpus,
    ) -> RpcResult<Empty> {
        self.to_the_end(|_| async move {
            Ok(spawn_blocking(move || cpus::set_online(request.count)).await??)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> RpcResult<Event> {
        Ok(self.sandbox.events.next().await)
    }

    async fn stat_guest(&self, _: &TtrpcContext, _: Empty) -> RpcResult<StatGuestResponse> {
        guest::stat().map_err(status)
    }

    async fn resync(&self, _: &TtrpcContext, request: Resync) -> RpcResult<Empty> {
        guest::resync(&request).map_err(status)?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> RpcResult<Empty> {
        std::thread::spawn(|| {
            std::thread::sleep(ANSWER_TIME);
            guest::shut_down()
        });
        Ok(Empty::new())
    }
}

/// The answer to `Shutdown` goes out within this time; then the machine goes down.
const ANSWER_TIME: Duration = Duration::from_millis(20);

fn pid_of(process: &Process) -> ProcessResponse {
    ProcessResponse {
        pid: process.pid.as_raw().unsigned_abs(),
        ..Default::default()
    }
}

fn container_id(name: &str) -> RpcResult<ContainerId> {
    ContainerId::new(name).map_err(|error| invalid(&error.to_string()))
}

fn process_id(container: &str, exec: &str) -> RpcResult<ProcessId> {
    ProcessId::new(container, exec).map_err(|error| invalid(&error.to_string()))
}

/// Parses an OCI object of a request.
fn object<T>(id: &ProcessId, field: &str, json: &[u8]) -> RpcResult<T>
where
    T: serde::de::DeserializeOwned + serde::Serialize,
{
    container::parse(json)
        .map_err(|error| invalid(&format!("the {field} of {id}: {}", chain(&error))))
}

fn invalid(message: &str) -> RpcError {
    get_rpc_status(Code::INVALID_ARGUMENT, message)
}

fn status(error: impl Into<SandboxError>) -> RpcError {
    let error = error.into();
    let mut status = get_status(code(&error), chain(&error));
    if let SandboxError::Process(ProcessError::Start { cause, .. })
    | SandboxError::Container { cause, .. } = &error
        && let container::Error::Exec { kind, .. } = cause
    {
        kind.attach(&mut status);
    }
    RpcError::RpcStatus(status)
}

fn code(error: &SandboxError) -> Code {
    match error {
        SandboxError::NotFound(_) => Code::NOT_FOUND,
        SandboxError::Exists(_) | SandboxError::StartedBefore => Code::ALREADY_EXISTS,
        SandboxError::NotStarted | SandboxError::Guest(GuestError::Version { .. }) => {
            Code::FAILED_PRECONDITION
        }
        SandboxError::Network(NetworkError::Invalid { .. }) => Code::INVALID_ARGUMENT,
        SandboxError::Network(NetworkError::NoCard(_))
        | SandboxError::Disk(DiskError::NotFound(_))
        | SandboxError::Mirror(MirrorError::NoCopy { .. }) => Code::NOT_FOUND,
        SandboxError::Guest(GuestError::SysctlName(_) | GuestError::EntropyLength(_)) => {
            Code::INVALID_ARGUMENT
        }
        SandboxError::Cpus(CpuError::Count { .. }) => Code::INVALID_ARGUMENT,
        SandboxError::Container { cause, .. } => container_code(cause),
        SandboxError::Process(error) => process_code(error),
        _ => Code::INTERNAL,
    }
}

fn process_code(error: &ProcessError) -> Code {
    match error {
        ProcessError::StartedBefore(_) | ProcessError::Ended(_) | ProcessError::Running(_) => {
            Code::FAILED_PRECONDITION
        }
        ProcessError::Stdio {
            cause: StdioError::Kernel(_),
            ..
        }
        | ProcessError::Signal { .. } => Code::INTERNAL,
        ProcessError::Stdio {
            cause: StdioError::TerminalSize { .. },
            ..
        } => Code::INVALID_ARGUMENT,
        ProcessError::Stdio { .. } => Code::FAILED_PRECONDITION,
        ProcessError::NoSuchSignal(_) => Code::INVALID_ARGUMENT,
        ProcessError::Start { cause, .. } => container_code(cause),
    }
}

fn container_code(error: &container::Error) -> Code {
    match error {
        container::Error::Refused { .. } => Code::INVALID_ARGUMENT,
        container::Error::Exec { .. } => Code::ABORTED,
        container::Error::Step { .. } => Code::INTERNAL,
    }
}

#[cfg(test)]
mod tests;
