//! Programs that end before anybody has looked: the right code, and events in the order in which containerd wants them.

use crate::created;
use coffer_tests::shim::Shim;
use coffer_tests::{Test, wait_for};

/// What was told of the container or its exec, without the paths of the topics.
fn told(shim: &Shim<'_>, exec: &str) -> Vec<String> {
    let events = shim.events().into_iter();
    let of_it = events.filter(|event| event.exec == exec);
    of_it
        .map(|event| event.topic.trim_start_matches("/tasks/").to_owned())
        .collect()
}

#[test]
fn a_container_that_ends_at_once_is_told_in_order_with_its_code() {
    for code in [0, 255] {
        let test = Test::new("atonce");
        let (shim, task, _) = created(&test, &format!("exit {code}"));
        // Who waits before the start, and who waits after the end, hear the same.
        let waiter = shim.task();
        let early = std::thread::spawn(move || waiter.wait("c", ""));
        task.start("c", "").unwrap();
        assert_eq!(early.join().unwrap().unwrap(), code);
        assert_eq!(task.wait("c", "").unwrap(), code);
        assert_eq!(task.delete("c", "").unwrap(), code);
        wait_for("the last event", || told(&shim, "").len() == 4);
        assert_eq!(told(&shim, ""), ["create", "start", "exit", "delete"]);
    }
}

#[test]
fn execs_that_end_at_once_are_told_in_order_with_their_codes() {
    let test = Test::new("execatonce");
    let (shim, task, _) = created(&test, "sleep 600");
    task.start("c", "").unwrap();
    let ends = [
        ("exit 0", 0),
        ("exit 255", 255),
        ("kill -9 $$", 137),
        ("kill -TERM $$", 143),
        ("kill -SEGV $$", 139),
    ];
    for (i, (script, code)) in ends.into_iter().enumerate() {
        let exec = format!("e{i}");
        task.exec("c", &exec, &["sh", "-c", script], false).unwrap();
        task.start("c", &exec).unwrap();
        if i % 2 == 0 {
            // Nobody asks before the end was told.
            wait_for("its exit", || told(&shim, &exec).len() == 3);
        }
        assert_eq!(task.wait("c", &exec).unwrap(), code, "{script}");
        assert_eq!(task.delete("c", &exec).unwrap(), code, "{script}");
        wait_for("the last event", || told(&shim, &exec).len() == 4);
        let topics = ["exec-added", "exec-started", "exit", "delete"];
        assert_eq!(told(&shim, &exec), topics, "{script}");
    }
    task.kill("c", 9).unwrap();
    assert_eq!(task.wait("c", "").unwrap(), 137);
    task.delete("c", "").unwrap();
}

/// What is killed before it was started has an end like any other.
#[test]
fn what_is_killed_before_its_start_ends_and_can_not_be_started() {
    let test = Test::new("unstarted");
    let (shim, task, _) = created(&test, "sleep 600");
    task.start("c", "").unwrap();
    task.exec("c", "e", &["sleep", "600"], false).unwrap();
    task.kill_process("c", "e", 9).unwrap();
    assert_eq!(task.wait("c", "e").unwrap(), 137);
    task.start("c", "e").unwrap_err();
    assert_eq!(task.delete("c", "e").unwrap(), 137);
    wait_for("the last event", || told(&shim, "e").len() == 3);
    assert_eq!(told(&shim, "e"), ["exec-added", "exit", "delete"]);
    task.kill("c", 9).unwrap();
    task.wait("c", "").unwrap();
    task.delete("c", "").unwrap();
}
