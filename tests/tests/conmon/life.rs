//! From create to the end: exit codes, exec, attach, time-outs, and who is killed when.

use crate::remove;
use coffer_tests::bundle::Bundle;
use coffer_tests::conmon::Conmon;
use coffer_tests::oci::{MARKED, Runtime, process};
use coffer_tests::{Test, wait_for};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use std::fs;

fn shell(script: &str) -> Value {
    process(&["sh", "-c", script])
}

#[test]
fn a_container_runs_is_logged_and_leaves_its_code() {
    let test = Test::new("conlog");
    let script = "echo to out; echo to err >&2; printf 'no newline'; exit 42";
    let bundle = Bundle::new(&test, script);
    for runtime in Runtime::all(&test) {
        // As podman's exit command, which deletes the container. conmon waits for all that is left below it.
        let marker = test.dir().join(format!("ended-{}", runtime.name()));
        let script = format!(
            "{:?} --root {} delete --force $0 && touch {marker:?}",
            runtime.program(),
            runtime.root()
        );
        let command = ["-c", &script, "@"];
        let mut touch = vec!["--exit-command", "/bin/sh"];
        touch.extend(command.iter().flat_map(|word| ["--exit-command-arg", word]));
        let mut conmon = Conmon::create(&test, &runtime, &bundle, &touch);
        conmon.pid();
        // Nothing of the program before start.
        assert_eq!(conmon.logged("stdout"), "", "{}", runtime.name());
        conmon.start();
        assert_eq!(conmon.exit_code(), 42, "{}", runtime.name());
        assert_eq!(
            conmon.logged("stdout"),
            "to out\nno newline",
            "{}",
            runtime.name()
        );
        assert_eq!(conmon.logged("stderr"), "to err\n", "{}", runtime.name());
        let exit = fs::read_to_string(conmon.dir.join("exits").join(&conmon.id)).unwrap();
        assert_eq!(exit, "42");
        assert!(marker.exists(), "the exit command failed");
        runtime.refuses(&["state", &conmon.id], "does not exist");
    }
}

#[test]
fn a_program_that_ends_at_once_loses_neither_code_nor_output() {
    let test = Test::new("conearly");
    let bundle = Bundle::new(&test, "echo quick; exit 7");
    for runtime in Runtime::all(&test) {
        let conmon = Conmon::started(&test, &runtime, &bundle, &[]);
        assert_eq!(conmon.exit_code(), 7, "{}", runtime.name());
        assert_eq!(conmon.logged("stdout"), "quick\n", "{}", runtime.name());
        remove(&runtime, &conmon);
    }
}

#[test]
fn a_create_that_fails_is_told_with_its_reason() {
    let test = Test::new("confail");
    let mut bundle = Bundle::new(&test, "true");
    bundle.config["process"]["args"] = json!(["/no/such"]);
    for runtime in Runtime::all(&test) {
        let mut conmon = Conmon::create(&test, &runtime, &bundle, &[]);
        let (number, reason) = conmon.message();
        assert_eq!(number, -1, "{}", runtime.name());
        assert!(
            reason.contains("no such file or directory"),
            "{}: {reason}",
            runtime.name()
        );
        runtime.refuses(&["state", &conmon.id], "does not exist");
    }
}

