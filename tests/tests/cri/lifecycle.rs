//! Containers of a pod from create to remove, and the streams of their processes.

use crate::{APP, COFFER};
use coffer_tests::cri::stream::{RESIZE, STDIN, STDOUT};
use coffer_tests::cri::{Container, Node, Pod, grpc, pod};
use coffer_tests::wait_for;
use serde_json::json;
use std::time::{Duration, Instant};

const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";
/// The kernel that a container runs on, its namespaces, and its first process.
const OWN: &str = "cat /proc/sys/kernel/random/boot_id; cd /proc/self/ns; for n in net ipc uts pid; do readlink $n; done
    tr '\\0' ' ' < /proc/1/cmdline";

/// Namespaces, init container, restart in place, grace, and a pod that outlives its containers.
pub fn several_containers(node: &Node<'_>, handler: &str) {
    let dns = json!({"servers": ["192.0.2.53"], "searches": ["pods.test"], "options": ["ndots:5"]});
    let config = json!({"dns_config": dns});
    let pod = node.pod(handler, "several", config.clone());
    assert_eq!(pod.status()["state"], "SANDBOX_READY");

    let init = pod.sh("init", "hostname; echo to stderr >&2; exit 0", json!({}));
    assert_eq!(init.wait(), (0, "Completed".into()));
    assert_eq!(init.logged("stdout"), ["several"]);
    assert_eq!(init.logged("stderr"), ["to stderr"]);

    let server =
        "nc -ll -p 7777 -e cat & trap 'echo ending; exit 3' TERM; while :; do sleep 1; done";
    let one = pod.sh("one", server, json!({}));
    let two = pod.sh("two", "sleep 1000", json!({}));
    // One kernel, and one of each namespace but those of processes and mounts.
    let (of_one, of_two) = (one.sh(OWN), two.sh(OWN));
    let ([kernel, shared @ .., _, _], [of_twos, shared_with @ .., pid, init]) =
        (&*lines(&of_one), &*lines(&of_two))
    else {
        panic!("{of_one:?} {of_two:?}");
    };
    assert_eq!(kernel, of_twos, "two VMs were made");
    assert_eq!((shared.len(), shared), (3, shared_with));
    assert!(!of_one.contains(pid) && *init == "sleep 1000", "{of_two}");
    assert_eq!(two.sh("echo across | nc -w 60 127.0.0.1 7777"), "across");
    names_and_shared_memory(&one, &two);

    // A trusted pod on the same node, on the host's kernel.
    let trusted = node.pod("runc", "trusted", config);
    let beside = trusted.sh("app", APP, json!({}));
    assert_ne!(beside.sh(BOOT_ID), *kernel);
    drop(beside);
    drop(trusted);

    // Restart in place, with the next attempt's name.
    let before = kernel;
    one.stop(20);
    assert_eq!(one.wait(), (3, "Error".into()));
    assert_eq!(one.logged("stdout"), ["ending"], "the grace was not given");
    one.remove();
    let again = pod.sh("one", APP, json!({"metadata": {"attempt": 1}}));
    assert_eq!(again.sh(BOOT_ID), *before);
    again.remove();
    let since = Instant::now();
    two.stop(1);
    assert_eq!(two.wait().0, 137, "it ignores SIGTERM");
    assert!(since.elapsed() < Duration::from_secs(30));
    two.remove();

    // No container of the user's is left; the pod stays.
    assert_eq!(pod.status()["state"], "SANDBOX_READY");
    let late = pod.sh("late", APP, json!({}));
    assert_eq!(late.sh(BOOT_ID), *before);
    pod.stop();
    assert_eq!(pod.status()["state"], "SANDBOX_NOTREADY");
    assert_eq!(late.status()["state"], "CONTAINER_EXITED");
    pod.stop();
    pod.remove();
    assert!(
        !pod::refusal(
            node.cri
                .call("PodSandboxStatus", &json!({"pod_sandbox_id": pod.id}))
        )
        .is_empty()
    );
}

