//! The OCI command line: the specification's states and their transitions, and what engines read, write and look for.
//!
//! Every test runs with runc first. What runc does is what podman, CRI-O, buildah and containerd know.

use coffer_tests::bundle::Bundle;
use coffer_tests::oci::{ConsoleSocket, Container, Runtime, into_file, read_pid, reap};
use coffer_tests::{Finished, Test, finish_with_input, schema, wait_for};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::Stdio;

/// Ends by itself on SIGTERM, with a code of its own.
const PATIENT: &str =
    "trap 'echo term; exit 3' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.1; done";

/// A refused transition: the verb with its arguments, where `@` is the container and `.` the bundle, and what engines look
/// for in the message.
type Refused = (&'static [&'static str], &'static str);

fn each_is_refused(runtime: &Runtime<'_>, bundle: &str, id: &str, table: &[Refused]) {
    for (words, message) in table {
        let word = |word: &&'static str| match *word {
            "@" => id,
            "." => bundle,
            word => word,
        };
        let words: Vec<_> = words.iter().map(word).collect();
        let done = runtime.refuses(&words, message);
        // The code of a failed exec must not look like a program's.
        let codes = if words[0] == "exec" {
            [125, 255]
        } else {
            [1, 1]
        };
        assert!(
            codes.contains(&done.code),
            "{} {words:?}: code {}",
            runtime.name(),
            done.code
        );
        let lines = done.stderr.trim_end().lines().count();
        assert_eq!(lines, 1, "{} {words:?}: {}", runtime.name(), done.stderr);
    }
}

#[test]
fn every_illegal_transition_is_refused_in_words_that_engines_know() {
    let test = Test::new("states");
    let mut bundle = Bundle::new(&test, PATIENT);
    for runtime in Runtime::all(&test) {
        let dir = bundle.write().to_owned();
        let unknown: [Refused; 10] = [
            (&["state", "@"], "does not exist"),
            (&["start", "@"], "does not exist"),
            (&["kill", "@", "9"], "does not exist"),
            (&["delete", "@"], "does not exist"),
            (&["exec", "@", "true"], "does not exist"),
            (&["pause", "@"], "does not exist"),
            (&["resume", "@"], "does not exist"),
            (&["ps", "@"], "does not exist"),
            (&["events", "--stats", "@"], "does not exist"),
            (&["update", "--pids-limit", "5", "@"], "does not exist"),
        ];
        each_is_refused(&runtime, &dir, "nobody", &unknown);
        assert_eq!(runtime.ok(&["delete", "--force", "nobody"]), "");

        let container = runtime.create(&dir, &[]);
        let id = container.id.as_str();
        assert_eq!(container.status(), "created");
        // What the specification says about the config of a created container: changes to it have no effect.
        bundle.config["process"]["args"] = json!(["false"]);
        bundle.write();
        let twice: [Refused; 2] = [
            (&["create", "--bundle", ".", "@"], "already exists"),
            (&["resume", "@"], "not paused"),
        ];
        each_is_refused(&runtime, &dir, id, &twice);

        container.start();
        container.wait_output("ready");
        assert_eq!(container.status(), "running");
        let running: [Refused; 4] = [
            (&["start", "@"], "already running"),
            (&["delete", "@"], "is not stopped: running"),
            (&["resume", "@"], "not paused"),
            (&["kill", "@", "NOSIGNAL"], "NOSIGNAL"),
        ];
        each_is_refused(&runtime, &dir, id, &running);

        runtime.ok(&["pause", id]);
        assert_eq!(container.status(), "paused");
        let paused: [Refused; 4] = [
            (&["start", "@"], "paused"),
            (&["pause", "@"], "not running"),
            (&["exec", "@", "true"], "cannot exec in a paused container"),
            (&["delete", "@"], "is not stopped: paused"),
        ];
        each_is_refused(&runtime, &dir, id, &paused);
        runtime.ok(&["resume", id]);
        assert_eq!(container.status(), "running");

        runtime.ok(&["kill", id, "TERM"]);
        assert_eq!(container.wait(), 3, "{}", runtime.name());
        wait_for("the container to stop", || container.status() == "stopped");
        assert_eq!(runtime.state(id)["pid"], 0);
        let stopped: [Refused; 7] = [
            (&["start", "@"], "cannot start a container that has stopped"),
            (&["kill", "@", "TERM"], "container not running"),
            (&["exec", "@", "true"], "cannot exec in a stopped container"),
            (&["pause", "@"], "container not running"),
            (&["resume", "@"], "not paused"),
            (&["events", "--stats", "@"], "not running"),
            (&["update", "--pids-limit", "5", "@"], "not running"),
        ];
        each_is_refused(&runtime, &dir, id, &stopped);
        each_is_refused(&runtime, &dir, id, &twice[..1]);
        runtime.ok(&["delete", id]);
        each_is_refused(&runtime, &dir, id, &[(&["delete", "@"], "does not exist")]);
        bundle.config["process"]["args"] = json!(["/bin/sh", "-c", PATIENT]);
    }
}

