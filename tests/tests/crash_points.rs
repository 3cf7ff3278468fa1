//! The supervisor dies by SIGKILL at each named point of its work, in a build that has such points, and `delete` finds all that is left.

use coffer_tests::Test;
use coffer_tests::bundle::Bundle;
use coffer_tests::shim::Shim;
use coffer_tests::task::Task;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::Message;
use serde_json::json;
use std::time::{Duration, Instant};

/// From the call of `delete` until nothing is left; the leak check of each test allows as much again.
const CLEAN_WITHIN: Duration = Duration::from_secs(10);

/// Create, start, exec, its end, delete: until something fails because nobody is there any more.
fn live(task: &Task, bundle: &str, mounts: Vec<api::Mount>) -> ttrpc::Result<()> {
    let create = api::CreateTaskRequest {
        id: "c".into(),
        bundle: bundle.into(),
        rootfs: mounts,
        ..Default::default()
    };
    task.client().create(Task::context(), &create)?;
    task.start("c", "")?;
    task.exec("c", "e", &["true"], false)?;
    task.start("c", "e")?;
    task.wait("c", "e")?;
    task.kill("c", 9)?;
    task.wait("c", "")?;
    task.delete("c", "")?;
    task.shutdown("c")
}

fn dies_at(point: &str) {
    let test = Test::new("crashpoint");
    let mut bundle = Bundle::new(&test, "sleep 600");
    bundle.config["root"]["path"] = json!("rootfs");
    let dir = bundle.write().to_owned();
    let root = api::Mount {
        type_: "bind".into(),
        source: coffer_tests::asset("busybox").display().to_string(),
        options: vec!["rbind".into(), "ro".into()],
        ..Default::default()
    };
    let shim = Shim::start_to_crash(&test, &bundle.dir, "c", point);
    let died = live(&shim.task(), &dir, vec![root]);
    assert!(died.is_err(), "{point} was not reached");
    let since = Instant::now();
    let done = shim.delete();
    assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{point}");
    let took = since.elapsed();
    assert!(took < CLEAN_WITHIN, "{point}: delete took {took:?}");
    let response = api::DeleteResponse::parse_from_bytes(&done.stdout).unwrap();
    assert_eq!(response.exit_status, 137, "{point}");
    // At the first point the directory was not made yet.
    let mut left = std::fs::read_dir(bundle.dir.join("rootfs"))
        .into_iter()
        .flatten();
    assert!(left.next().is_none(), "{point}: the root is left mounted");
    drop(shim);
    test.check_leaks()
        .unwrap_or_else(|leak| panic!("{point}: {leak:?}"));
}

#[test]
fn a_create_that_dies_before_the_boot_is_cleaned_up() {
    [
        "create.recorded",
        "create.mounted",
        "create.loaded",
        "create.stdio",
        "boot.console",
        "boot.uid",
        "boot.share",
        "boot.cgroup",
        "boot.network",
    ]
    .into_iter()
    .for_each(dies_at);
}

/// Where nothing knows yet of a process that runs, it ends by itself.
#[test]
fn a_create_that_dies_in_the_boot_is_cleaned_up() {
    [
        "boot.fsd-started",
        "boot.fsd-recorded",
        "boot.hypervisor-started",
        "boot.hypervisor-recorded",
        "boot.processes",
        "boot.vm",
        "boot.agent",
    ]
    .into_iter()
    .for_each(dies_at);
}

#[test]
fn a_create_that_dies_after_the_boot_is_cleaned_up() {
    [
        "create.booted",
        "create.shared",
        "create.in-guest",
        "create.attached",
    ]
    .into_iter()
    .for_each(dies_at);
}

#[test]
fn a_start_or_an_exec_that_dies_is_cleaned_up() {
    [
        "start.begun",
        "start.in-guest",
        "exec.begun",
        "exec.in-guest",
    ]
    .into_iter()
    .for_each(dies_at);
}

#[test]
fn a_delete_or_a_stop_that_dies_is_cleaned_up() {
    [
        "delete.in-guest",
        "delete.on-host",
        "stop.begun",
        "stop.vm-gone",
        "stop.released",
    ]
    .into_iter()
    .for_each(dies_at);
}
