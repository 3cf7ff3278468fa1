//! Containers of a pod from create to remove, and the streams of their processes.

use crate::{APP, COFFER};
use coffer_tests::cri::stream::{RESIZE, STDIN, STDOUT};
use coffer_tests::cri::{Node, grpc, pod};
use coffer_tests::{Test, wait_for};
use serde_json::json;
use std::time::{Duration, Instant};

const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

#[test]
fn a_pod_of_several_containers() {
    let test = Test::new("cripod");
    let node = Node::start(&test);
    let dns = json!({"servers": ["192.0.2.53"], "searches": ["pods.test"], "options": ["ndots:5"]});
    let config = json!({"dns_config": dns});
    let pod = node.pod(COFFER, "several", config.clone());
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
    let resolv = one.sh("cat /etc/resolv.conf");
    for line in [
        "search pods.test",
        "nameserver 192.0.2.53",
        "options ndots:5",
    ] {
        assert!(resolv.lines().any(|l| l == line), "{resolv}");
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

#[test]
fn exec_attach_and_stats() {
    let test = Test::new("criexec");
    let node = Node::start(&test);
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
