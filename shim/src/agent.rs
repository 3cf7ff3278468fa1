//! Client of the agent in the guest (`proto/agent.proto`), over the connection on which it dialled home.
//!
//! The agent is the tenant's side: every call has a deadline, every answer is checked before anything else sees it, and
//! [`wire`] ends the connection when the peer speaks out of turn.

mod wire;

use crate::machine::child::printable;
use crate::sandbox::process::ProcessKey;
use crate::spec::DeviceNumber;
use coffer_proto::agent::{
    ChangeMirrorRequest, ContainerRef, CreateContainerRequest, Disk, DiskRef, Empty,
    ExecProcessRequest, Interface, MirrorChange, OnlineCpus, Process, ProcessRef, ProcessResponse,
    ResizeTerminalRequest, SignalProcessRequest, StartSandboxRequest, StatContainerResponse,
    StatGuestResponse, Stdio, UpdateContainerRequest, event,
};
use coffer_proto::agent_ttrpc::AgentClient;
use coffer_proto::exec_failure::Unexecutable;
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
    /// The user's program can't be executed, in the agent's words.
    #[error("{message}")]
    Exec { kind: Unexecutable, message: String },
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

/// A container to be prepared.
#[derive(Debug)]
pub struct NewContainer<'a> {
    pub id: &'a ContainerId,
    /// The OCI spec as JSON.
    pub spec: Vec<u8>,
    pub stdio: Stdio,
    /// The container whose PID namespace it joins.
    pub beside: Option<&'a ContainerId>,
    /// Bytes that the pod's shared memory is to have; 0 leaves it as it is.
    pub shared_memory: u64,
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
        let sent = self.client.start_sandbox(context(deadline), request);
        let answer = answer(call, deadline, sent).await?;
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
        let send = |context| self.client.configure_interface(context, interface);
        self.call("ConfigureInterface", QUICK, send).await.map(drop)
    }

    /// Changes the guest's copy of a volume, mount number `mount` of a container; makes it with `create`.
    pub async fn change_mirror(
        &self,
        id: &ContainerId,
        mount: u32,
        create: bool,
        changes: Vec<MirrorChange>,
    ) -> Result<(), AgentError> {
        let request = ChangeMirrorRequest {
            container_id: id.to_string(),
            mount,
            create,
            changes,
            ..Default::default()
        };
        let send = |context| self.client.change_mirror(context, &request);
        self.call("ChangeMirror", QUICK, send).await.map(drop)
    }

    /// Has the disk of this serial number found; gives its number in the guest.
    pub async fn add_disk(&self, serial: &str) -> Result<DeviceNumber, AgentError> {
        let target = disk(serial);
        let send = |context| self.client.add_disk(context, &target);
        let Disk { major, minor, .. } = self.call("AddDisk", PROCESS, send).await?;
        Ok(DeviceNumber { major, minor })
    }

    /// Has a disk let go of.
    pub async fn remove_disk(&self, serial: &str) -> Result<(), AgentError> {
        let target = disk(serial);
        let send = |context| self.client.remove_disk(context, &target);
        self.call("RemoveDisk", PROCESS, send).await.map(drop)
    }

    /// Prepares a container; gives its init process's pid in the guest.
    pub async fn create_container(&self, new: NewContainer<'_>) -> Result<u32, AgentError> {
        fits("the spec", new.spec.len())?;
        let request = CreateContainerRequest {
            container_id: new.id.to_string(),
            spec: new.spec,
            stdio: Some(new.stdio).into(),
            pid_namespace_of: new.beside.map(ToString::to_string).unwrap_or_default(),
            shared_memory_bytes: new.shared_memory,
            ..Default::default()
        };
        let call = "CreateContainer";
        let send = |context| self.client.create_container(context, &request);
        pid(call, &self.call(call, PROCESS, send).await?)
    }

    /// Prepares another process of a container.
    pub async fn exec_process(
        &self,
        key: &ProcessKey,
        process: Vec<u8>,
        stdio: Stdio,
    ) -> Result<(), AgentError> {
        fits("the process", process.len())?;
        let target = reference(key);
        let request = ExecProcessRequest {
            container_id: target.container_id,
            exec_id: target.exec_id,
            process,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let send = |context| self.client.exec_process(context, &request);
        self.call("ExecProcess", PROCESS, send).await.map(drop)
    }

    /// Lets a prepared process run; gives its pid in the guest.
    pub async fn start_process(&self, key: &ProcessKey) -> Result<u32, AgentError> {
        let (call, target) = ("StartProcess", reference(key));
        let send = |context| self.client.start_process(context, &target);
        pid(call, &self.call(call, PROCESS, send).await?)
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
        let target = reference(key);
        let request = SignalProcessRequest {
            container_id: target.container_id,
            exec_id: target.exec_id,
            signal,
            all,
            ..Default::default()
        };
        let send = |context| self.client.signal_process(context, &request);
        self.call("SignalProcess", QUICK, send).await.map(drop)
    }

    /// Sets the size of a process's terminal.
    pub async fn resize_terminal(
        &self,
        key: &ProcessKey,
        rows: u32,
        columns: u32,
    ) -> Result<(), AgentError> {
        let target = reference(key);
        let request = ResizeTerminalRequest {
            container_id: target.container_id,
            exec_id: target.exec_id,
            rows,
            columns,
            ..Default::default()
        };
        let send = |context| self.client.resize_terminal(context, &request);
        self.call("ResizeTerminal", QUICK, send).await.map(drop)
    }

    /// Forgets an ended process, or a container with everything in it.
    pub async fn delete_process(&self, key: &ProcessKey) -> Result<(), AgentError> {
        let target = reference(key);
        let send = |context| self.client.delete_process(context, &target);
        self.call("DeleteProcess", QUICK, send).await.map(drop)
    }

    /// Freezes a container.
    pub async fn pause_container(&self, id: &ContainerId) -> Result<(), AgentError> {
        let target = container(id);
        let send = |context| self.client.pause_container(context, &target);
        self.call("PauseContainer", QUICK, send).await.map(drop)
    }

    /// Thaws a container.
    pub async fn resume_container(&self, id: &ContainerId) -> Result<(), AgentError> {
        let target = container(id);
        let send = |context| self.client.resume_container(context, &target);
        self.call("ResumeContainer", QUICK, send).await.map(drop)
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
        let send = |context| self.client.update_container(context, &request);
        self.call("UpdateContainer", QUICK, send).await.map(drop)
    }

    /// The container's cgroup figures. Numbers only, so there is nothing to check but their presence.
    pub async fn stat_container(
        &self,
        id: &ContainerId,
    ) -> Result<StatContainerResponse, AgentError> {
        let target = container(id);
        let send = |context| self.client.stat_container(context, &target);
        self.call("StatContainer", QUICK, send).await
    }

    /// The container's processes, with text that is safe to print.
    pub async fn list_processes(&self, id: &ContainerId) -> Result<Vec<Process>, AgentError> {
        let (call, target) = ("ListProcesses", container(id));
        let send = |context| self.client.list_processes(context, &target);
        let mut list = self.call(call, QUICK, send).await?.processes;
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

    /// Brings this many CPUs of the guest online, and takes the others offline.
    pub async fn set_online_cpus(&self, count: u8) -> Result<(), AgentError> {
        let request = OnlineCpus {
            count: count.into(),
            ..Default::default()
        };
        let send = |context| self.client.set_online_cpus(context, &request);
        self.call("SetOnlineCpus", QUICK, send).await.map(drop)
    }

    /// The guest's memory and uptime.
    pub async fn stat_guest(&self) -> Result<StatGuestResponse, AgentError> {
        let empty = Empty::new();
        let send = |context| self.client.stat_guest(context, &empty);
        self.call("StatGuest", QUICK, send).await
    }

    /// Asks the guest to end.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        let empty = Empty::new();
        let send = |context| self.client.shutdown(context, &empty);
        self.call("Shutdown", SHUTDOWN, send).await.map(drop)
    }

    /// One call, with a deadline that counts in how slow the guest is.
    async fn call<R, F>(
        &self,
        name: &'static str,
        deadline: Duration,
        send: impl FnOnce(Context) -> F,
    ) -> Result<R, AgentError>
    where
        F: Future<Output = ttrpc::Result<R>>,
    {
        let deadline = deadline * self.slowness;
        answer(name, deadline, send(context(deadline))).await
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
        ttrpc::Error::RpcStatus(status) => {
            let message = text(&status.message);
            match Unexecutable::find(&status) {
                Some(kind) => AgentError::Exec { kind, message },
                None => AgentError::Refused {
                    call,
                    code: status.code(),
                    message,
                },
            }
        }
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

fn disk(serial: &str) -> DiskRef {
    DiskRef {
        serial: serial.to_owned(),
        ..Default::default()
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
pub(crate) mod tests;
