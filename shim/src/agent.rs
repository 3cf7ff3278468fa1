//! Client of the agent in the guest (`proto/agent.proto`), over the connection on which it dialled home.
//!
//! The agent is the tenant's side: every call has a deadline, every answer is checked before anything else sees it, and
//! [`wire`] ends the connection when the peer speaks out of turn.

mod wire;

use crate::machine::child::printable;
use crate::sandbox::process::ProcessKey;
use coffer_proto::agent::{
    ContainerRef, CreateContainerRequest, Empty, ExecProcessRequest, Interface, Process,
    ProcessRef, ProcessResponse, ResizeTerminalRequest, SignalProcessRequest, StartSandboxRequest,
    StatContainerResponse, StatGuestResponse, Stdio, UpdateContainerRequest, event,
};
use coffer_proto::agent_ttrpc::AgentClient;
use coffer_proto::ids::{ContainerId, ExecId};
use coffer_proto::limits::{MAX_LISTED_PROCESSES, MAX_RPC_MESSAGE};
use std::future::Future;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use ttrpc::context::{self, Context};

/// Calls that only touch the agent's own tables or a file in /sys: answers that come later are of no use to a kubelet.
const QUICK: Duration = Duration::from_secs(2);
/// Calls that run a process: namespaces, mounts and cgroups of the guest.
const PROCESS: Duration = Duration::from_secs(20);
/// The guest syncs its file systems before it answers.
const SHUTDOWN: Duration = Duration::from_secs(3);
/// How much longer the agent may work on a call that nobody waits for any more.
const GRACE: Duration = Duration::from_secs(1);
/// Longest text of the guest in one of our errors.
const MAX_TEXT: usize = 4096;
/// Boot phases that are taken from the agent.
const MAX_PHASES: usize = 32;
/// Room for ids and framing beside a spec in one message.
const FRAMING: usize = 4096;

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("the agent did not answer {call} within {deadline:?}")]
    Deadline {
        call: &'static str,
        deadline: Duration,
    },
    #[error("the connection to the agent broke during {call}: {reason}")]
    Broken { call: &'static str, reason: String },
    /// The agent's own words; they come from the guest.
    #[error("{message}")]
    Refused {
        call: &'static str,
        code: ttrpc::Code,
        message: String,
    },
    #[error("the agent's answer to {call} is not valid: {what}")]
    Invalid { call: &'static str, what: String },
    #[error("{what} of {size} bytes does not fit into a message to the agent")]
    TooLarge { what: &'static str, size: usize },
}

/// What the agent said about its guest.
#[derive(Debug, Clone)]
pub struct Guest {
    pub kernel_release: String,
    /// Name and time since the kernel's start.
    pub phases: Vec<(String, Duration)>,
}

/// How the agent saw a process end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// 0-255
    pub status: u32,
    pub oom_killed: bool,
}

/// The connection. Clones share it.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    /// See [`crate::machine::Hypervisor::slowness`].
    slowness: u32,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("slowness", &self.slowness)
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// Speaks over `home`; nothing is sent yet. Must be called within the runtime.
    pub fn new(home: UnixStream, slowness: u32) -> std::io::Result<Self> {
        home.set_nonblocking(true)?;
        let stream = wire::Checked::new(tokio::net::UnixStream::from_std(home)?);
        let client = ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::new(stream));
        Ok(Self {
            client: AgentClient::new(client),
            slowness,
        })
    }

    /// The first call. It waits in the socket until the guest has booted and the agent has dialled.
    pub async fn start_sandbox(
        &self,
        request: &StartSandboxRequest,
        deadline: Duration,
    ) -> Result<Guest, AgentError> {
        let call = "StartSandbox";
        let answer = answer(
            call,
            deadline,
            self.client.start_sandbox(context(deadline), request),
        )
        .await?;
        if answer.version.is_empty() || answer.kernel_release.is_empty() {
            return Err(invalid(call, "version or kernel release is empty"));
        }
        let phase = |p: &coffer_proto::agent::BootPhase| {
            (text(&p.name), Duration::from_micros(p.since_boot_us))
        };
        Ok(Guest {
            kernel_release: text(&answer.kernel_release),
            phases: answer.phases.iter().take(MAX_PHASES).map(phase).collect(),
        })
    }

    /// Sets up one network interface.
    pub async fn configure_interface(&self, interface: &Interface) -> Result<(), AgentError> {
        let deadline = self.scaled(QUICK);
        answer(
            "ConfigureInterface",
            deadline,
            self.client
                .configure_interface(context(deadline), interface),
        )
        .await?;
        Ok(())
    }

    /// Prepares a container; gives its init process's pid in the guest.
    pub async fn create_container(
        &self,
        id: &ContainerId,
        spec: Vec<u8>,
        stdio: Stdio,
    ) -> Result<u32, AgentError> {
        fits("the spec", spec.len())?;
        let request = CreateContainerRequest {
            container_id: id.to_string(),
            spec,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let deadline = self.scaled(PROCESS);
        pid(
            "CreateContainer",
            &answer(
                "CreateContainer",
                deadline,
                self.client.create_container(context(deadline), &request),
            )
            .await?,
        )
    }

    /// Prepares another process of a container.
    pub async fn exec_process(
        &self,
        key: &ProcessKey,
        process: Vec<u8>,
        stdio: Stdio,
    ) -> Result<(), AgentError> {
        fits("the process", process.len())?;
        let ProcessRef {
            container_id,
            exec_id,
            ..
        } = reference(key);
        let request = ExecProcessRequest {
            container_id,
            exec_id,
            process,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let deadline = self.scaled(PROCESS);
        answer(
            "ExecProcess",
            deadline,
            self.client.exec_process(context(deadline), &request),
        )
        .await?;
        Ok(())
    }

    /// Lets a prepared process run; gives its pid in the guest.
    pub async fn start_process(&self, key: &ProcessKey) -> Result<u32, AgentError> {
        let deadline = self.scaled(PROCESS);
        pid(
            "StartProcess",
            &answer(
                "StartProcess",
                deadline,
                self.client
                    .start_process(context(deadline), &reference(key)),
            )
            .await?,
        )
    }

    /// Waits for the end of a process. The one call without a deadline; it fails when the connection breaks.
    pub async fn wait_process(&self, key: &ProcessKey) -> Result<Ended, AgentError> {
        let call = "WaitProcess";
        let answer = self
            .client
            .wait_process(Context::default(), &reference(key))
            .await
            .map_err(|e| failed(call, e))?;
        if answer.exit_status > 255 {
            return Err(invalid(call, format!("exit status {}", answer.exit_status)));
        }
        Ok(Ended {
            status: answer.exit_status,
            oom_killed: answer.oom_killed,
        })
    }

    /// Signals a process, or with `all` every process of its container.
    pub async fn signal_process(
        &self,
        key: &ProcessKey,
        signal: u32,
        all: bool,
    ) -> Result<(), AgentError> {
        let ProcessRef {
            container_id,
            exec_id,
            ..
        } = reference(key);
        let request = SignalProcessRequest {
            container_id,
            exec_id,
            signal,
            all,
            ..Default::default()
        };
        let deadline = self.scaled(QUICK);
        answer(
            "SignalProcess",
            deadline,
            self.client.signal_process(context(deadline), &request),
        )
        .await?;
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub async fn resize_terminal(
        &self,
        key: &ProcessKey,
        rows: u32,
        columns: u32,
    ) -> Result<(), AgentError> {
        let ProcessRef {
            container_id,
            exec_id,
            ..
        } = reference(key);
        let request = ResizeTerminalRequest {
            container_id,
            exec_id,
            rows,
            columns,
            ..Default::default()
        };
        let deadline = self.scaled(QUICK);
        answer(
            "ResizeTerminal",
            deadline,
            self.client.resize_terminal(context(deadline), &request),
        )
        .await?;
        Ok(())
    }

    /// Forgets an ended process, or a container with everything in it.
    pub async fn delete_process(&self, key: &ProcessKey) -> Result<(), AgentError> {
        let deadline = self.scaled(QUICK);
        answer(
            "DeleteProcess",
            deadline,
            self.client
                .delete_process(context(deadline), &reference(key)),
        )
        .await?;
        Ok(())
    }

    /// Freezes a container.
    pub async fn pause_container(&self, id: &ContainerId) -> Result<(), AgentError> {
        let deadline = self.scaled(QUICK);
        answer(
            "PauseContainer",
            deadline,
            self.client
                .pause_container(context(deadline), &container(id)),
        )
        .await?;
        Ok(())
    }

    /// Thaws a container.
    pub async fn resume_container(&self, id: &ContainerId) -> Result<(), AgentError> {
        let deadline = self.scaled(QUICK);
        answer(
            "ResumeContainer",
            deadline,
            self.client
                .resume_container(context(deadline), &container(id)),
        )
        .await?;
        Ok(())
    }

    /// Applies an OCI `LinuxResources` JSON.
    pub async fn update_container(
        &self,
        id: &ContainerId,
        resources: Vec<u8>,
    ) -> Result<(), AgentError> {
        fits("the resources", resources.len())?;
        let request = UpdateContainerRequest {
            container_id: id.to_string(),
            resources,
            ..Default::default()
        };
        let deadline = self.scaled(QUICK);
        answer(
            "UpdateContainer",
            deadline,
            self.client.update_container(context(deadline), &request),
        )
        .await?;
        Ok(())
    }

    /// The container's cgroup figures. Numbers only, so there is nothing to check but their presence.
    pub async fn stat_container(
        &self,
        id: &ContainerId,
    ) -> Result<StatContainerResponse, AgentError> {
        let deadline = self.scaled(QUICK);
        answer(
            "StatContainer",
            deadline,
            self.client
                .stat_container(context(deadline), &container(id)),
        )
        .await
    }

    /// The container's processes, with text that is safe to print.
    pub async fn list_processes(&self, id: &ContainerId) -> Result<Vec<Process>, AgentError> {
        let deadline = self.scaled(QUICK);
        let call = "ListProcesses";
        let mut list = answer(
            call,
            deadline,
            self.client
                .list_processes(context(deadline), &container(id)),
        )
        .await?
        .processes;
        if list.len() > MAX_LISTED_PROCESSES {
            return Err(invalid(call, format!("{} processes", list.len())));
        }
        for process in &mut list {
            process.command = text(&process.command);
            if !process.exec_id.is_empty() {
                ExecId::new(process.exec_id.as_str()).map_err(|e| invalid(call, e.to_string()))?;
            }
        }
        list.retain(|process| process.pid > 0);
        Ok(list)
    }

    /// Waits for a container that ran out of memory. Fails when the connection breaks, so it also tells the agent's end.
    pub async fn next_oom(&self) -> Result<ContainerId, AgentError> {
        let call = "NextEvent";
        let event = self
            .client
            .next_event(Context::default(), &Empty::new())
            .await
            .map_err(|e| failed(call, e))?;
        match event.kind {
            Some(event::Kind::Oom(oom)) => {
                ContainerId::new(oom.container_id).map_err(|e| invalid(call, e.to_string()))
            }
            _ => Err(invalid(call, "an event of no known kind")),
        }
    }

    /// The guest's memory and uptime.
    pub async fn stat_guest(&self) -> Result<StatGuestResponse, AgentError> {
        let deadline = self.scaled(QUICK);
        answer(
            "StatGuest",
            deadline,
            self.client.stat_guest(context(deadline), &Empty::new()),
        )
        .await
    }

    /// Asks the guest to end.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        let deadline = self.scaled(SHUTDOWN);
        answer(
            "Shutdown",
            deadline,
            self.client.shutdown(context(deadline), &Empty::new()),
        )
        .await?;
        Ok(())
    }

    fn scaled(&self, deadline: Duration) -> Duration {
        deadline * self.slowness
    }
}

fn context(deadline: Duration) -> Context {
    context::with_duration(deadline + GRACE)
}

async fn answer<R>(
    call: &'static str,
    deadline: Duration,
    answer: impl Future<Output = ttrpc::Result<R>>,
) -> Result<R, AgentError> {
    match tokio::time::timeout(deadline, answer).await {
        Ok(result) => result.map_err(|error| failed(call, error)),
        Err(_) => Err(AgentError::Deadline { call, deadline }),
    }
}

fn failed(call: &'static str, error: ttrpc::Error) -> AgentError {
    match error {
        ttrpc::Error::RpcStatus(status) => AgentError::Refused {
            call,
            code: status.code(),
            message: text(&status.message),
        },
        other => AgentError::Broken {
            call,
            reason: text(&other.to_string()),
        },
    }
}

fn invalid(call: &'static str, what: impl Into<String>) -> AgentError {
    AgentError::Invalid {
        call,
        what: what.into(),
    }
}

fn text(raw: &str) -> String {
    printable(&raw.as_bytes()[..raw.len().min(MAX_TEXT)])
}

fn fits(what: &'static str, size: usize) -> Result<(), AgentError> {
    if size > MAX_RPC_MESSAGE - FRAMING {
        Err(AgentError::TooLarge { what, size })
    } else {
        Ok(())
    }
}

fn pid(call: &'static str, answer: &ProcessResponse) -> Result<u32, AgentError> {
    if answer.pid == 0 || i32::try_from(answer.pid).is_err() {
        return Err(invalid(call, format!("pid {}", answer.pid)));
    }
    Ok(answer.pid)
}

fn reference(key: &ProcessKey) -> ProcessRef {
    let exec_id = key
        .exec
        .as_ref()
        .map(ToString::to_string)
        .unwrap_or_default();
    ProcessRef {
        container_id: key.container.to_string(),
        exec_id,
        ..Default::default()
    }
}

fn container(id: &ContainerId) -> ContainerRef {
    ContainerRef {
        container_id: id.to_string(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;