/// The pod's files, as the kubelet's configuration has them, whoever writes them; and its shared memory.
fn names_and_shared_memory(one: &Container<'_>, two: &Container<'_>) {
    let names = one.sh("cat /etc/resolv.conf /etc/hostname /etc/hosts; echo shared > /dev/shm/x");
    for line in [
        "search pods.test",
        "nameserver 192.0.2.53",
        "options ndots:5",
        "several",
    ] {
        assert!(names.lines().any(|l| l == line), "{names}");
    }
    assert!(names.contains("localhost"), "{names}");
    assert_eq!(
        two.sh("cat /dev/shm/x; stat -c %a /dev/shm; df -m /dev/shm | awk 'END {print $2}'"),
        "shared\n1777\n64"
    );
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

/// Processes in a container, its streams and its log; all of which outlive containerd.
pub fn processes_and_streams(node: &Node<'_>) {
    let pod = node.pod(COFFER, "streams", json!({}));
    let app = pod.sh(
        "app",
        "while read line; do echo got $line; done",
        json!({"stdin": true}),
    );

    let done = app.exec("echo out; echo err >&2; exit 42");
    assert_eq!(
        (done.code, &*done.stdout, &*done.stderr),
        (42, "out", "err")
    );
    assert_eq!(app.exec("kill -9 $$").code, 137);
    let missing = pod::refusal(app.try_exec(&["/no/such/program"], 0));
    assert!(missing.contains("/no/such/program"), "{missing}");
    let since = Instant::now();
    let late = pod::refusal(app.try_exec(&["sleep", "1234"], 2));
    assert!(
        late.contains("timeout") || late.contains("deadline"),
        "{late}"
    );
    assert!(since.elapsed() < Duration::from_secs(30));
    wait_for("the timed out process to go", || {
        !app.sh("ps").contains("sleep 1234")
    });
    let megabyte = app.sh("head -c 1048576 /dev/zero | tr '\\0' x");
    assert_eq!(megabyte.len(), 1 << 20);

    let command = [
        "/bin/sh",
        "-c",
        "read word; echo $word; echo bad >&2; exit 7",
    ];
    let mut stream = app.stream(&command, false);
    stream.send(STDIN, b"typed\n").unwrap();
    assert_eq!(
        stream.finish().unwrap(),
        ("typed\n".into(), "bad\n".into(), 7)
    );
    let mut terminal = app.stream(&["/bin/sh"], true);
    terminal
        .send(RESIZE, br#"{"Width":91,"Height":37}"#)
        .unwrap();
    terminal
        .send(STDIN, b"until stty size | grep '37 91'; do sleep 1; done\n")
        .unwrap();
    terminal.read_until(STDOUT, "\n37 91").unwrap();
    terminal.send(STDIN, b"exit 5\n").unwrap();
    assert_eq!(terminal.finish().unwrap().2, 5);

    let mut attached = app.attach();
    attached.send(STDIN, b"hello\n").unwrap();
    attached.read_until(STDOUT, "got hello").unwrap();
    attached.close().unwrap();
    wait_for("the log to have it as well", || {
        app.logged("stdout") == ["got hello"]
    });

    let stats = app.stats();
    assert!(
        grpc::number(&stats["memory"]["working_set_bytes"]) > 0,
        "{stats}"
    );
    assert!(
        grpc::number(&stats["cpu"]["usage_core_nano_seconds"]) > 0,
        "{stats}"
    );
    let of_pod = pod.stats();
    let containers = of_pod["linux"]["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 1, "{of_pod}");
    assert_eq!(containers[0]["attributes"]["id"], *app.id);
    ephemeral_container(&pod);
    restart_of_containerd(&pod);
}

/// One in the PID namespace of one container, as `kubectl debug --target` makes it.
fn ephemeral_container(pod: &Pod<'_>) {
    let app = pod.sh("target", "sleep 3456", json!({}));
    let target = json!({"pid": "TARGET", "target_id": app.id});
    let target = json!({"linux": {"security_context": {"namespace_options": target}}});
    let debug = pod.sh("debug", APP, target);
    let _other = pod.sh("other", "sleep 4567", json!({}));
    let all = debug.sh("ps");
    assert!(
        all.contains("sleep 3456") && !all.contains("sleep 4567"),
        "{all}"
    );
}

fn restart_of_containerd(pod: &Pod<'_>) {
    let talks = "i=0; while :; do i=$((i + 1)); echo $i; sleep 1; done";
    let (talker, ends) = (
        pod.sh("talker", talks, json!({})),
        pod.sh("ends", "sleep 5; exit 9", json!({})),
    );
    pod.node.kill();
    std::thread::sleep(Duration::from_secs(7));
    pod.node.launch();
    assert_eq!(pod.status()["state"], "SANDBOX_READY");
    assert_eq!(ends.wait().0, 9);
    assert_eq!(talker.sh("echo still here"), "still here");
    let lines = talker.logged("stdout").len();
    wait_for("more of its log", || talker.logged("stdout").len() > lines);
    let log = talker.logged("stdout");
    let counted: Vec<_> = (1..=log.len()).map(|i| i.to_string()).collect();
    assert_eq!(log, counted, "lines were lost");
}

pub fn shared_pid_namespace(node: &Node<'_>) {
    let shared = json!({"linux": {"security_context": {"namespace_options": {"pid": "POD"}}}});
    let pod = node.pod(COFFER, "pids", shared.clone());
    let one = pod.sh(
        "one",
        "trap 'exit 9' USR1; while :; do sleep 1; done",
        shared.clone(),
    );
    let two = pod.sh("two", "sleep 2345", shared);
    assert!(one.sh("ps").contains("sleep 2345"));
    assert_ne!(
        one.sh("cat /proc/1/cmdline"),
        "",
        "the pause process is PID 1"
    );
    two.sh("kill -USR1 $(ps | awk '/[e]xit 9/ {print $1}')");
    assert_eq!(one.wait().0, 9);
    assert_eq!(two.status()["state"], "CONTAINER_RUNNING");
}
