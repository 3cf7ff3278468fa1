//! containerd's Task service: one short method per RPC, which checks the request and calls the sandbox. Its Sandbox service is in
//! `sandbox`.
//!
//! The messages of `containerd.task.v2.Task` and `containerd.task.v3.Task` are the same, so one table serves both names.
//! A verb that changes something runs as a task of its own: a client that hangs up or whose deadline passes
//! can't leave it half done.

pub mod events;
mod sandbox;
mod stats;

use crate::check::choose_hypervisor;
use crate::containerd::options;
use crate::machine::SandboxOptions;
use crate::sandbox::create::{NewContainer, NewExec};
use crate::sandbox::events::Description;
use crate::sandbox::process::{ProcessKey, ProcessState, StdioPaths};
use crate::sandbox::rootfs::RootfsMount;
use crate::sandbox::{Error, Sandbox};
use async_trait::async_trait;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::{ContainerId, ExecId};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use ttrpc::r#async::{Service, TtrpcContext};

const V3: &str = "containerd.task.v3.Task";
const V2: &str = "containerd.task.v2.Task";

/// The service of one sandbox.
#[derive(Debug, Clone)]
pub struct TaskService {
    sandbox: Sandbox,
    /// CRI-O names the configuration not at start, but with each container. The first one's counts.
    configured_late: bool,
    /// Told when the last caller wants the supervisor to end.
    end: Arc<Notify>,
}

impl TaskService {
    pub fn new(sandbox: Sandbox, configured_late: bool, end: Arc<Notify>) -> Self {
        Self {
            sandbox,
            configured_late,
            end,
        }
    }

    async fn configure(&self, options: &Any) -> ttrpc::Result<()> {
        let refuse =
            |error: &dyn std::error::Error| rpc_error(ttrpc::Code::INVALID_ARGUMENT, chain(error));
        let config = options::config(Some(options)).map_err(|error| refuse(&error))?;
        let choice = choose_hypervisor(config.hypervisor, &config.libexec())
            .map_err(|error| refuse(&error))?;
        let now = self.sandbox.options();
        let options = SandboxOptions {
            root: now.root.clone(),
            namespace: now.namespace.clone(),
            debug: now.debug || config.debug,
            ..config.sandbox(now.id.clone(), choice.hypervisor)
        };
        self.sandbox.reconfigure(options).await.map_err(status)
    }

    /// The Task methods under both names, and those of the Sandbox service.
    pub fn services(self) -> HashMap<String, Service> {
        let service = Arc::new(self);
        let mut services = create_task(service.clone());
        let again = create_task(service.clone()).remove(V3);
        services.extend(again.map(|table| (V2.to_owned(), table)));
        services.extend(create_sandbox(service));
        services
    }
}

/// Runs a verb to its end, whatever becomes of its caller.
async fn whole<T: Send + 'static>(
    verb: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(verb).await {
        Ok(result) => result.map_err(status),
        Err(panic) => Err(rpc_error(ttrpc::Code::INTERNAL, panic.to_string())),
    }
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "the shape that map_err takes"
)]
fn status(error: Error) -> ttrpc::Error {
    let message = chain(&error);
    tracing::debug!(code = ?error.code(), message, "refused");
    let mut status = ttrpc::get_status(error.code(), message);
    if let Some(kind) = error.unexecutable() {
        kind.attach(&mut status);
    }
    ttrpc::Error::RpcStatus(status)
}

fn rpc_error(code: ttrpc::Code, message: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

fn container(id: String) -> ttrpc::Result<ContainerId> {
    ContainerId::new(id).map_err(|error| status(error.into()))
}

fn key(id: String, exec_id: String) -> ttrpc::Result<ProcessKey> {
    let exec = if exec_id.is_empty() {
        None
    } else {
        Some(ExecId::new(exec_id).map_err(|error| status(error.into()))?)
    };
    Ok(ProcessKey {
        container: container(id)?,
        exec,
    })
}

fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let nanos = i32::try_from(since.subsec_nanos()).expect("below one thousand million");
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    MessageField::some(Timestamp {
        seconds,
        nanos,
        ..Default::default()
    })
}

