//! Pods and containers as a kubelet makes them: the same fields, the same order of calls.

use super::grpc::{self, Refused};
use super::node::{IMAGE, Node, state_dir};
use super::stream::Stream;
use crate::wait_for;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::cell::Cell;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// What a kubelet hides from every container that is not privileged.
const MASKED: [&str; 5] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/timer_list",
    "/sys/firmware",
];
const READ_ONLY: [&str; 4] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger"];
/// Grace of a container that ignores SIGTERM, where a test does not choose it.
const GRACE_SECONDS: u32 = 0;

/// A pod; dropped, it is stopped and removed.
#[derive(Debug)]
pub struct Pod<'n> {
    pub node: &'n Node<'n>,
    pub id: String,
    pub config: Value,
    removed: Cell<bool>,
}

/// What a command in a container did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    pub code: u64,
    pub stdout: String,
    pub stderr: String,
}

impl<'n> Pod<'n> {
    pub(super) fn run(
        node: &'n Node<'n>,
        handler: &str,
        name: &str,
        change: Value,
    ) -> Result<Self> {
        // Scenarios that run at a time have pods of the same name.
        let uid = format!("{name}-{}", node.pods.fetch_add(1, Ordering::Relaxed));
        let logs = node.test.dir().join("logs").join(&uid);
        fs::create_dir_all(&logs).context("scratch is ours")?;
        let mut config = json!({
            "metadata": {"name": name, "namespace": "test", "uid": uid, "attempt": 0},
            "hostname": name,
            "log_directory": logs,
            "labels": {"app": name},
            "linux": {
                "cgroup_parent": format!("/{}", node.cgroup),
                "security_context": {
                    "namespace_options": {"network": "POD", "pid": "CONTAINER", "ipc": "POD"},
                    "seccomp": {"profile_type": "RuntimeDefault"},
                },
            },
        });
        merge(&mut config, change);
        let request = json!({"config": config, "runtime_handler": handler});
        let answer = node.cri.call("RunPodSandbox", &request)?;
        Ok(Self {
            node,
            id: text(&answer["pod_sandbox_id"]),
            config,
            removed: Cell::new(false),
        })
    }

    /// Creates and starts a container that runs a shell script; `change` is merged into its configuration.
    pub fn sh(&self, name: &str, script: &str, change: Value) -> Container<'_> {
        self.try_sh(name, script, change)
            .unwrap_or_else(|error| panic!("the container {name} does not run: {error:#}"))
    }

    pub fn try_sh(&self, name: &str, script: &str, change: Value) -> Result<Container<'_>> {
        let container = self.create(name, script, change)?;
        container.start()?;
        Ok(container)
    }

    /// Creates a container without starting it.
    pub fn create(&self, name: &str, script: &str, change: Value) -> Result<Container<'_>> {
        let mut config = json!({
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": IMAGE},
            "command": ["/bin/sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {
                "security_context": {
                    "namespace_options": {"network": "POD", "pid": "CONTAINER", "ipc": "POD"},
                    "seccomp": {"profile_type": "RuntimeDefault"},
                    "masked_paths": MASKED,
                    "readonly_paths": READ_ONLY,
                },
            },
        });
        merge(&mut config, change);
        let log = text(&config["log_path"]);
        let request =
            json!({"pod_sandbox_id": self.id, "config": config, "sandbox_config": self.config});
        let answer = self.node.cri.call("CreateContainer", &request)?;
        Ok(Container {
            pod: self,
            id: text(&answer["container_id"]),
            log: PathBuf::from(text(&self.config["log_directory"])).join(log),
        })
    }

    /// `PodSandboxStatus.status`.
    pub fn status(&self) -> Value {
        let request = json!({"pod_sandbox_id": self.id, "verbose": true});
        self.call("PodSandboxStatus", &request)["status"].clone()
    }

    /// The pod's address on the bridge.
    pub fn ip(&self) -> String {
        text(&self.status()["network"]["ip"])
    }

    /// Its network namespace on the host.
    pub fn netns(&self) -> PathBuf {
        let request = json!({"pod_sandbox_id": self.id, "verbose": true});
        let answer = self.call("PodSandboxStatus", &request);
        let info: Value = serde_json::from_str(&text(&answer["info"]["info"])).expect("JSON");
        let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array();
        let mut all = namespaces.into_iter().flatten();
        let network = all.find(|namespace| namespace["type"] == "network");
        PathBuf::from(text(
            &network.expect("a pod with a pause container")["path"],
        ))
    }

    /// The path of its cgroup on the host.
    pub fn cgroup(&self) -> String {
        format!("/{}/{}", self.node.cgroup, self.id)
    }

    pub fn stats(&self) -> Value {
        self.call("PodSandboxStats", &json!({"pod_sandbox_id": self.id}))["stats"].clone()
    }

    /// Opens a connection to a port on the pod's loopback, through the CRI.
    pub fn forward(&self, port: u16) -> Stream {
        let request = json!({"pod_sandbox_id": self.id, "port": [port]});
        let url = text(&self.call("PortForward", &request)["url"]);
        Stream::open(&format!("{url}?port={port}")).expect("the streaming server answers")
    }

    pub fn stop(&self) {
        self.call("StopPodSandbox", &json!({"pod_sandbox_id": self.id}));
    }

    pub fn remove(&self) {
        self.removed.set(true);
        self.call("RemovePodSandbox", &json!({"pod_sandbox_id": self.id}));
    }

    fn call(&self, method: &str, request: &Value) -> Value {
        must(self.node.cri.call(method, request))
    }

    /// What Coffer's supervisor and the guest said, for a failure.
    fn print_logs(&self) {
        let dir = state_dir(&self.id);
        for name in ["console.log", "vmm.log", "fsd.log", "supervisor.log"] {
            if let Ok(text) = fs::read(dir.join(name)) {
                eprintln!("--- {name}\n{}", String::from_utf8_lossy(&text));
            }
        }
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
            let request = json!({"pod_sandbox_id": self.id});
            let _ = self.node.cri.call("StopPodSandbox", &request);
            let _ = self.node.cri.call("RemovePodSandbox", &request);
        } else if !self.removed.get() {
            self.stop();
            self.remove();
        }
    }
}

