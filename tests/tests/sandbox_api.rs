//! Pods without a pause container: containerd's Sandbox service, with the test in containerd's place.

use coffer_proto::cri::{
    DNSConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig,
};
use coffer_tests::Test;
use coffer_tests::bundle::Bundle;
use coffer_tests::shim::Shim;
use coffer_tests::task::{Task, code_of};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api;
use serde_json::json;
use std::fs;
use ttrpc::Code;

fn pod_config(pid: NamespaceMode) -> Any {
    let namespaces = NamespaceOption {
        pid: pid.into(),
        ..Default::default()
    };
    let security = LinuxSandboxSecurityContext {
        namespace_options: MessageField::some(namespaces),
        ..Default::default()
    };
    let linux = LinuxPodSandboxConfig {
        security_context: MessageField::some(security),
        sysctls: [("net.core.somaxconn".to_owned(), "77".to_owned())].into(),
        ..Default::default()
    };
    let dns = DNSConfig {
        servers: vec!["192.0.2.53".into()],
        ..Default::default()
    };
    let config = PodSandboxConfig {
        hostname: "pod-host".into(),
        dns_config: MessageField::some(dns),
        linux: MessageField::some(linux),
        ..Default::default()
    };
    Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: config.write_to_bytes().unwrap(),
        ..Default::default()
    }
}

/// A container of a pod without a pause container, with the namespaces that containerd's CRI plugin writes.
fn member(test: &Test, pid: u32, script: &str) -> Bundle {
    // Writable, because the shim puts its files at names that the image lacks.
    let root = test.copy_of("busybox");
    let args = ["/bin/sh", "-c", script];
    let mut bundle = Bundle::on(test, &root, &args).in_sandbox("pod");
    let path = |name: &str| format!("/proc/{pid}/ns/{name}");
    bundle.config["linux"]["namespaces"] = json!([
        {"type": "pid", "path": path("pid")}, {"type": "ipc", "path": path("ipc")}, {"type": "uts", "path": path("uts")},
        {"type": "network", "path": path("net")}, {"type": "mount"}, {"type": "cgroup"},
    ]);
    if let Some(config) = bundle.config.as_object_mut() {
        config.remove("hostname");
    }
    bundle
}

#[test]
fn a_pod_without_a_pause_container_lives_by_the_sandbox_service() {
    let test = Test::new("sandboxapi");
    let dir = test.dir().join("podbundle");
    fs::create_dir(&dir).unwrap();
    let shim = Shim::start(&test, &dir, "pod");
    let pid = start_pod(&shim);
    let task = shim.task();
    let long = member(&test, pid, "echo shared > /dev/shm/long; exec sleep 654");
    task.create("long", long.write(), "").unwrap();
    task.start("long", "").unwrap();
    let out = test.dir().join("out");
    let script = "hostname; cat /proc/sys/net/core/somaxconn; ps | grep -c '[s]leep 654'; cat /etc/resolv.conf /etc/hostname
        cat /dev/shm/long";
    let short = member(&test, pid, script);
    task.create("short", short.write(), out.to_str().unwrap())
        .unwrap();
    task.start("short", "").unwrap();
    assert_eq!(task.wait("short", "").unwrap(), 0);
    assert_eq!(
        fs::read_to_string(&out).unwrap(),
        "pod-host\n77\n1\nnameserver 192.0.2.53\npod-host\nshared\n",
        "names, sysctls, processes, files and shared memory are the pod's"
    );
    task.delete("short", "").unwrap();
    assert!(sandbox_metrics(&shim).cpu.usage_usec > 0);
    task.kill("long", 9).unwrap();
    task.wait("long", "").unwrap();
    task.delete("long", "").unwrap();
    task.shutdown("long").unwrap();
    let connect = api::ConnectRequest {
        id: "pod".into(),
        ..Default::default()
    };
    let connected = task.client().connect(Task::context(), &connect).unwrap();
    assert_eq!(connected.task_pid, pid, "the pod stays without a container");
    end_pod(&shim);
}

fn start_pod(shim: &Shim<'_>) -> u32 {
    let (sandbox, context) = (shim.sandbox(), Task::context);
    let create = sandbox_api::CreateSandboxRequest {
        sandbox_id: "pod".into(),
        bundle_path: shim.bundle.display().to_string(),
        options: MessageField::some(pod_config(NamespaceMode::POD)),
        ..Default::default()
    };
    let start = |id: &str| sandbox_api::StartSandboxRequest {
        sandbox_id: id.into(),
        ..Default::default()
    };
    let early = sandbox.start_sandbox(context(), &start("pod")).unwrap_err();
    assert_eq!(code_of(&early), Some(Code::FAILED_PRECONDITION));
    sandbox.create_sandbox(context(), &create).unwrap();
    let again = sandbox.create_sandbox(context(), &create).unwrap_err();
    assert_eq!(code_of(&again), Some(Code::ALREADY_EXISTS));
    assert_eq!(status(shim).state, "SANDBOX_NOTREADY");
    let other = sandbox
        .start_sandbox(context(), &start("other"))
        .unwrap_err();
    assert_eq!(code_of(&other), Some(Code::NOT_FOUND));
    let started = sandbox.start_sandbox(context(), &start("pod")).unwrap();
    assert!(started.pid > 0 && started.created_at.seconds > 0);
    let now = status(shim);
    assert_eq!(
        (now.state.as_str(), now.pid),
        ("SANDBOX_READY", started.pid)
    );
    assert!(now.info.contains_key("hypervisor") && now.exited_at.is_none());
    let platform = sandbox_api::PlatformRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    let platform = sandbox.platform(context(), &platform).unwrap().platform;
    assert_eq!(
        (platform.os.as_str(), platform.architecture.as_str()),
        ("linux", "amd64")
    );
    let ping = sandbox_api::PingRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    sandbox.ping_sandbox(context(), &ping).unwrap();
    started.pid
}

fn status(shim: &Shim<'_>) -> sandbox_api::SandboxStatusResponse {
    let request = sandbox_api::SandboxStatusRequest {
        sandbox_id: "pod".into(),
        verbose: true,
        ..Default::default()
    };
    shim.sandbox()
        .sandbox_status(Task::context(), &request)
        .unwrap()
}

fn sandbox_metrics(shim: &Shim<'_>) -> Metrics {
    let request = sandbox_api::SandboxMetricsRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    let response = shim.sandbox().sandbox_metrics(Task::context(), &request);
    let metric = response.unwrap().metrics.unwrap();
    assert_eq!(metric.id, "pod");
    Metrics::parse_from_bytes(&metric.data.value).unwrap()
}

fn end_pod(shim: &Shim<'_>) {
    let wait = sandbox_api::WaitSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    let client = shim.sandbox();
    let waiting = std::thread::spawn(move || client.wait_sandbox(Task::context(), &wait).unwrap());
    let stop = sandbox_api::StopSandboxRequest {
        sandbox_id: "pod".into(),
        timeout_secs: 10,
        ..Default::default()
    };
    let sandbox = shim.sandbox();
    for _ in 0..2 {
        sandbox.stop_sandbox(Task::context(), &stop).unwrap();
    }
    let ended = waiting.join().unwrap();
    assert!(ended.exit_status == 0 && ended.exited_at.seconds > 0);
    let now = status(shim);
    assert!(now.state == "SANDBOX_NOTREADY" && now.exited_at == ended.exited_at);
    let shutdown = sandbox_api::ShutdownSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    sandbox
        .shutdown_sandbox(Task::context(), &shutdown)
        .unwrap();
}
