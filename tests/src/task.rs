//! A client of a sandbox's Task API, as containerd is one.

use anyhow::{Context, Result};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::{Client, TaskClient, api};
use std::path::Path;
use std::time::Duration;

/// A connection to a supervisor.
pub struct Task {
    client: TaskClient,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").finish_non_exhaustive()
    }
}

impl Task {
    /// Connects to the socket of a sandbox below the state root.
    pub fn connect(root: &Path, sandbox: &str) -> Result<Self> {
        let socket = root.join(sandbox).join("task.sock");
        Self::at(&format!("unix://{}", socket.display()))
    }

    /// Connects to the address that a shim's `start` printed.
    pub fn at(address: &str) -> Result<Self> {
        let client =
            Client::connect(address).with_context(|| format!("can't connect to {address}"))?;
        Ok(Self {
            client: TaskClient::new(client),
        })
    }

    /// The client itself, for calls that have no method here.
    pub fn client(&self) -> &TaskClient {
        &self.client
    }

    /// A deadline for one call.
    pub fn context() -> ttrpc::context::Context {
        let nanos = i64::try_from(Duration::from_secs(120).as_nanos()).expect("it fits");
        ttrpc::context::with_timeout(nanos)
    }

    /// Creates a container from a bundle, with its stdout going to a file or fifo.
    pub fn create(&self, id: &str, bundle: &str, stdout: &str) -> ttrpc::Result<u32> {
        let request = api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.into(),
            stdout: stdout.into(),
            ..Default::default()
        };
        Ok(self.client.create(Self::context(), &request)?.pid)
    }

    /// Prepares a process in a container, without streams.
    pub fn exec(
        &self,
        id: &str,
        exec: &str,
        command: &[&str],
        terminal: bool,
    ) -> ttrpc::Result<()> {
        let process = serde_json::json!({
            "args": command, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"],
        });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            spec: Some(spec).into(),
            terminal,
            ..Default::default()
        };
        self.client.exec(Self::context(), &request).map(drop)
    }

    /// Starts a container, or one of its execs.
    pub fn start(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::StartRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        Ok(self.client.start(Self::context(), &request)?.pid)
    }

    /// Waits for the end of a container or exec and gives its exit status.
    pub fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::WaitRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        Ok(self.client.wait(Self::context(), &request)?.exit_status)
    }

    /// Applies OCI `LinuxResources`.
    pub fn update(&self, id: &str, resources: &serde_json::Value) -> ttrpc::Result<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::UpdateTaskRequest {
            id: id.into(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.client.update(Self::context(), &request).map(drop)
    }

    /// Sends a signal to a container's init process.
    pub fn kill(&self, id: &str, signal: u32) -> ttrpc::Result<()> {
        self.kill_process(id, "", signal)
    }

    /// Signals a container's init, or one of its execs.
    pub fn kill_process(&self, id: &str, exec: &str, signal: u32) -> ttrpc::Result<()> {
        let request = api::KillRequest {
            id: id.into(),
            exec_id: exec.into(),
            signal,
            ..Default::default()
        };
        self.client.kill(Self::context(), &request).map(drop)
    }

    /// Signals every process of a container.
    pub fn kill_all(&self, id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = api::KillRequest {
            id: id.into(),
            signal,
            all: true,
            ..Default::default()
        };
        self.client.kill(Self::context(), &request).map(drop)
    }

    pub fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::DeleteRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        Ok(self.client.delete(Self::context(), &request)?.exit_status)
    }

    /// What containerd calls after every delete.
    pub fn shutdown(&self, id: &str) -> ttrpc::Result<()> {
        let request = api::ShutdownRequest {
            id: id.into(),
            ..Default::default()
        };
        self.client.shutdown(Self::context(), &request).map(drop)
    }

    pub fn state(&self, id: &str, exec: &str) -> ttrpc::Result<api::StateResponse> {
        let request = api::StateRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.client.state(Self::context(), &request)
    }
}

/// The gRPC code of an error, or None where the connection itself failed.
pub fn code_of(error: &ttrpc::Error) -> Option<ttrpc::Code> {
    if let ttrpc::Error::RpcStatus(status) = error {
        Some(status.code())
    } else {
        None
    }
}
