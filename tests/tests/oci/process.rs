//! The process on the host that stands for a container: its streams, its signals and its end.

use super::PATIENT;
use coffer_tests::bundle::Bundle;
use coffer_tests::oci::{ConsoleSocket, MARKED, Runtime, process, reap};
use coffer_tests::shim::supervisor_of;
use coffer_tests::{Test, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::Stdio;

#[test]
fn the_process_of_the_pid_file_is_what_a_monitor_expects() {
    let test = Test::new("standin");
    let script = "echo out; echo err >&2; read line; echo \"got $line\"; cat; echo end; exit 42";
    let bundle = Bundle::new(&test, script);
    let dir = bundle.write().to_owned();
    for runtime in Runtime::all(&test) {
        // Flags may stand behind the id, and with an equals sign.
        let (from, mut to) = std::io::pipe().unwrap();
        let container = runtime.create_with_input(&dir, &["--no-pivot"], Stdio::from(from));
        let stat = fs::read_to_string(format!("/proc/{}/stat", container.pid)).unwrap();
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let (parent, group, session) = (fields[1], fields[2], fields[3]);
        assert_eq!(
            parent,
            std::process::id().to_string(),
            "an orphan of create"
        );
        let own = container.pid.to_string();
        assert_eq!(
            (group, session),
            (own.as_str(), own.as_str()),
            "a session of its own"
        );
        container.start();
        container.wait_output("out\nerr\n");
        to.write_all(b"a line\nand more\n").unwrap();
        container.wait_output("got a line\nand more\n");
        // The end of input arrives as that.
        drop(to);
        assert_eq!(container.wait(), 42, "{}", runtime.name());
        // All that was written is there when the process has ended.
        assert!(
            container.output().ends_with("end\n"),
            "{}",
            container.output()
        );
    }
}

#[test]
fn output_is_complete_when_the_process_has_ended() {
    let test = Test::new("flush");
    let bundle = Bundle::new(&test, "seq 1 20000; exec seq 20001 40000");
    let expected: String = (1..=40000).map(|n| format!("{n}\n")).collect();
    for runtime in Runtime::all(&test) {
        let container = runtime.create(bundle.write(), &[]);
        container.start();
        assert_eq!(container.wait(), 0);
        assert!(
            container.output() == expected,
            "{}: {} bytes",
            runtime.name(),
            container.output().len()
        );
    }
}

#[test]
fn signals_arrive_by_name_by_number_and_from_the_monitor() {
    let test = Test::new("signals");
    let script = "for s in HUP INT QUIT USR1 USR2 TERM CONT WINCH 35; do trap \"echo got $s\" $s; done; echo ready; \
                  while :; do sleep 0.1; done";
    let bundle = Bundle::new(&test, script);
    for runtime in Runtime::all(&test) {
        let container = runtime.create(bundle.write(), &[]);
        container.start();
        container.wait_output("ready");
        let id = container.id.as_str();
        let mut table = vec![
            (vec!["kill", id], "TERM"),
            (vec!["kill", id, "HUP"], "HUP"),
            (vec!["kill", id, "SIGUSR1"], "USR1"),
            (vec!["kill", id, "12"], "USR2"),
            (vec!["kill", "--all", id, "10"], "USR1"),
            (vec!["kill", "-a", id, "INT"], "INT"),
        ];
        if runtime.is_coffer() {
            table.push((vec!["kill", id, "SIGRTMIN+1"], "35"));
            table.push((vec!["kill", id, "rtmin+1"], "35"));
        }
        // With --all the shell's child gets the signal too, and the shell says so.
        let came = |name: &str| {
            let line = format!("got {name}");
            container.output().lines().filter(|l| *l == line).count()
        };
        for (words, name) in table {
            let before = came(name);
            runtime.ok(&words);
            wait_for(&format!("{words:?}"), || came(name) == before + 1);
        }
        // conmon hands signals on to the process itself.
        for (signal, name) in [
            (Signal::SIGTERM, "TERM"),
            (Signal::SIGQUIT, "QUIT"),
            (Signal::SIGUSR2, "USR2"),
        ] {
            let before = came(name);
            kill(container.pid, signal).unwrap();
            wait_for(&format!("{signal}"), || came(name) == before + 1);
        }
    }
}

#[test]
fn the_death_of_the_stand_in_is_the_death_of_the_process() {
    let test = Test::new("lease");
    let bundle = Bundle::new(&test, PATIENT);
    for runtime in Runtime::all(&test) {
        let container = runtime.create(bundle.write(), &[]);
        container.start();
        container.wait_output("ready");
        let document = test.dir().join(format!("{}.json", runtime.name()));
        fs::write(&document, process(&["sh", "-c", MARKED]).to_string()).unwrap();
        let pid = container.exec_detached(&document, &[]);
        let alive = || runtime.marked_is_alive(&container.id);
        wait_for("the exec to run", alive);
        kill(pid, Signal::SIGKILL).unwrap();
        assert_eq!(reap(pid), 137);
        wait_for("the exec to die", || !alive());
        assert_eq!(container.status(), "running", "{}", runtime.name());
        kill(container.pid, Signal::SIGKILL).unwrap();
        assert_eq!(container.wait(), 137);
        wait_for("the container to stop", || container.status() == "stopped");
        runtime.refuses(&["kill", &container.id, "TERM"], "container not running");
    }
}

/// As `systemctl stop` of its service does it, or the end of the host.
#[test]
fn what_a_supervisor_has_that_is_told_to_end_is_stopped_and_can_be_deleted() {
    let test = Test::new("told");
    let mut bundle = Bundle::new(&test, PATIENT);
    bundle.config["linux"]["cgroupsPath"] = json!(format!("/{}", test.id()));
    for runtime in Runtime::all(&test).iter().filter(|known| known.is_coffer()) {
        let container = runtime.create(bundle.write(), &[]);
        container.start();
        container.wait_output("ready");
        let supervisor = supervisor_of(&test.root().join(&container.id));
        let supervisor = Pid::from_raw(supervisor.cast_signed());
        kill(supervisor, Signal::SIGTERM).unwrap();
        assert_eq!(container.wait(), 125, "the VM ended, not the program");
        assert_eq!(reap(supervisor), 0);
        assert_eq!(container.status(), "stopped");
        runtime.refuses(&["kill", &container.id, "TERM"], "container not running");
        runtime.ok(&["delete", &container.id]);
        runtime.refuses(&["state", &container.id], "does not exist");
    }
}

#[test]
fn a_terminal_goes_over_the_console_socket() {
    let test = Test::new("tty");
    let script = "trap 'stty size' WINCH; tty; stty size; echo ready; until read line; do :; done; echo \"got $line\"; \
                  while ! [ -e /dev/shm/end ]; do sleep 0.1; done; exit 6";
    let mut bundle = Bundle::new(&test, script);
    bundle.config["process"]["terminal"] = json!(true);
    bundle.config["process"]["consoleSize"] = json!({"height": 31, "width": 91});
    for runtime in Runtime::all(&test) {
        let console = ConsoleSocket::new(test.dir());
        let container = runtime.create(bundle.write(), &["--console-socket", console.path()]);
        let mut terminal = console.receive();
        assert!(nix::unistd::isatty(terminal.master.as_fd()).unwrap());
        container.start();
        terminal.wait("/dev/pts/0");
        terminal.wait("31 91");
        terminal.wait("ready");
        terminal.set_size(40, 120);
        // The shell looks at its signals when the line has come.
        terminal.write("hello\n");
        terminal.wait("got hello");
        terminal.wait("40 120");
        runtime.ok(&["exec", &container.id, "touch", "/dev/shm/end"]);
        assert_eq!(container.wait(), 6);
    }
    // Without a socket for it a terminal can't be had.
    for runtime in Runtime::all(&test) {
        runtime.refuses(&["create", "--bundle", bundle.write(), "none"], "console");
        runtime.refuses(&["state", "none"], "does not exist");
    }
}