#[test]
fn a_failed_create_says_why_and_leaves_nothing() {
    let test = Test::new("failed");
    let mut bundle = Bundle::new(&test, "true");
    let dir = bundle.write().to_owned();
    let good = bundle.config.clone();
    let pid_file = test.dir().join("pid");
    // Field of the config, its value, and what the message must name. podman makes exit codes 126 and 127 of two of them.
    let bad: [(&str, Value, &str); 5] = [
        (
            "/process/args",
            json!(["/no/such"]),
            "no such file or directory",
        ),
        (
            "/process/args",
            json!(["nosuch"]),
            "executable file not found in",
        ),
        ("/process/args", json!(["/etc/passwd"]), "permission denied"),
        ("/process/args", json!([]), "args"),
        ("/root/path", json!("/no/root"), "/no/root"),
    ];
    for runtime in Runtime::all(&test) {
        for (field, value, message) in &bad {
            *bundle.config.pointer_mut(field).unwrap() = value.clone();
            bundle.write();
            let words = [
                "--bundle",
                &dir,
                "--pid-file",
                pid_file.to_str().unwrap(),
                "bad",
            ];
            println!("{}: {field} = {value}", runtime.name());
            runtime.refuses_create(&words, message);
            assert!(!pid_file.exists(), "{}: {field} = {value}", runtime.name());
            runtime.refuses(&["state", "bad"], "does not exist");
            bundle.config = good.clone();
        }
        fs::remove_file(format!("{dir}/config.json")).unwrap();
        runtime.refuses_create(&["--bundle", &dir, "bad"], "config.json");
        bundle.write();
        runtime.refuses(&["create", "--bundle", &dir, "../bad"], "");
        runtime.refuses(&["create", "--bundle", &dir, ""], "");
        runtime.refuses(&["create", "--bundle", &dir], "");
        runtime.refuses(&["create", "--nosuch", "bad"], "nosuch");
        runtime.refuses(&["nosuch"], "nosuch");
        // podman and go-runc read the reason from a log.
        for (format, starts) in [("json", "{"), ("text", "time=")] {
            let log = test.dir().join(format!("log.{format}"));
            let log = log.to_str().unwrap();
            runtime.refuses(
                &["--log", log, "--log-format", format, "start", "nobody"],
                "",
            );
            runtime.refuses(
                &[
                    &format!("--log={log}"),
                    &format!("--log-format={format}"),
                    "kill",
                    "nobody",
                ],
                "",
            );
            let text = fs::read_to_string(log).unwrap();
            let lines: Vec<_> = text.lines().collect();
            assert_eq!(lines.len(), 2, "{}: {text}", runtime.name());
            for line in lines {
                assert!(line.starts_with(starts), "{}: {line}", runtime.name());
                assert!(
                    line.contains("does not exist"),
                    "{}: {line}",
                    runtime.name()
                );
                if format == "json" {
                    let record: Value = serde_json::from_str(line).unwrap();
                    assert_eq!(record["level"], "error");
                    assert!(record["msg"].is_string() && record["time"].is_string());
                }
            }
            fs::remove_file(log).unwrap();
        }
    }
}

