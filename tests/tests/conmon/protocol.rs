//! The other ways to drive conmon: its older protocol, the foreground, flags that it hands to the runtime.

use crate::remove;
use coffer_tests::bundle::Bundle;
use coffer_tests::conmon::Conmon;
use coffer_tests::oci::{Runtime, process};
use coffer_tests::{Test, wait_for};
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use std::fs;

/// Without `--api-version` conmon says `pid` and `exit_code`; of an exec it says the latter, and in older versions both.
#[test]
fn the_older_protocol_tells_pids_and_codes() {
    let test = Test::new("conlegacy");
    let bundle = Bundle::new(&test, "echo ready; while :; do sleep 0.1; done");
    for runtime in Runtime::all(&test) {
        let conmon = Conmon::started(&test, &runtime, &bundle, &["--api-version", "0"]);
        conmon.wait_logged("stdout", "ready");
        let script = process(&["sh", "-c", "echo run; exit 44"]);
        let mut exec = conmon.exec(&test, &script, &["--api-version", "0"]);
        let told = exec.message().0;
        let pid = fs::read_to_string(exec.dir.join("pid")).unwrap();
        let code = if told.to_string() == pid {
            exec.message().0
        } else {
            told
        };
        assert_eq!(code, 44, "{}", runtime.name());
        assert_eq!(exec.logged("stdout"), "run\n", "{}", runtime.name());
        runtime.ok(&["kill", &conmon.id, "KILL"]);
        assert_eq!(conmon.exit_code(), 137);
        remove(&runtime, &conmon);
    }
}

#[test]
fn in_the_foreground_conmon_stays_until_the_end() {
    let test = Test::new("consync");
    let bundle = Bundle::new(&test, "echo ready; sleep 1; exit 7");
    for runtime in Runtime::all(&test) {
        let conmon = Conmon::started(&test, &runtime, &bundle, &["--sync"]);
        conmon.wait_logged("stdout", "ready");
        assert_eq!(conmon.exit_code(), 7, "{}", runtime.name());
        remove(&runtime, &conmon);
    }
}

#[test]
fn flags_for_the_runtime_and_the_end_of_no_input() {
    let test = Test::new("conflags");
    // Without --stdin there is no input, and a program that waits for some ends.
    let bundle = Bundle::new(&test, "cat; echo end; exit 3");
    for runtime in Runtime::all(&test) {
        let flags = ["--no-pivot", "--no-new-keyring", "--log-level", "debug"];
        let conmon = Conmon::started(&test, &runtime, &bundle, &flags);
        assert_eq!(conmon.exit_code(), 3, "{}", runtime.name());
        assert_eq!(conmon.logged("stdout"), "end\n", "{}", runtime.name());
        remove(&runtime, &conmon);
    }
}

#[test]
fn a_config_that_is_none_is_told_over_the_sync_pipe() {
    let test = Test::new("conjson");
    let bundle = Bundle::new(&test, "true");
    for runtime in Runtime::all(&test) {
        let mut conmon = Conmon::create_with(
            &test,
            &runtime,
            &bundle,
            &[],
            "{\"ociVersion\": \"1.0.2\"\"",
        );
        let (number, reason) = conmon.message();
        assert_eq!(number, -1, "{}", runtime.name());
        assert!(!reason.is_empty(), "{}", runtime.name());
        runtime.refuses(&["state", &conmon.id], "does not exist");
    }
}

/// podman finds such a container and ends it.
#[test]
fn a_container_outlives_its_conmon_and_can_be_ended() {
    let test = Test::new("conorphan");
    let bundle = Bundle::new(&test, "echo ready; while :; do sleep 0.1; done");
    for runtime in Runtime::all(&test) {
        let conmon = Conmon::started(&test, &runtime, &bundle, &[]);
        conmon.wait_logged("stdout", "ready");
        kill(conmon.own_pid(), Signal::SIGKILL).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert_eq!(runtime.status(&conmon.id), "running", "{}", runtime.name());
        let exec = runtime.call(&["exec", &conmon.id, "echo", "still here"]);
        assert_eq!(
            (exec.code, exec.text()),
            (0, "still here"),
            "{}",
            runtime.name()
        );
        runtime.ok(&["kill", &conmon.id, "KILL"]);
        wait_for("the container to stop", || {
            runtime.status(&conmon.id) == "stopped"
        });
        remove(&runtime, &conmon);
    }
}

/// The file by which CRI-O and podman know it. runc leaves the memory to the host's cgroup, which conmon watches itself.
#[test]
fn an_end_for_want_of_memory_leaves_the_file_that_engines_look_for() {
    let test = Test::new("conoom");
    let mut bundle = Bundle::new(&test, "tail /dev/zero");
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 16 << 20});
    let runtimes = Runtime::all(&test);
    for runtime in runtimes.iter().filter(|runtime| runtime.is_coffer()) {
        let conmon = Conmon::started(&test, runtime, &bundle, &[]);
        assert_eq!(conmon.exit_code(), 137);
        assert!(fs::exists(bundle.dir.join("oom")).unwrap());
        remove(runtime, &conmon);
    }
}