#[test]
fn exec_gives_codes_output_input_and_terminals() {
    let test = Test::new("conexec");
    let bundle = Bundle::new(&test, "echo ready; while :; do sleep 0.1; done");
    for runtime in Runtime::all(&test) {
        let container = Conmon::started(&test, &runtime, &bundle, &[]);
        container.wait_logged("stdout", "ready");

        for (script, code) in [
            ("exit 0", 0),
            ("exit 1", 1),
            ("exit 255", 255),
            ("kill -15 $$", 143),
        ] {
            let mut exec = container.exec(&test, &shell(&format!("echo run; {script}")), &[]);
            exec.pid();
            assert_eq!(exec.exit_code(), code, "{}: {script}", runtime.name());
            assert_eq!(exec.logged("stdout"), "run\n", "{}", runtime.name());
        }

        let mut missing = container.exec(&test, &process(&["/no/such"]), &[]);
        let (number, reason) = missing.message();
        assert!(
            number < 0 && reason.contains("no such file or directory"),
            "{}: {number} {reason}",
            runtime.name()
        );

        // Attached with input: the caller connects before the process runs.
        let script = "read line; echo \"got $line\"; echo problem >&2; cat; exit 4";
        let mut exec = container.exec(&test, &shell(script), &["-i", "--exec-attach"]);
        let mut attached = exec.attach_first();
        exec.pid();
        attached.write("a line\n");
        attached.wait("got a line\n");
        attached.write("more\n");
        attached.close_input();
        assert_eq!(
            attached.rest(),
            ("got a line\nmore\n".into(), "problem\n".into()),
            "{}",
            runtime.name()
        );
        assert_eq!(exec.message().0, 4, "{}", runtime.name());

        // The same with a terminal that changes its size.
        let script = "tty; until stty size | grep '40 120'; do sleep 0.1; done; read line; echo \"got $line\"; exit 5";
        let mut document = shell(script);
        document["terminal"] = json!(true);
        let mut exec = container.exec(&test, &document, &["-t", "--exec-attach"]);
        let mut attached = exec.attach_first();
        exec.pid();
        attached.wait("/dev/pts/");
        exec.control("1 40 120");
        attached.wait("40 120");
        attached.write("hello\n");
        attached.wait("got hello");
        attached.rest();
        assert_eq!(exec.message().0, 5, "{}", runtime.name());

        // Too slow: killed by conmon, and the container goes on. Under runc the program was seen to survive that now and then.
        if runtime.is_coffer() {
            let mut slow = container.exec(&test, &shell(MARKED), &["--timeout", "10"]);
            slow.pid();
            let alive = || runtime.marked_is_alive(&container.id);
            wait_for("the exec to run", alive);
            assert_eq!(slow.exit_code(), -1, "{}", runtime.name());
            wait_for("the exec to be gone", || !alive());
        }

        runtime.ok(&["kill", &container.id, "KILL"]);
        assert_eq!(container.exit_code(), 137);
        remove(&runtime, &container);
    }
}

#[test]
fn clients_attach_detach_and_attach_again() {
    let test = Test::new("conattach");
    let script = "echo ready; while read line; do echo \"got $line\"; echo \"about $line\" >&2; done; echo end; exit 8";
    let bundle = Bundle::new(&test, script);
    for runtime in Runtime::all(&test) {
        let mut conmon = Conmon::create(&test, &runtime, &bundle, &["-i", "--leave-stdin-open"]);
        conmon.pid();
        let mut first = conmon.attach();
        conmon.start();
        first.wait("ready\n");
        first.write("one\n");
        first.wait("got one\n");
        drop(first);
        // Two at once; both see the output, and the log has all of it.
        let (mut second, mut third) = (conmon.attach(), conmon.attach());
        second.write("two\n");
        second.wait("got two\n");
        third.wait("got two\n");
        drop((second, third));
        // A log that was moved away is opened anew.
        let log = conmon.dir.join("log");
        fs::rename(&log, conmon.dir.join("log.1")).unwrap();
        conmon.control("2 0 0");
        wait_for("a new log", || log.exists());
        let mut last = conmon.attach();
        last.write("three\n");
        last.wait("got three\n");
        conmon.wait_logged("stdout", "got three\n");
        assert!(!conmon.logged("stdout").contains("got two"));
        conmon.wait_logged("stderr", "about three\n");
        drop(last);
        runtime.ok(&["kill", &conmon.id, "KILL"]);
        assert_eq!(conmon.exit_code(), 137);
        remove(&runtime, &conmon);
    }
}

