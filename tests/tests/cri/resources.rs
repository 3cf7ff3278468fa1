//! Limits, their change in place, and what happens when they are reached.

use crate::{APP, COFFER};
use coffer_tests::cri::snapshotter::UNKNOWN_TYPE;
use coffer_tests::cri::{Config, Container, Handler, Node, Pod, pod};
use coffer_tests::memory_cgroup::MemoryCgroup;
use coffer_tests::mounted::Mounted;
use coffer_tests::{leaks, wait_for};
use serde_json::{Value, json};
use std::fs;

const MIB: u64 = 1 << 20;

fn resources(resources: &Value) -> Value {
    json!({"linux": {"resources": resources}})
}

fn memory(bytes: u64) -> Value {
    resources(&json!({"memory_limit_in_bytes": bytes.to_string()}))
}

fn memory_and_cpus(mib: u64, percent: u64) -> Value {
    let quota = (percent * 1000).to_string();
    json!({"memory_limit_in_bytes": (mib * MIB).to_string(), "cpu_period": "100000", "cpu_quota": quota})
}

pub fn limits_and_their_change(node: &Node<'_>) {
    let pod = node.pod(COFFER, "limits", json!({}));
    let hungry = pod.sh("hungry", "tail /dev/zero", memory(24 * MIB));
    // The same inside the container: the shell lives, its child is killed.
    let child = pod.sh("child", "tail /dev/zero; echo $?", memory(24 * MIB));
    let limits = json!({
        "memory_limit_in_bytes": (64 * MIB).to_string(), "cpuset_cpus": "0", "unified": {"pids.max": "23"},
    });
    let app = pod.sh("app", APP, resources(&limits));
    let files = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight pids.max cpuset.cpus";
    assert_eq!(
        app.sh(files),
        format!("{}\nmax 100000\n100\n23\n0", 64 * MIB)
    );
    app.update(&json!({
        "memory_limit_in_bytes": (96 * MIB).to_string(),
        "cpu_period": "100000", "cpu_quota": "50000", "cpu_shares": "512",
    }));
    assert_eq!(
        app.sh(files),
        format!("{}\n50000 100000\n20\n23\n0", 96 * MIB)
    );
    assert_eq!(app.status()["state"], "CONTAINER_RUNNING");
    assert_eq!(hungry.wait(), (137, "OOMKilled".into()));
    child.wait();
    assert_eq!(child.logged("stdout"), ["137"]);
    huge_pages(&pod);
}

/// MiB of the guest's memory, and its CPUs.
fn size(container: &Container<'_>) -> (u64, u64) {
    let words = container.sh("awk '/MemTotal/ {print $2}' /proc/meminfo; nproc");
    let mut numbers = words.split_whitespace().map(|word| word.parse().unwrap());
    let mut next = || numbers.next().unwrap();
    (next() / 1024, next())
}

/// The VM has the size that the pod says, and that of its containers' limits while they run. It is in the pod's cgroup.
pub fn the_vm_follows_the_limits(node: &Node<'_>) {
    let pod = node.pod(COFFER, "sized", resources(&memory_and_cpus(200, 200)));
    let app = pod.sh("app", APP, resources(&memory_and_cpus(64, 50)));
    let of_pod = |pid: &u32| {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"));
        cgroup.is_ok_and(|cgroup| cgroup.contains(&pod.cgroup()))
    };
    let all = leaks::descendants(std::process::id()).unwrap();
    let programs: Vec<_> = all
        .into_iter()
        .filter(of_pod)
        .map(leaks::command_line)
        .collect();
    for program in ["coffer-fsd", node.test.hypervisor()] {
        assert!(
            programs.iter().any(|line| line.contains(program)),
            "{programs:?}"
        );
    }

    // The overhead of 128 MiB included; a part is the kernel's, before it counts.
    let (boot, _) = size(&app);
    assert!((200..=328).contains(&boot), "{boot} MiB");
    let cpus = |count| wait_for("the CPUs", || size(&app).1 == count);
    cpus(1);
    app.update(&memory_and_cpus(512, 200));
    cpus(2);
    if node.test.hypervisor() == "coffer-vmm" {
        let grown = size(&app).0;
        assert!(grown >= boot + 300, "{boot} MiB, then {grown} MiB");
    }
    app.update(&memory_and_cpus(64, 50));
    cpus(1);
    wait_for("the VM to give its memory back", || {
        size(&app).0 <= boot + 8
    });
    host_out_of_memory(&pod, &app);
}