fn status_of(state: ProcessState) -> api::Status {
    match state {
        ProcessState::Creating | ProcessState::Created | ProcessState::Starting => {
            api::Status::CREATED
        }
        ProcessState::Running => api::Status::RUNNING,
        ProcessState::Paused => api::Status::PAUSED,
        ProcessState::Stopped => api::Status::STOPPED,
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(status(Error::Unsupported("restoring a checkpoint")));
        }
        if let Some(options) = request.options.as_ref()
            && self.configured_late
        {
            self.configure(options).await?;
        }
        let mount = |mount: api::Mount| RootfsMount {
            fs_type: mount.type_,
            source: mount.source.into(),
            target: mount.target.into(),
            options: mount.options,
        };
        let new = NewContainer {
            id: container(request.id)?,
            bundle: request.bundle.into(),
            stdio: StdioPaths {
                terminal: request.terminal,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            },
            rootfs: request.rootfs.into_iter().map(mount).collect(),
        };
        let sandbox = self.sandbox.clone();
        let pid = whole(async move { sandbox.create(new).await }).await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let (sandbox, key) = (self.sandbox.clone(), key(request.id, request.exec_id)?);
        let pid = whole(async move { sandbox.start(key).await }).await?;
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let (sandbox, key) = (self.sandbox.clone(), key(request.id, request.exec_id)?);
        let (pid, exit) = whole(async move { sandbox.delete(key).await }).await?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let new = NewExec {
            container: container(request.id)?,
            exec: ExecId::new(request.exec_id).map_err(|error| status(error.into()))?,
            process: request.spec.into_option().unwrap_or_default().value,
            stdio: StdioPaths {
                terminal: request.terminal,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            },
        };
        let sandbox = self.sandbox.clone();
        whole(async move { sandbox.exec(new).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let key = key(request.id, request.exec_id)?;
        self.sandbox
            .resize(key, request.height, request.width)
            .await
            .map_err(status)?;
        Ok(Empty::new())
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        let key = key(request.id.clone(), request.exec_id.clone())?;
        let Description {
            bundle,
            pid,
            state,
            stdio,
            exit,
        } = self.sandbox.describe(key).await.map_err(status)?;
        Ok(api::StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: bundle.to_string_lossy().into_owned(),
            pid,
            status: status_of(state).into(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exit_status: exit.as_ref().map_or(0, |exit| exit.status),
            exited_at: exit.map_or(MessageField::none(), |exit| timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let id = container(request.id)?;
        let processes = self.sandbox.processes(id.clone()).await.map_err(status)?;
        let info = |process: coffer_proto::agent::Process| {
            let details = ProcessDetails {
                exec_id: process.exec_id,
                ..Default::default()
            };
            let info = if details.exec_id.is_empty() {
                None
            } else {
                Some(any("containerd.runc.v1.ProcessDetails", &details))
            };
            api::ProcessInfo {
                pid: process.pid,
                info: info.into(),
                ..Default::default()
            }
        };
        let mut processes: Vec<_> = processes.into_iter().map(info).collect();
        if processes.is_empty() {
            // A task without processes is a shim that leaked for containerd 1.7, which then throws the exit status away.
            let init = self.sandbox.describe(ProcessKey::init(id)).await;
            processes.push(api::ProcessInfo {
                pid: init.map_err(status)?.pid,
                ..Default::default()
            });
        }
        Ok(api::PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        let (sandbox, id) = (self.sandbox.clone(), container(request.id)?);
        whole(async move { sandbox.pause(id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        let (sandbox, id) = (self.sandbox.clone(), container(request.id)?);
        whole(async move { sandbox.resume(id).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        Err(status(Error::Unsupported("checkpoint")))
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        let (sandbox, key) = (self.sandbox.clone(), key(request.id, request.exec_id)?);
        whole(async move { sandbox.kill(key, request.signal, request.all).await }).await?;
        Ok(Empty::new())
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<Empty> {
        if request.stdin {
            let key = key(request.id, request.exec_id)?;
            self.sandbox.close_stdin(key).await.map_err(status)?;
        }
        Ok(Empty::new())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        let resources = request.resources.into_option().unwrap_or_default().value;
        self.sandbox
            .update(container(request.id)?, resources)
            .await
            .map_err(status)?;
        Ok(Empty::new())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let exit = self
            .sandbox
            .wait(key(request.id, request.exec_id)?)
            .await
            .map_err(status)?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let id = container(request.id)?;
        let figures = match self.sandbox.stats(id.clone()).await {
            // The guest is gone, but what its end was is asked for until the container is deleted.
            Err(error) => match self.sandbox.describe(ProcessKey::init(id)).await {
                Ok(Description {
                    exit: Some(exit), ..
                }) => stats::of_ended(&exit),
                _ => return Err(status(error)),
            },
            Ok(figures) => figures,
        };
        Ok(api::StatsResponse {
            stats: MessageField::some(any(stats::TYPE, &stats::metrics(&figures))),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        let task = self
            .sandbox
            .describe(ProcessKey::init(container(request.id.clone())?))
            .await;
        let pid = match task {
            Ok(task) => task.pid,
            // containerd also asks after a sandbox that has no container of its name.
            Err(error) => match self.sandbox.prepared().await {
                Some(pod) if request.id == self.sandbox.options().id.as_str() => pod.pid,
                _ => return Err(status(error)),
            },
        };
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: pid,
            version: coffer_proto::VERSION.to_owned(),
            ..Default::default()
        })
    }

    /// Called after every delete; only a sandbox that nobody needs ends by it, unless `now` is set.
    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        let service = self.clone();
        whole(async move {
            if !request.now && !service.sandbox.is_unneeded().await {
                return Ok(());
            }
            service.sandbox.stop("shut down").await;
            service.end.notify_one();
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }
}

fn any(type_url: &str, message: &impl Message) -> Any {
    let value = message
        .write_to_bytes()
        .expect("a message in memory can be written");
    Any {
        type_url: type_url.to_owned(),
        value,
        ..Default::default()
    }
}