/// A container of a pod; it goes with the pod.
#[derive(Debug)]
pub struct Container<'p> {
    pub pod: &'p Pod<'p>,
    pub id: String,
    /// Its CRI log.
    pub log: PathBuf,
}

impl Container<'_> {
    pub fn start(&self) -> Result<()> {
        let request = json!({"container_id": self.id});
        self.pod.node.cri.call("StartContainer", &request).map(drop)
    }

    /// `ContainerStatus.status`.
    pub fn status(&self) -> Value {
        self.call("ContainerStatus", &json!({"container_id": self.id}))["status"].clone()
    }

    /// Waits for the container's end; gives exit code and reason.
    pub fn wait(&self) -> (i64, String) {
        let mut status = Value::Null;
        wait_for(&format!("{} to end", self.log.display()), || {
            status = self.status();
            status["state"] == "CONTAINER_EXITED"
        });
        let code = status["exit_code"].as_i64().expect("an exit code");
        (code, text(&status["reason"]))
    }

    /// Runs a command to its end; 0 seconds means as long as it takes.
    pub fn try_exec(&self, command: &[&str], timeout_seconds: u32) -> Result<Executed> {
        let request = json!({"container_id": self.id, "cmd": command, "timeout": timeout_seconds});
        let answer = self.pod.node.cri.call("ExecSync", &request)?;
        let text = |field: &str| String::from_utf8(grpc::bytes(&answer[field]));
        Ok(Executed {
            code: grpc::number(&answer["exit_code"]),
            stdout: text("stdout")?.trim_end().to_owned(),
            stderr: text("stderr")?.trim_end().to_owned(),
        })
    }

    /// Runs a shell script, which must succeed, and gives its output.
    pub fn sh(&self, script: &str) -> String {
        let done = self.exec(script);
        assert_eq!(done.code, 0, "{script}: {done:?}");
        done.stdout
    }

    /// Runs a shell script to its end.
    pub fn exec(&self, script: &str) -> Executed {
        must(self.try_exec(&["/bin/sh", "-c", script], 0))
    }

    /// Opens the streams of a new process, as `kubectl exec` does.
    pub fn stream(&self, command: &[&str], tty: bool) -> Stream {
        let request = json!({
            "container_id": self.id, "cmd": command, "tty": tty,
            "stdin": true, "stdout": true, "stderr": !tty,
        });
        Stream::open(&text(&self.call("Exec", &request)["url"]))
            .expect("the streaming server answers")
    }

    /// Opens the streams of the container's own process.
    pub fn attach(&self) -> Stream {
        let request = json!({
            "container_id": self.id, "stdin": true, "stdout": true, "stderr": true,
        });
        Stream::open(&text(&self.call("Attach", &request)["url"]))
            .expect("the streaming server answers")
    }

    pub fn stats(&self) -> Value {
        self.call("ContainerStats", &json!({"container_id": self.id}))["stats"].clone()
    }

    /// Changes `linux` resources in place.
    pub fn update(&self, resources: &Value) {
        self.call(
            "UpdateContainerResources",
            &json!({"container_id": self.id, "linux": resources}),
        );
    }

    pub fn stop(&self, grace_seconds: u32) {
        self.call(
            "StopContainer",
            &json!({"container_id": self.id, "timeout": grace_seconds}),
        );
    }

    /// Stops and removes it, so that another attempt can take its name.
    pub fn remove(&self) {
        self.stop(GRACE_SECONDS);
        self.call("RemoveContainer", &json!({"container_id": self.id}));
    }

    /// The lines of the CRI log of one stream, without time and tag.
    pub fn logged(&self, stream: &str) -> Vec<String> {
        let log = fs::read_to_string(&self.log).expect("the CRI plugin writes a log");
        let lines = log.lines().filter_map(|line| {
            let mut words = line.splitn(4, ' ').skip(1);
            (words.next()? == stream).then(|| words.nth(1).unwrap_or("").to_owned())
        });
        lines.collect()
    }

    fn call(&self, method: &str, request: &Value) -> Value {
        must(self.pod.node.cri.call(method, request))
    }
}

fn must<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error:#}"))
}

/// The server's message of a call that must have been refused.
pub fn refusal<T>(result: Result<T>) -> String {
    let error = result.err().expect("the call was to be refused");
    let refused: &Refused = error
        .downcast_ref()
        .unwrap_or_else(|| panic!("not an answer of the server: {error:#}"));
    refused.message.clone()
}

fn text(value: &Value) -> String {
    let text = value.as_str();
    text.unwrap_or_else(|| panic!("{value} is a string"))
        .to_owned()
}

/// Puts `change` over `base`: objects field by field, everything else whole.
pub fn merge(base: &mut Value, change: Value) {
    match (base, change) {
        (Value::Object(base), Value::Object(change)) => {
            for (name, value) in change {
                merge(base.entry(name).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (base, change) => *base = change,
    }
}
