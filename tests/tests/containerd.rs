//! containerd drives Coffer as `io.containerd.coffer.v2`: the Task API through `ctr`, with a containerd of each test's own.

use coffer_tests::containerd::{NEXT, program};
use coffer_tests::{Test, asset, finish, host, leaks, wait_for};
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const IMAGE: &str = "docker.io/library/busybox:test";
const RUNTIME: &str = "io.containerd.coffer.v2";

/// A containerd with the busybox image, in a namespace that no other test has.
struct Containerd<'t> {
    test: &'t Test,
    daemon: Option<Child>,
    namespace: String,
    /// What goes before PATH for containerd and ctr, with a colon at its end.
    programs: &'static str,
}

impl<'t> Containerd<'t> {
    fn start(test: &'t Test) -> Self {
        Self::start_from("", test)
    }

    fn start_from(programs: &'static str, test: &'t Test) -> Self {
        let mut containerd = Self {
            test,
            daemon: None,
            namespace: test.id(),
            programs,
        };
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
            containerd.path("root"),
            containerd.path("state"),
            containerd.path("sock"),
        );
        fs::write(containerd.path("toml"), config).unwrap();
        containerd.launch();
        let archive = containerd.path("image.tar");
        host(
            "tar",
            &[
                "-C",
                asset("busybox-layout").to_str().unwrap(),
                "-cf",
                archive.to_str().unwrap(),
                ".",
            ],
        )
        .unwrap();
        containerd.ok(&[
            "images",
            "import",
            "--index-name",
            IMAGE,
            archive.to_str().unwrap(),
        ]);
        containerd
    }

    fn path(&self, name: &str) -> PathBuf {
        self.test.dir().join(format!("containerd.{name}"))
    }

    fn launch(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let mut command = program(self.programs, "containerd");
        command.arg("-c").arg(self.path("toml"));
        command.stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.daemon = Some(
            command
                .spawn()
                .expect("containerd is installed; run `cargo xtask setup`"),
        );
        wait_for("containerd to answer", || {
            self.ctr(&["version"])
                .output()
                .is_ok_and(|o| o.status.success())
        });
    }

    /// SIGKILL, as the OOM killer would.
    fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("containerd runs");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    fn ctr(&self, args: &[&str]) -> Command {
        let mut command = program(self.programs, "ctr");
        command
            .arg("-a")
            .arg(self.path("sock"))
            .args(["-n", &self.namespace])
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn ok(&self, args: &[&str]) -> String {
        let done = finish(self.ctr(args));
        assert_eq!(done.code, 0, "ctr {args:?}: {}", done.stderr);
        done.text().to_owned()
    }

    /// A container in the background; `options` are those of `ctr run`.
    fn run_detached(&self, options: &[&str], id: &str, command: &[&str]) {
        self.ok(&[
            &["run", "-d", "--runtime", RUNTIME],
            options,
            &[IMAGE, id],
            command,
        ]
        .concat());
    }

    fn status(&self, id: &str) -> String {
        let list = self.ok(&["tasks", "ls"]);
        let line = list
            .lines()
            .find(|line| line.starts_with(&format!("{id} ")));
        line.and_then(|line| line.split_whitespace().last())
            .unwrap_or("GONE")
            .to_owned()
    }

    fn remove(&self, id: &str) {
        let _ = finish(self.ctr(&["tasks", "kill", "-s", "KILL", id]));
        wait_for("the task to end", || {
            ["STOPPED", "GONE"].contains(&self.status(id).as_str())
        });
        let _ = finish(self.ctr(&["tasks", "rm", id]));
        self.ok(&["containers", "rm", id]);
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "{}",
                fs::read_to_string(self.path("log")).unwrap_or_default()
            );
        }
        let shims = || {
            leaks::descendants(std::process::id())
                .unwrap()
                .into_iter()
                .filter(|pid| leaks::command_line(*pid).contains("containerd-shim-coffer"))
        };
        let state = PathBuf::from("/run/coffer").join(&self.namespace);
        if !std::thread::panicking() {
            wait_for("the supervisors to end", || shims().next().is_none());
            let left: Vec<_> = fs::read_dir(&state)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .collect();
            assert!(left.is_empty(), "state is left: {left:?}");
        }
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let _ = fs::remove_dir_all(state);
        // ctr puts a container into the cgroup /<namespace>/<id>. The parent is nobody's, and stays under runc as well.
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::remove_dir(hierarchy.path().join(&self.namespace));
        }
        let _ = fs::remove_dir(PathBuf::from("/sys/fs/cgroup").join(&self.namespace));
    }
}

