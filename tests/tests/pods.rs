//! Several containers in one sandbox, through the Task API that containerd uses.

use coffer_tests::Test;
use coffer_tests::bundle::Bundle;
use coffer_tests::task::{Task, code_of};
use serde_json::json;
use std::fs;

/// Runs a script as another container of the sandbox; gives its exit status and what it printed.
fn another(test: &Test, task: &Task, sandbox: &str, id: &str, script: &str) -> (u32, String) {
    let mut bundle = Bundle::new(test, script).in_sandbox(sandbox);
    bundle.config["hostname"] = json!("pod");
    let out = test.dir().join(format!("{id}.out"));
    nix::unistd::mkfifo(&out, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let from = out.clone();
    let reader = std::thread::spawn(move || fs::read_to_string(from).unwrap());
    task.create(id, bundle.write(), out.to_str().unwrap())
        .unwrap();
    task.start(id, "").unwrap();
    let status = task.wait(id, "").unwrap();
    let text = reader.join().unwrap();
    task.delete(id, "").unwrap();
    (status, text)
}

#[test]
fn containers_of_a_pod_share_net_and_ipc_but_not_pid() {
    let test = Test::new("pod");
    let server = "nc -ll -p 7777 -e cat & sleep 600";
    let sandbox = test.background(&["--hostname", "pod"], &["sh", "-c", server]);
    let task = Task::connect(&test.root(), &sandbox.id).unwrap();
    let namespaces = "for n in net ipc uts pid mnt; do readlink /proc/self/ns/$n; done";
    let first = sandbox.sh(namespaces);
    let first: Vec<_> = first.lines().collect();
    let script = format!("{namespaces}; hostname; ps | grep -c '[s]leep 600'; exit 3");
    let (status, text) = another(&test, &task, &sandbox.id, "second", &script);
    let second: Vec<_> = text.lines().collect();
    assert_eq!(status, 3);
    assert_eq!(first[..3], second[..3], "net, ipc and uts are the pod's");
    assert!(
        first[3] != second[3] && first[4] != second[4],
        "pid and mnt are the container's own"
    );
    assert_eq!(second[5..], ["pod", "0"]);
    let (status, text) = another(
        &test,
        &task,
        &sandbox.id,
        "third",
        "echo loop | nc -w 60 127.0.0.1 7777",
    );
    assert_eq!((status, text.as_str()), (0, "loop\n"));
}

#[test]
fn the_task_api_answers_as_containerd_expects() {
    let test = Test::new("task");
    let sandbox = test.background(&[], &["sleep", "600"]);
    let task = Task::connect(&test.root(), &sandbox.id).unwrap();
    let refused = |result: ttrpc::Result<()>| code_of(&result.unwrap_err());
    assert_eq!(
        refused(task.state("nobody", "").map(drop)),
        Some(ttrpc::Code::NOT_FOUND)
    );
    assert_eq!(
        refused(task.start("nobody", "").map(drop)),
        Some(ttrpc::Code::NOT_FOUND)
    );
    assert_eq!(
        refused(task.kill("nobody", 9)),
        Some(ttrpc::Code::NOT_FOUND)
    );
    let bundle = Bundle::new(&test, "true").in_sandbox(&sandbox.id);
    let again = task.create(&sandbox.id, bundle.write(), "").map(drop);
    assert_eq!(refused(again), Some(ttrpc::Code::ALREADY_EXISTS));
    assert_eq!(
        refused(task.delete(&sandbox.id, "").map(drop)),
        Some(ttrpc::Code::FAILED_PRECONDITION)
    );
    assert_eq!(
        refused(task.start(&sandbox.id, "").map(drop)),
        Some(ttrpc::Code::FAILED_PRECONDITION)
    );

    task.create("short", bundle.write(), "").unwrap();
    task.start("short", "").unwrap();
    assert_eq!(task.wait("short", "").unwrap(), 0);
    assert_eq!(
        task.wait("short", "").unwrap(),
        0,
        "waiting for the dead answers at once"
    );
    assert_eq!(refused(task.kill("short", 9)), Some(ttrpc::Code::NOT_FOUND));
    assert_eq!(task.delete("short", "").unwrap(), 0);
    assert_eq!(
        refused(task.delete("short", "").map(drop)),
        Some(ttrpc::Code::NOT_FOUND)
    );
}