#[test]
fn the_end_of_input_and_the_size_of_the_terminal_arrive() {
    let test = Test::new("contty");
    let mut bundle = Bundle::new(&test, "cat; echo end; exit 9");
    for runtime in Runtime::all(&test) {
        let mut conmon = Conmon::create(&test, &runtime, &bundle, &["-i"]);
        conmon.pid();
        let mut client = conmon.attach();
        conmon.start();
        client.write("some input\n");
        client.wait("some input\n");
        // Without --leave-stdin-open the end of one client's input is the end of the container's.
        client.close_input();
        assert!(client.rest().0.ends_with("end\n"), "{}", runtime.name());
        assert_eq!(conmon.exit_code(), 9, "{}", runtime.name());
        remove(&runtime, &conmon);
    }
    let script = "tty; echo ready; until stty size | grep '33 99'; do sleep 0.1; done; read line; echo \"got $line\"; exit 6";
    bundle.config["process"]["terminal"] = json!(true);
    bundle.config["process"]["args"] = json!(["sh", "-c", script]);
    for runtime in Runtime::all(&test) {
        let mut conmon = Conmon::create(&test, &runtime, &bundle, &["-t"]);
        conmon.pid();
        let mut client = conmon.attach();
        conmon.start();
        client.wait("ready");
        conmon.control("1 33 99");
        client.wait("33 99");
        client.write("hello\n");
        client.wait("got hello");
        let (text, _) = client.rest();
        assert!(
            text.contains("/dev/pts/0") && text.contains("33 99"),
            "{}: {text:?}",
            runtime.name()
        );
        assert_eq!(conmon.exit_code(), 6, "{}", runtime.name());
        remove(&runtime, &conmon);
    }
}

#[test]
fn a_time_out_and_the_death_of_the_stand_in_end_the_container() {
    let test = Test::new("conkill");
    let bundle = Bundle::new(
        &test,
        "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.1; done",
    );
    let stopped = |runtime: &Runtime<'_>, id: &str| {
        wait_for("the container to stop", || runtime.status(id) == "stopped");
    };
    for runtime in Runtime::all(&test) {
        let conmon = Conmon::started(&test, &runtime, &bundle, &["--timeout", "8"]);
        conmon.wait_logged("stdout", "ready");
        // conmon's own code for that, whatever the process ended with.
        assert_eq!(conmon.exit_code(), -1, "{}: timeout", runtime.name());
        stopped(&runtime, &conmon.id);
        remove(&runtime, &conmon);

        let mut conmon = Conmon::create(&test, &runtime, &bundle, &[]);
        let pid = conmon.pid();
        conmon.start();
        conmon.wait_logged("stdout", "ready");
        kill(pid, Signal::SIGKILL).unwrap();
        assert_eq!(conmon.exit_code(), 137, "{}: kill", runtime.name());
        stopped(&runtime, &conmon.id);
        remove(&runtime, &conmon);

        // conmon hands on what it gets.
        let conmon = Conmon::started(&test, &runtime, &bundle, &[]);
        conmon.wait_logged("stdout", "ready");
        kill(conmon.own_pid(), Signal::SIGTERM).unwrap();
        assert_eq!(
            conmon.exit_code(),
            3,
            "{}: SIGTERM to conmon",
            runtime.name()
        );
        assert!(
            conmon.logged("stdout").ends_with("term\n"),
            "{}",
            runtime.name()
        );
        remove(&runtime, &conmon);
    }
}

#[test]
fn a_create_whose_conmon_was_killed_leaves_what_delete_can_remove() {
    let test = Test::new("conlost");
    let bundle = Bundle::new(&test, "sleep 600");
    // runc itself leaves a cgroup behind when it is killed so.
    for runtime in Runtime::all(&test)
        .iter()
        .filter(|runtime| runtime.is_coffer())
    {
        // The runtime is killed with conmon at whatever it does then; the times are meant to hit different steps of a boot.
        for millis in [0, 50, 150, 400, 1000] {
            let conmon = Conmon::create(&test, runtime, &bundle, &[]);
            std::thread::sleep(std::time::Duration::from_millis(millis));
            kill(conmon.own_pid(), Signal::SIGKILL).unwrap();
            remove(runtime, &conmon);
            runtime.refuses(&["state", &conmon.id], "does not exist");
        }
    }
    test.check_leaks().unwrap();
}
