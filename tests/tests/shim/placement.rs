//! Where the processes of a pod are on the host.

use coffer_tests::bundle::Bundle;
use coffer_tests::shim::Shim;
use coffer_tests::{Test, wait_for};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

/// What a VM may cost the host beside its own memory: `packaging/runtimeclass.yaml` adds as much to a pod's limit.
const OVERHEAD: u64 = 128 << 20;
/// What is left to the VM when it is to run out.
const ROOM: u64 = 16 << 20;

/// Files of a memory cgroup.
struct Files {
    cgroup: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Files {
    /// Of the cgroup with this path, in cgroup v2 or in v1's hierarchy for memory.
    fn of(path: &str) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let (hierarchy, limit, usage) = if root.join("cgroup.controllers").exists() {
            (root.to_owned(), "memory.max", "memory.current")
        } else {
            let files = ("memory.limit_in_bytes", "memory.usage_in_bytes");
            (root.join("memory"), files.0, files.1)
        };
        Self {
            cgroup: hierarchy.join(path),
            limit,
            usage,
        }
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.cgroup.join(file)).unwrap()
    }

    fn usage(&self) -> u64 {
        self.read(self.usage).trim().parse().unwrap()
    }

    /// A line of `memory.stat`.
    fn stat(&self, name: &str) -> u64 {
        let text = self.read("memory.stat");
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        let found = lines.find(|(known, _)| *known == name);
        found.unwrap().1.parse().unwrap()
    }

    /// Pids and names of the processes in it.
    fn processes(&self) -> Vec<(u32, String)> {
        let pids = self.read("cgroup.procs");
        let pids = pids.lines().map(|pid| pid.parse().unwrap());
        pids.map(|pid: u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            (pid, name.trim_end().to_owned())
        })
        .collect()
    }
}

fn oom_score(pid: u32) -> i32 {
    let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    text.trim().parse().unwrap()
}

#[test]
fn a_pods_limit_holds_for_all_of_it_and_the_supervisor_tells_of_its_end() {
    let test = Test::new("place");
    let mut bundle = Bundle::new(&test, "sleep 8; tail -c 150m /dev/zero");
    let cgroup = test.id();
    bundle.config["linux"]["cgroupsPath"] = json!(format!("/{cgroup}"));
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    let task = shim.task();
    task.create("c", &dir, "").unwrap();
    task.start("c", "").unwrap();

    let files = Files::of(&cgroup);
    let processes = files.processes();
    let supervisor = shim.pid();
    assert!(
        processes.iter().any(|(pid, _)| *pid == supervisor),
        "the supervisor {supervisor} is not among {processes:?}"
    );
    let pid_of = |prefix: &str| {
        let mut named = processes.iter();
        let found = named.find(|(_, name)| name.starts_with(prefix));
        found
            .unwrap_or_else(|| panic!("no {prefix} in {processes:?}"))
            .0
    };
    let vmm = pid_of(if test.hypervisor() == "coffer-vmm" {
        "coffer-vmm"
    } else {
        "coffer-qemu"
    });
    for of_vm in [vmm, pid_of("coffer-fsd")] {
        assert!(
            oom_score(of_vm) >= oom_score(supervisor).max(0),
            "{of_vm} is spared"
        );
    }
    if test.hypervisor() == "coffer-vmm" {
        // The guest's memory is a file in memory that nobody else has here.
        let overhead = files.usage() - files.stat("shmem");
        let parts = ["anon", "kernel", "file"].map(|name| (name, files.stat(name) >> 10));
        println!(
            "overhead {} KiB, of which in KiB: {parts:?}",
            overhead >> 10
        );
        assert!(overhead < OVERHEAD, "{overhead}");
    }

    // Memory that the guest takes a moment later.
    fs::write(
        files.cgroup.join(files.limit),
        (files.usage() + ROOM).to_string(),
    )
    .unwrap();
    assert_eq!(task.wait("c", "").unwrap(), 137);
    wait_for("the VM's end to be told", || {
        shim.topics().iter().any(|topic| topic == "/tasks/exit")
    });
    assert_eq!(shim.pid(), supervisor, "it is the same, and alive");
    task.delete("c", "").unwrap();
}
