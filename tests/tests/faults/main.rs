//! Faults that callers, programs and administrators cause without meaning harm, with the test in containerd's place.
//! `docs/faults.md` is the list of all faults and of the tests that show them.

mod names;
mod order;
mod output;
mod standstill;
mod symlinks;
mod upgrade;

use coffer_tests::bundle::Bundle;
use coffer_tests::shim::Shim;
use coffer_tests::task::Task;
use containerd_shim_protos::api;

/// A shim whose sandbox has one container, `c`, created but not started, and a client of it.
fn created<'t>(test: &'t coffer_tests::Test, script: &str) -> (Shim<'t>, Task, String) {
    let bundle = Bundle::new(test, script);
    let dir = bundle.write().to_owned();
    let shim = Shim::start(test, &bundle.dir, "c");
    let task = shim.task();
    task.create("c", &dir, "").unwrap();
    (shim, task, dir)
}

fn pause(task: &Task, id: &str) -> ttrpc::Result<()> {
    let request = api::PauseRequest {
        id: id.into(),
        ..Default::default()
    };
    task.client().pause(Task::context(), &request).map(drop)
}

fn stats(task: &Task, id: &str) -> ttrpc::Result<()> {
    let request = api::StatsRequest {
        id: id.into(),
        ..Default::default()
    };
    task.client().stats(Task::context(), &request).map(drop)
}