#[test]
fn ctr_runs_a_container_and_gets_its_code() {
    let test = Test::new("ctr");
    let containerd = Containerd::start(&test);
    let run = [
        "run",
        "--rm",
        "--runtime",
        RUNTIME,
        IMAGE,
        "c",
        "sh",
        "-c",
        "uname -r; echo problem >&2; exit 42",
    ];
    let done = finish(containerd.ctr(&run));
    assert_eq!(done.code, 42, "{}", done.stderr);
    assert!(
        done.text().contains("coffer") && done.stderr.contains("problem"),
        "{done:?}"
    );
}

#[test]
fn ctr_tasks_are_executed_in_listed_measured_paused_and_killed() {
    let test = Test::new("tasks");
    live(&Containerd::start(&test));
}

/// The life of a task, by ctr.
fn live(containerd: &Containerd<'_>) {
    let log = fs::File::create(containerd.path("events")).unwrap();
    let mut events = containerd.ctr(&["events"]).stdout(log).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    containerd.run_detached(&[], "c", &["sh", "-c", "while :; do sleep 1; done"]);
    assert_eq!(containerd.status("c"), "RUNNING");
    let exec = [
        "tasks",
        "exec",
        "--exec-id",
        "e",
        "c",
        "sh",
        "-c",
        "echo in exec; exit 7",
    ];
    let done = finish(containerd.ctr(&exec));
    assert_eq!((done.code, done.text()), (7, "in exec"), "{}", done.stderr);
    assert!(containerd.ok(&["tasks", "ps", "c"]).lines().count() >= 2);
    assert!(
        containerd
            .ok(&["tasks", "metrics", "c"])
            .contains("cpu.usage_usec")
    );
    containerd.ok(&["tasks", "pause", "c"]);
    assert_eq!(containerd.status("c"), "PAUSED");
    containerd.ok(&["tasks", "resume", "c"]);
    assert_eq!(containerd.status("c"), "RUNNING");
    let checkpoint = finish(containerd.ctr(&["tasks", "checkpoint", "c"]));
    assert!(
        checkpoint.code != 0 && checkpoint.stderr.contains("not"),
        "{checkpoint:?}"
    );
    containerd.remove("c");
    // The second exit and delete are the exec's; a checkpoint pauses the task, is told that it can't be had, and resumes it.
    let topics = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "delete",
        "paused",
        "resumed",
        "paused",
        "resumed",
        "exit",
        "delete",
    ];
    let read = || fs::read_to_string(containerd.path("events")).unwrap();
    wait_for("the last event", || {
        read().matches("/tasks/delete").count() == 2
    });
    let _ = events.kill();
    events.wait().unwrap();
    let seen = read();
    let seen: Vec<_> = seen
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("/tasks/"))
        .collect();
    assert_eq!(seen, topics);
}

#[test]
fn a_restart_of_containerd_loses_no_task() {
    let test = Test::new("restart");
    restart(Containerd::start(&test));
}

/// containerd 2, which only the test node has.
mod next {
    use super::*;

    #[test]
    fn ctr_tasks_are_executed_in_listed_measured_paused_and_killed() {
        let test = Test::new("nexttasks");
        let containerd = Containerd::start_from(NEXT, &test);
        let version = containerd.ok(&["version"]);
        assert!(version.contains("Version:  2"), "{version}");
        live(&containerd);
    }