#[test]
fn state_and_features_are_as_the_schemas_say() {
    let test = Test::new("schemas");
    let mut bundle = Bundle::new(&test, PATIENT);
    bundle.config["annotations"] = json!({"org.example.key": "value"});
    for runtime in Runtime::all(&test) {
        let features = runtime.call(&["features"]);
        // CRI-O reads both streams as one.
        assert_eq!(features.stderr, "", "{}", runtime.name());
        let features: Value = serde_json::from_slice(&features.stdout).unwrap();
        schema::check("features-schema.json", &features).unwrap();
        assert!(
            features["linux"]["namespaces"]
                .as_array()
                .is_some_and(|n| n.len() >= 6),
            "{features}"
        );

        let version = runtime.ok(&["--version"]);
        assert!(
            version.starts_with(&format!("{} version ", runtime.name())),
            "{version}"
        );
        assert!(
            version.lines().any(|l| l.starts_with("commit: ")),
            "{version}"
        );
        assert!(
            version.lines().any(|l| l.starts_with("spec: ")),
            "{version}"
        );

        let container = runtime.create(bundle.write(), &[]);
        let id = container.id.as_str();
        let shape = |status: &str| {
            let state = runtime.state(id);
            if status != "paused" {
                schema::check("state-schema.json", &state).unwrap();
            }
            assert_eq!(state["status"], status, "{}", runtime.name());
            assert_eq!(state["id"], id);
            assert_eq!(state["bundle"], bundle.dir.to_str().unwrap());
            assert_eq!(state["annotations"]["org.example.key"], "value");
            let listed = runtime.ok(&["list", "--format", "json"]);
            let listed: Value = serde_json::from_str(&listed).unwrap();
            let entry = &listed.as_array().unwrap()[0];
            for field in [
                "ociVersion",
                "id",
                "pid",
                "status",
                "bundle",
                "rootfs",
                "created",
            ] {
                assert_eq!(entry[field], state[field], "{} {field}", runtime.name());
            }
            assert_eq!(runtime.ok(&["list", "-q"]), id);
            assert!(runtime.ok(&["list"]).contains(id));
            state["pid"].as_i64().unwrap()
        };
        assert_eq!(shape("created"), i64::from(container.pid.as_raw()));
        container.start();
        container.wait_output("ready");
        assert_eq!(shape("running"), i64::from(container.pid.as_raw()));
        runtime.ok(&["pause", id]);
        shape("paused");
        runtime.ok(&["resume", id]);
        runtime.ok(&["kill", id, "KILL"]);
        assert_eq!(container.wait(), 137);
        wait_for("the end", || container.status() == "stopped");
        assert_eq!(shape("stopped"), 0);
        // Engines ask whether there is checkpointing by asking for its help.
        if runtime.is_coffer() {
            runtime.refuses(&["checkpoint", "--help"], "not supported");
            runtime.refuses(&["restore", "--help"], "not supported");
            runtime.refuses(&["checkpoint", id], "not supported");
        }
    }
}

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
        let process = test.dir().join(format!("{}.json", runtime.name()));
        fs::write(
            &process,
            process_of(&["sh", "-c", "echo $$ > /dev/shm/pid; exec sleep 600"]).to_string(),
        )
        .unwrap();
        let pid = exec_detached(&test, &runtime, &container, &process, &[]);
        let alive = || {
            runtime
                .call(&[
                    "exec",
                    &container.id,
                    "sh",
                    "-c",
                    "kill -0 $(cat /dev/shm/pid)",
                ])
                .code
                == 0
        };
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

/// A process document as podman writes it for an exec.
fn process_of(args: &[&str]) -> Value {
    json!({"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/", "env": ["PATH=/bin", "FROM=file"]})
}

fn exec_detached(
    test: &Test,
    runtime: &Runtime<'_>,
    container: &Container<'_>,
    process: &std::path::Path,
    flags: &[&str],
) -> nix::unistd::Pid {
    let name = test.id();
    let pid_file = test.dir().join(format!("{name}.pid"));
    let words = [
        &[
            "exec",
            "--pid-file",
            pid_file.to_str().unwrap(),
            "--process",
            process.to_str().unwrap(),
            "--detach",
        ],
        flags,
        &[&container.id],
    ]
    .concat();
    let output = test.dir().join(format!("{name}.out"));
    let code = into_file(runtime.command(&words), &output);
    assert_eq!(
        code,
        0,
        "{} {words:?}: {}",
        runtime.name(),
        fs::read_to_string(&output).unwrap()
    );
    read_pid(&pid_file)
}

