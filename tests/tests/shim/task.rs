//! The methods of the Task service, and the events that go with them.

use coffer_tests::bundle::Bundle;
use coffer_tests::shim::Shim;
use coffer_tests::task::{Task, code_of};
use coffer_tests::{Test, wait_for};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use serde_json::json;
use ttrpc::Code;

fn process(id: &str, exec: &str) -> (String, String) {
    (id.to_owned(), exec.to_owned())
}

fn exec_request(id: &str, exec: &str, command: &[&str], stdin: &str) -> api::ExecProcessRequest {
    let spec =
        json!({"args": command, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]});
    let any = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: spec.to_string().into_bytes(),
        ..Default::default()
    };
    let (id, exec_id) = process(id, exec);
    api::ExecProcessRequest {
        id,
        exec_id,
        stdin: stdin.into(),
        spec: MessageField::some(any),
        ..Default::default()
    }
}

fn metrics(task: &Task, id: &str) -> ttrpc::Result<Metrics> {
    let request = api::StatsRequest {
        id: id.into(),
        ..Default::default()
    };
    let stats = task.client().stats(Task::context(), &request)?.stats;
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    Ok(Metrics::parse_from_bytes(&stats.value).unwrap())
}

#[test]
fn every_method_of_the_task_service_keeps_the_contract() {
    let test = Test::new("contract");
    let bundle = Bundle::new(&test, "while :; do sleep 1; done");
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    let task = shim.task();
    assert!(task.create("c", &dir, "").unwrap() > 0);
    assert_eq!(
        code_of(&task.create("c", &dir, "").unwrap_err()),
        Some(Code::ALREADY_EXISTS)
    );
    task.start("c", "").unwrap();

    let fifo = test.dir().join("stdin");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let exec = exec_request("c", "e", &["cat"], fifo.to_str().unwrap());
    task.client().exec(Task::context(), &exec).unwrap();
    task.start("c", "e").unwrap();
    pids_are_real(&task);
    // CloseIO may come before anybody wrote, and again.
    for _ in 0..2 {
        let (id, exec_id) = process("c", "e");
        let close = api::CloseIORequest {
            id,
            exec_id,
            stdin: true,
            ..Default::default()
        };
        task.client().close_io(Task::context(), &close).unwrap();
    }
    assert_eq!(
        task.wait("c", "e").unwrap(),
        0,
        "cat saw the end of its input"
    );
    kill_tells_who_is_there(&task);
    assert_eq!(task.delete("c", "e").unwrap(), 0);
    let connect = api::ConnectRequest {
        id: "c".into(),
        ..Default::default()
    };
    let connected = task.client().connect(Task::context(), &connect).unwrap();
    assert_eq!(connected.shim_pid, shim.pid());
    assert!(connected.task_pid > 0);
    assert!(metrics(&task, "c").unwrap().cpu.usage_usec > 0);
    let checkpoint = api::CheckpointTaskRequest {
        id: "c".into(),
        ..Default::default()
    };
    let refused = task.client().checkpoint(Task::context(), &checkpoint);
    assert_eq!(code_of(&refused.unwrap_err()), Some(Code::UNIMPLEMENTED));

    task.shutdown("c").unwrap();
    assert_eq!(
        code_of(&task.delete("c", "").unwrap_err()),
        Some(Code::FAILED_PRECONDITION),
        "a shutdown with a container does nothing, and one that runs is not deleted"
    );
    task.kill("c", 9).unwrap();
    assert_eq!(task.wait("c", "").unwrap(), 137);
    assert_eq!(metrics(&task, "c").unwrap().memory_events.oom_kill, 0);
    assert_eq!(
        pids(&task).processes[0].pid,
        connected.task_pid,
        "containerd 1.7 gives up a task without processes"
    );
    assert_eq!(task.delete("c", "").unwrap(), 137);
    assert_eq!(
        code_of(&task.state("c", "").unwrap_err()),
        Some(Code::NOT_FOUND)
    );
    task.shutdown("c").unwrap();
    let expected = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "delete",
        "exit",
        "delete",
    ];
    assert_eq!(
        shim.topics(),
        expected.map(|topic| format!("/tasks/{topic}"))
    );
}

fn pids(task: &Task) -> api::PidsResponse {
    let request = api::PidsRequest {
        id: "c".into(),
        ..Default::default()
    };
    task.client().pids(Task::context(), &request).unwrap()
}

/// Processes of the container, the exec by its name.
fn pids_are_real(task: &Task) {
    let pids = pids(task);
    assert!(pids.processes.len() >= 2, "{pids:?}");
    let named: Vec<_> = pids
        .processes
        .iter()
        .filter_map(|process| process.info.as_ref())
        .collect();
    assert_eq!(named.len(), 1);
    assert_eq!(named[0].type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(named[0].value, b"\x0a\x01e");
}

fn kill_tells_who_is_there(task: &Task) {
    let told = |killed: ttrpc::Result<()>| killed.err().and_then(|error| code_of(&error));
    assert_eq!(
        told(task.kill("c", 0)),
        None,
        "signal 0 asks whether it lives"
    );
    assert_eq!(told(task.kill_all("c", 0)), None);
    let (not_found, invalid) = (Some(Code::NOT_FOUND), Some(Code::INVALID_ARGUMENT));
    assert_eq!(
        told(task.kill_process("c", "e", 15)),
        not_found,
        "it has ended"
    );
    assert_eq!(told(task.kill_process("c", "f", 15)), not_found);
    assert_eq!(told(task.kill("d", 0)), not_found);
    assert_eq!(told(task.kill("c", 65)), invalid);
}

#[test]
fn an_end_for_want_of_memory_is_told_by_event_and_metrics_until_delete() {
    let test = Test::new("shimoom");
    let mut bundle = Bundle::new(&test, "tail /dev/zero");
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 16 << 20});
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    let task = shim.task();
    task.create("c", &dir, "").unwrap();
    task.start("c", "").unwrap();
    assert_eq!(task.wait("c", "").unwrap(), 137);
    assert!(metrics(&task, "c").unwrap().memory_events.oom_kill > 0);
    task.delete("c", "").unwrap();
    wait_for("the last event", || {
        shim.topics()
            .last()
            .is_some_and(|topic| topic == "/tasks/delete")
    });
    let topics = ["create", "start", "oom", "exit", "delete"];
    assert_eq!(shim.topics(), topics.map(|topic| format!("/tasks/{topic}")));
}
