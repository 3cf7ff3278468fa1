//! Containers of a pod from create to remove, and the streams of their processes.

use crate::{APP, COFFER};
use coffer_tests::cri::node::WITHOUT_PAUSE;
use coffer_tests::cri::stream::{RESIZE, STDIN, STDOUT};
use coffer_tests::cri::{Node, grpc, pod};
use coffer_tests::wait_for;
use serde_json::json;
use std::time::{Duration, Instant};

const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

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
    assert_eq!(one.sh(BOOT_ID), two.sh(BOOT_ID), "two VMs were made");
    assert_eq!(two.sh("echo across | nc -w 60 127.0.0.1 7777"), "across");
    for namespace in ["net", "ipc", "uts"] {
        let script = format!("readlink /proc/self/ns/{namespace}");
        assert_eq!(one.sh(&script), two.sh(&script), "{namespace}");
    }
    let own = "readlink /proc/self/ns/pid; tr '\\0' ' ' < /proc/1/cmdline";
    assert_ne!(one.sh(own), two.sh(own));
    assert_eq!(two.sh("tr '\\0' ' ' < /proc/1/cmdline"), "sleep 1000");
    // containerd writes it for pods with a pause container only.
    if handler != WITHOUT_PAUSE {
        let resolv = one.sh("cat /etc/resolv.conf");
        for line in [
            "search pods.test",
            "nameserver 192.0.2.53",
            "options ndots:5",
        ] {
            assert!(resolv.lines().any(|l| l == line), "{resolv}");
        }
    }

    // A trusted pod on the same node, on the host's kernel.
    let trusted = node.pod("runc", "trusted", config);
    let beside = trusted.sh("app", APP, json!({}));
    assert_ne!(one.sh("uname -r"), beside.sh("uname -r"));
    drop(beside);
    drop(trusted);

    // Restart in place, with the next attempt's name.
    let before = two.sh(BOOT_ID);
    one.stop(20);
    assert_eq!(one.wait(), (3, "Error".into()));
    assert_eq!(one.logged("stdout"), ["ending"], "the grace was not given");
    one.remove();
    let again = pod.sh("one", APP, json!({"metadata": {"attempt": 1}}));
    assert_eq!(again.sh(BOOT_ID), before);
    again.remove();
    let since = Instant::now();
    two.stop(1);
    assert_eq!(two.wait().0, 137, "it ignores SIGTERM");
    assert!(since.elapsed() < Duration::from_secs(30));
    two.remove();

    // No container of the user's is left; the pod stays.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(pod.status()["state"], "SANDBOX_READY");
    let late = pod.sh("late", APP, json!({}));
    assert_eq!(late.sh(BOOT_ID), before);
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

pub fn exec_attach_and_stats(node: &Node<'_>) {
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
}

pub fn restart_of_containerd(node: &Node<'_>) {
    let pod = node.pod(COFFER, "stays", json!({}));
    let talks = "i=0; while :; do i=$((i + 1)); echo $i; sleep 1; done";
    let (talker, ends) = (
        pod.sh("talker", talks, json!({})),
        pod.sh("ends", "sleep 5; exit 9", json!({})),
    );
    node.kill();
    std::thread::sleep(Duration::from_secs(7));
    node.launch();
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

    // An ephemeral container in the PID namespace of one container, as `kubectl debug --target` makes it.
    let lone = node.pod(COFFER, "target", json!({}));
    let app = lone.sh("app", "sleep 3456", json!({}));
    let target = json!({"pid": "TARGET", "target_id": app.id});
    let target = json!({"linux": {"security_context": {"namespace_options": target}}});
    let debug = lone.sh("debug", APP, target);
    assert!(debug.sh("ps").contains("sleep 3456"));
    let _other = lone.sh("other", "sleep 4567", json!({}));
    assert!(!debug.sh("ps").contains("sleep 4567"));
}
