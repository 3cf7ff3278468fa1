//! A container or a whole guest that stands still: what containerd asks meanwhile is answered, and the end works.

use crate::{created, pause, stats};
use coffer_tests::task::code_of;
use coffer_tests::{Test, leaks};
use containerd_shim_protos::api::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::{Duration, Instant};
use ttrpc::Code;

/// What a kubelet waits for gladly.
const PROMPT: Duration = Duration::from_secs(2);
/// Fails when a call takes longer than this.
fn within<T>(limit: Duration, what: &str, call: impl FnOnce() -> T) -> T {
    let since = Instant::now();
    let answer = call();
    let took = since.elapsed();
    assert!(took < limit, "{what} took {took:?}");
    answer
}

#[test]
fn a_paused_container_is_looked_at_killed_and_deleted() {
    let test = Test::new("paused");
    let (_shim, task, _) = created(&test, "while :; do :; done");
    task.start("c", "").unwrap();
    within(PROMPT, "pause", || pause(&task, "c")).unwrap();
    let state = within(PROMPT, "state", || task.state("c", "")).unwrap();
    assert_eq!(state.status.enum_value(), Ok(Status::PAUSED));
    within(PROMPT, "stats", || stats(&task, "c")).unwrap();
    let running = within(PROMPT, "delete", || task.delete("c", ""));
    assert_eq!(
        code_of(&running.unwrap_err()),
        Some(Code::FAILED_PRECONDITION)
    );
    within(PROMPT, "kill", || task.kill("c", 9)).unwrap();
    assert_eq!(within(PROMPT, "wait", || task.wait("c", "")).unwrap(), 137);
    within(PROMPT, "delete", || task.delete("c", "")).unwrap();
}

/// The hypervisor process is stopped, as if its host were out of breath: no agent answers.
#[test]
fn a_guest_that_stands_still_is_looked_at_killed_and_deleted() {
    let test = Test::new("still");
    let (shim, task, _) = created(&test, "sleep 600");
    task.start("c", "").unwrap();
    let program = if test.hypervisor() == "qemu" {
        "qemu-system-x86_64"
    } else {
        "coffer-vmm"
    };
    let guests = leaks::descendants(std::process::id()).unwrap();
    let guests = guests.into_iter().filter(|pid| {
        let line = leaks::command_line(*pid);
        let name = line.split(' ').next().unwrap_or_default();
        name.rsplit('/').next() == Some(program)
    });
    let guests: Vec<u32> = guests.collect();
    assert!(!guests.is_empty());
    for pid in guests {
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP).unwrap();
    }
    let state = within(PROMPT, "state", || task.state("c", "")).unwrap();
    assert_eq!(state.status.enum_value(), Ok(Status::RUNNING));
    // What the guest is asked gets five times as long under emulation.
    let slowness = if test.hypervisor() == "qemu" { 5 } else { 1 };
    let asked = PROMPT * slowness + PROMPT / 2;
    let refused = within(asked, "stats", || stats(&task, "c"));
    assert_eq!(
        code_of(&refused.unwrap_err()),
        Some(Code::DEADLINE_EXCEEDED)
    );
    // The VM is ended: its hypervisor process is first asked to, and has five seconds for an answer.
    within(asked + 3 * PROMPT, "kill", || task.kill("c", 9)).unwrap();
    assert_eq!(within(PROMPT, "wait", || task.wait("c", "")).unwrap(), 137);
    within(PROMPT, "stats of the dead", || stats(&task, "c")).unwrap();
    assert_eq!(
        within(PROMPT, "delete", || task.delete("c", "")).unwrap(),
        137
    );
    let topics = ["create", "start", "exit", "delete"];
    coffer_tests::wait_for("the last event", || shim.topics().len() == topics.len());
    assert_eq!(shim.topics(), topics.map(|topic| format!("/tasks/{topic}")));
}