/// Two pages, in an emptyDir of medium HugePages.
fn huge_pages(pod: &Pod<'_>) {
    let point = pod.node.test.dir().join("pages");
    let _pages = Mounted::new(&point, &["-t", "hugetlbfs", "-o", "pagesize=2M", "none"]);
    let limit = json!([{"page_size": "2MB", "limit": (4 * MIB).to_string()}]);
    let mut config = resources(&json!({"hugepage_limits": limit}));
    config["mounts"] = json!([{"host_path": point, "container_path": "/huge"}]);
    let app = pod.sh("huge", APP, config);
    assert_eq!(app.sh("stat -f -c %s /huge"), (2 * MIB).to_string());
    // containerd leaves the limit out where the host could not hold it.
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    if controllers.is_ok_and(|all| all.contains("hugetlb")) {
        let limit = app.sh("fallocate -l 4194304 /huge/two; cat /sys/fs/cgroup/hugetlb.2MB.max");
        assert_eq!(limit, (4 * MIB).to_string());
        assert_ne!(app.exec("fallocate -l 2097152 /huge/three").code, 0);
    }
    app.remove();
}

/// The host's kernel kills the VM, whose containers are said to have been killed for want of memory.
fn host_out_of_memory(pod: &Pod<'_>, app: &Container<'_>) {
    // It takes memory that the guest has not touched yet, and no limit of its own ends it.
    let hungry = pod.create("hungry", "tail -c 150m /dev/zero", json!({}));
    let hungry = hungry.unwrap();
    MemoryCgroup::at(&pod.cgroup()).leave(16 * MIB);
    // Its end may come before the answer.
    let _ = hungry.start();
    assert_eq!(app.wait(), (137, "OOMKilled".into()));
    wait_for("the pod to be told dead", || {
        pod.status()["state"] == "SANDBOX_NOTREADY"
    });
}

/// Handlers with a configuration that is wrong, and the word of it that an error must name.
const WRONG: [(Handler<'static>, &str); 5] = [
    wrong("wrong-type", Config::File("vcpus = \"many\""), "vcpus"),
    wrong("unknown-key", Config::File("vpcus = 2"), "vpcus"),
    wrong(
        "no-image",
        Config::File("initrd = \"/nowhere/initrd\""),
        "/nowhere/initrd",
    ),
    wrong("wrong-option", Config::Inline("vcpus = \"many\""), "vcpus"),
    wrong("wrong-root", Config::Snapshotter, UNKNOWN_TYPE),
];

const fn wrong(
    name: &'static str,
    config: Config<'static>,
    named: &'static str,
) -> (Handler<'static>, &'static str) {
    (Handler { name, config }, named)
}

/// The handlers that [`wrong_configurations`] needs.
pub fn wrong_handlers() -> [Handler<'static>; 5] {
    WRONG.map(|(handler, _)| handler)
}

/// What is wrong with a handler or an annotation is said to the caller of the CRI.
pub fn wrong_configurations(node: &Node<'_>) {
    // containerd 1.6 hands over a file only, none of which means that all is as by default, and has one snapshotter for all handlers.
    let old = node.version().starts_with("1.6");
    for (handler, named) in WRONG {
        if !old || matches!(handler.config, Config::File(_)) {
            let message = pod::refusal(node.try_pod(handler.name, "wrong", json!({})));
            assert!(message.contains(named), "{}: {message}", handler.name);
        }
    }
    let annotated = json!({"annotations": {"io.coffer.no-such-thing": "1"}});
    let message = pod::refusal(node.try_pod(COFFER, "wrong", annotated));
    assert!(message.contains("io.coffer.no-such-thing"), "{message}");
}