#[test]
fn exec_takes_every_form_that_engines_use() {
    let test = Test::new("execs");
    let bundle = Bundle::new(&test, PATIENT);
    for runtime in Runtime::all(&test) {
        let container = runtime.create(bundle.write(), &[]);
        container.start();
        container.wait_output("ready");
        let id = container.id.as_str();
        let in_front = |flags: &[&str], script: &str| -> Finished {
            runtime.call(&[&["exec"], flags, &[id, "sh", "-c", script]].concat())
        };
        // The words of the command, as conmon-rs gives them.
        for code in [0, 1, 42, 255] {
            assert_eq!(
                in_front(&[], &format!("exit {code}")).code,
                code,
                "{}",
                runtime.name()
            );
        }
        assert_eq!(in_front(&[], "kill -9 $$").code, 137);
        let flags = [
            "--env",
            "A=1",
            "--env=B=2",
            "--cwd",
            "/etc",
            "--user",
            "1000:2000",
        ];
        let done = in_front(
            &flags,
            "echo $A $B $(pwd) $(id -u) $(id -g); echo problem >&2",
        );
        assert_eq!(
            (done.text(), done.stderr.as_str()),
            ("1 2 /etc 1000 2000", "problem\n")
        );
        let done = in_front(&["--cap", "CAP_SYS_TIME"], "grep CapEff /proc/self/status");
        assert!(
            done.text().ends_with("2000420"),
            "{}: {done:?}",
            runtime.name()
        );
        let missing = runtime.call(&["exec", id, "/no/such"]);
        assert!(
            missing.code != 0 && missing.stderr.contains("no such file or directory"),
            "{missing:?}"
        );
        let denied = runtime.call(&["exec", id, "/etc/passwd"]);
        assert!(
            denied.code != 0 && denied.stderr.contains("permission denied"),
            "{denied:?}"
        );

        // A process document, in front and detached.
        let process = test.dir().join(format!("{}.json", runtime.name()));
        let write = |value: Value| fs::write(&process, value.to_string()).unwrap();
        write(process_of(&["sh", "-c", "echo $FROM; exit 9"]));
        let done = runtime.call(&["exec", "--process", process.to_str().unwrap(), id]);
        assert_eq!((done.code, done.text()), (9, "file"), "{}", done.stderr);
        write(process_of(&["cat"]));
        let cat = runtime.command(&["exec", "--process", process.to_str().unwrap(), id]);
        let done = finish_with_input(cat, b"through\n".to_vec());
        assert_eq!(done.text(), "through", "{}: {done:?}", runtime.name());
        write(process_of(&["sh", "-c", "echo $FROM; exit 9"]));
        let done = runtime.call(&["exec", &format!("--process={}", process.display()), id]);
        assert_eq!(done.code, 9, "{}", done.stderr);
        let pid = exec_detached(&test, &runtime, &container, &process, &[]);
        assert_eq!(reap(pid), 9);

        // A terminal, by the flag and by the document.
        let console = ConsoleSocket::new(test.dir());
        let mut forms = vec![(&["--tty"][..], json!(true))];
        if runtime.is_coffer() {
            forms.extend([(&["--tty"][..], Value::Null), (&[], json!(true))]);
        }
        for (flag, terminal) in forms {
            let mut document = process_of(&[
                "sh",
                "-c",
                "read line; stty size; echo \"got $line\"; exit 5",
            ]);
            document["terminal"] = terminal;
            document["consoleSize"] = json!({"height": 30, "width": 90});
            write(document);
            let flags = [flag, &["--console-socket", console.path()]].concat();
            let pid = exec_detached(&test, &runtime, &container, &process, &flags);
            let mut terminal = console.receive();
            terminal.write("hello\n");
            terminal.wait("got hello");
            assert_eq!(reap(pid), 5, "{}", runtime.name());
            let text = terminal.rest();
            assert!(text.contains("30 90"), "{}: {text:?}", runtime.name());
        }

        // A process that can't be had: no pid file, and a reason.
        let pid_file = test.dir().join("never");
        write(process_of(&["/no/such"]));
        let words = [
            "exec",
            "--pid-file",
            pid_file.to_str().unwrap(),
            "--process",
            process.to_str().unwrap(),
            "--detach",
            id,
        ];
        let done = runtime.call(&words);
        assert!(
            done.code != 0 && done.stderr.contains("no such file or directory"),
            "{done:?}"
        );
        assert!(!pid_file.exists());
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

#[test]
fn run_list_ps_events_and_update_answer() {
    let test = Test::new("verbs");
    let mut bundle = Bundle::new(&test, "echo in front; exit 12");
    let patient = json!(["/bin/sh", "-c", PATIENT]);
    for runtime in Runtime::all(&test) {
        let done = runtime.call(&["run", "--bundle", bundle.write(), &test.id()]);
        assert_eq!(
            (done.code, done.text()),
            (12, "in front"),
            "{}: {}",
            runtime.name(),
            done.stderr
        );
        let quick = std::mem::replace(&mut bundle.config["process"]["args"], patient.clone());
        bundle.config["linux"]["resources"]["memory"] = json!({"limit": 100 << 20});
        let container = runtime.create(bundle.write(), &[]);
        let id = container.id.as_str();
        container.start();
        container.wait_output("ready");
        let pids = runtime.ok(&["ps", "--format", "json", id]);
        let pids: Vec<i32> = serde_json::from_str(&pids).unwrap();
        assert!(
            pids.contains(&container.pid.as_raw()),
            "{}: {pids:?}",
            runtime.name()
        );
        assert!(runtime.ok(&["ps", id]).contains("PID"));

        let stats =
            || -> Value { serde_json::from_str(&runtime.ok(&["events", "--stats", id])).unwrap() };
        let first = stats();
        assert_eq!(
            (&first["type"], &first["id"]),
            (&json!("stats"), &json!(id))
        );
        let data = &first["data"];
        assert!(data["cpu"]["usage"]["total"].is_u64(), "{first}");
        assert!(
            data["pids"]["current"].as_u64().is_some_and(|n| n >= 1),
            "{first}"
        );
        assert!(
            data["memory"]["usage"]["usage"]
                .as_u64()
                .is_some_and(|n| n > 0),
            "{first}"
        );
        assert_eq!(
            data["memory"]["usage"]["limit"],
            100 << 20,
            "{}",
            runtime.name()
        );

        // A limit by each of the three ways.
        let file = test.dir().join("resources.json");
        let set = |limit: u64| json!({"memory": {"limit": limit}}).to_string();
        let limit = || {
            stats()["data"]["memory"]["usage"]["limit"]
                .as_u64()
                .unwrap()
        };
        runtime.ok(&["update", "--memory", &(90_u64 << 20).to_string(), id]);
        assert_eq!(limit(), 90 << 20, "{}", runtime.name());
        fs::write(&file, set(80 << 20)).unwrap();
        runtime.ok(&["update", &format!("--resources={}", file.display()), id]);
        assert_eq!(limit(), 80 << 20, "{}", runtime.name());
        let update = runtime.command(&["update", "--resources", "-", id]);
        let done = finish_with_input(update, set(70 << 20).into_bytes());
        assert_eq!(done.code, 0, "{}", done.stderr);
        assert_eq!(limit(), 70 << 20, "{}", runtime.name());
        runtime.ok(&["update", "--pids-limit=33", id]);
        assert_eq!(stats()["data"]["pids"]["limit"], 33, "{}", runtime.name());

        bundle.config["process"]["args"] = quick;
    }
    let spec = test.dir().join("spec");
    fs::create_dir(&spec).unwrap();
    for runtime in Runtime::all(&test) {
        runtime.ok(&["spec", "--bundle", spec.to_str().unwrap()]);
        let config = spec.join("config.json");
        let text = fs::read(&config).unwrap();
        let config_value: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(config_value["process"]["args"], json!(["sh"]));
        fs::remove_file(config).unwrap();
    }
}