    #[test]
    fn a_restart_of_containerd_loses_no_task() {
        let test = Test::new("nextrestart");
        restart(Containerd::start_from(NEXT, &test));
    }
}

fn restart(mut containerd: Containerd<'_>) {
    containerd.run_detached(&[], "stays", &["sleep", "600"]);
    containerd.run_detached(&[], "ends", &["sh", "-c", "sleep 3; exit 9"]);
    containerd.kill();
    // One task ends while nobody listens.
    std::thread::sleep(Duration::from_secs(4));
    containerd.launch();
    assert_eq!(containerd.status("stays"), "RUNNING");
    wait_for("the exit to arrive", || {
        containerd.status("ends") == "STOPPED"
    });
    let deleted = finish(containerd.ctr(&["tasks", "rm", "ends"]));
    assert!(deleted.stderr.contains("exit code 9"), "{deleted:?}");
    let exec = [
        "tasks",
        "exec",
        "--exec-id",
        "e",
        "stays",
        "echo",
        "still here",
    ];
    assert_eq!(containerd.ok(&exec), "still here");
    containerd.ok(&["containers", "rm", "ends"]);
    containerd.remove("stays");
}

/// Pods that write a log and have an exec each, while containerd dies. Every third one ends when nobody listens.
fn pods_outlive_containerd(name: &str, count: usize) {
    let test = Test::new(name);
    let mut containerd = Containerd::start(&test);
    let signal = test.dir().join("signal");
    fs::create_dir(&signal).unwrap();
    let mount = format!(
        "type=bind,src={},dst=/signal,options=rbind:ro",
        signal.display()
    );
    let log = |id: &str| test.dir().join(format!("{id}.log"));
    let pods: Vec<(String, bool)> = (0..count)
        .map(|i| (format!("pod{i}"), i % 3 == 2))
        .collect();
    for (id, ends) in &pods {
        let until = if *ends { "[ -e /signal/end ]" } else { "false" };
        let script =
            format!("n=0; until {until}; do n=$((n+1)); echo tick $n; sleep 1; done; exit 9");
        let uri = format!("file://{}", log(id).display());
        let options = ["--mount", &mount, "--log-uri", &uri];
        containerd.run_detached(&options, id, &["sh", "-c", &script]);
        containerd.ok(&[
            "tasks",
            "exec",
            "--detach",
            "--exec-id",
            "open",
            id,
            "sleep",
            "600",
        ]);
    }
    containerd.kill();
    fs::write(signal.join("end"), "").unwrap();
    std::thread::sleep(Duration::from_secs(4));
    containerd.launch();

    let ticks = |id: &str| fs::read_to_string(log(id)).unwrap().lines().count();
    for (id, ends) in &pods {
        if *ends {
            wait_for("the exit to arrive", || containerd.status(id) == "STOPPED");
            let deleted = finish(containerd.ctr(&["tasks", "rm", id]));
            assert!(deleted.stderr.contains("exit code 9"), "{id}: {deleted:?}");
            containerd.ok(&["containers", "rm", id]);
        } else {
            assert_eq!(containerd.status(id), "RUNNING", "{id}");
            assert!(containerd.ok(&["tasks", "ps", id]).contains("open"), "{id}");
            let exec = [
                "tasks",
                "exec",
                "--exec-id",
                "new",
                id,
                "echo",
                "still here",
            ];
            assert_eq!(containerd.ok(&exec), "still here", "{id}");
            let before = ticks(id);
            wait_for("the log to go on", || ticks(id) > before);
            containerd.remove(id);
        }
        let text = fs::read_to_string(log(id)).unwrap();
        let whole = (1..).zip(text.lines());
        for (n, line) in whole {
            assert_eq!(line, format!("tick {n}"), "{id}");
        }
    }
}

#[test]
fn the_death_of_containerd_costs_no_pod_exec_log_or_exit() {
    pods_outlive_containerd("kill3", 3);
}

#[test]
fn heavy_the_death_of_containerd_costs_none_of_twenty_pods() {
    pods_outlive_containerd("kill20", 20);
}

#[test]
fn the_death_of_the_supervisor_is_cleaned_up_by_delete() {
    let test = Test::new("shimkill");
    let containerd = Containerd::start(&test);
    containerd.run_detached(&[], "c", &["sleep", "600"]);
    let shims: Vec<u32> = leaks::descendants(std::process::id())
        .unwrap()
        .into_iter()
        .filter(|pid| leaks::command_line(*pid).contains("containerd-shim-coffer"))
        .collect();
    assert!(!shims.is_empty());
    let since = Instant::now();
    for pid in shims {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid.cast_signed()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
    }
    wait_for("containerd to notice", || {
        containerd.status("c") != "RUNNING"
    });
    assert!(
        since.elapsed() < Duration::from_secs(20),
        "it took {:?}",
        since.elapsed()
    );
    containerd.remove("c");
}

/// Options of `ctr run` for the first container of the pod named "pod", and for the others.
const POD: [&str; 4] = [
    "--annotation",
    "io.kubernetes.cri.container-type=sandbox",
    "--annotation",
    "io.kubernetes.cri.sandbox-id=pod",
];
const MEMBER: [&str; 4] = [
    "--annotation",
    "io.kubernetes.cri.container-type=container",
    "--annotation",
    "io.kubernetes.cri.sandbox-id=pod",
];

#[test]
fn containers_of_a_pod_run_in_one_vm() {
    let test = Test::new("ctrpod");
    let containerd = Containerd::start(&test);
    containerd.run_detached(&POD, "pod", &["sleep", "600"]);
    containerd.run_detached(
        &MEMBER,
        "app",
        &["sh", "-c", "nc -ll -p 7777 -e cat & sleep 600"],
    );
    let boot_id = |id: &str| {
        containerd.ok(&[
            "tasks",
            "exec",
            "--exec-id",
            "b",
            id,
            "cat",
            "/proc/sys/kernel/random/boot_id",
        ])
    };
    assert_eq!(boot_id("pod"), boot_id("app"), "two VMs were made");
    let over = [
        "tasks",
        "exec",
        "--exec-id",
        "n",
        "pod",
        "sh",
        "-c",
        "echo across | nc -w 60 127.0.0.1 7777",
    ];
    assert_eq!(containerd.ok(&over), "across");
    // The pod stays when its only app container is gone.
    containerd.remove("app");
    assert_eq!(containerd.status("pod"), "RUNNING");
    containerd.remove("pod");
}

/// As an ephemeral container does that the kubelet runs with a target: it is named by its task's pid.
#[test]
fn a_container_joins_the_processes_of_the_one_whose_pid_it_names() {
    let test = Test::new("ctrpid");
    let containerd = Containerd::start(&test);
    containerd.run_detached(&POD, "pod", &["sleep", "600"]);
    for (id, argument) in [("one", "601"), ("two", "602")] {
        containerd.run_detached(&MEMBER, id, &["sleep", argument]);
    }
    let pid = |id: &str| {
        let list = containerd.ok(&["tasks", "ls"]);
        let line = list
            .lines()
            .find(|line| line.starts_with(&format!("{id} ")));
        let pid = line.and_then(|line| line.split_whitespace().nth(1));
        pid.unwrap_or_else(|| panic!("{id} is not in {list}"))
            .to_owned()
    };
    for (target, argument) in [("one", "601"), ("two", "602"), ("pod", "600")] {
        let namespace = format!("pid:/proc/{}/ns/pid", pid(target));
        let run = [
            &["run", "--rm", "--runtime", RUNTIME, "--with-ns", &namespace],
            &MEMBER[..],
            &[IMAGE, "debugger", "cat", "/proc/1/cmdline"],
        ];
        assert_eq!(containerd.ok(&run.concat()), format!("sleep\0{argument}\0"));
    }
    for id in ["one", "two", "pod"] {
        containerd.remove(id);
    }
}
