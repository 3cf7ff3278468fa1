//! Further processes in a container.

use super::PATIENT;
use coffer_tests::bundle::Bundle;
use coffer_tests::oci::{ConsoleSocket, Container, Runtime, process, reap};
use coffer_tests::{Finished, Test, finish_with_input};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

#[test]
fn exec_takes_every_form_that_engines_use() {
    let test = Test::new("execs");
    let bundle = Bundle::new(&test, PATIENT);
    for runtime in Runtime::all(&test) {
        let container = runtime.create(bundle.write(), &[]);
        container.start();
        container.wait_output("ready");
        command_in_words(&runtime, &container.id);
        let file = test.dir().join(format!("{}.json", runtime.name()));
        document(&runtime, &container, &file);
        let console = ConsoleSocket::new(test.dir());
        terminal(&runtime, &container, &file, &console);
        let pid_file = test.dir().join("never");
        what_is_not_there(&runtime, &container, &file, &pid_file);
    }
}

/// The command's words and flags, as conmon-rs gives them.
fn command_in_words(runtime: &Runtime<'_>, id: &str) {
    let in_front = |flags: &[&str], script: &str| -> Finished {
        runtime.call(&[&["exec"], flags, &[id, "sh", "-c", script]].concat())
    };
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
}

/// A process document, in front and detached.
fn document(runtime: &Runtime<'_>, container: &Container<'_>, file: &Path) {
    let id = container.id.as_str();
    let write = |value: Value| fs::write(file, value.to_string()).unwrap();
    write(process(&["sh", "-c", "echo $FROM; exit 9"]));
    let done = runtime.call(&["exec", "--process", file.to_str().unwrap(), id]);
    assert_eq!((done.code, done.text()), (9, "file"), "{}", done.stderr);
    write(process(&["cat"]));
    let cat = runtime.command(&["exec", "--process", file.to_str().unwrap(), id]);
    let done = finish_with_input(cat, b"through\n".to_vec());
    assert_eq!(done.text(), "through", "{}: {done:?}", runtime.name());
    write(process(&["sh", "-c", "echo $FROM; exit 9"]));
    let done = runtime.call(&["exec", &format!("--process={}", file.display()), id]);
    assert_eq!(done.code, 9, "{}", done.stderr);
    let pid = container.exec_detached(file, &[]);
    assert_eq!(reap(pid), 9);
}

/// A terminal, by the flag and by the document.
fn terminal(
    runtime: &Runtime<'_>,
    container: &Container<'_>,
    file: &Path,
    console: &ConsoleSocket,
) {
    let mut forms = vec![(&["--tty"][..], json!(true))];
    if runtime.is_coffer() {
        forms.extend([(&["--tty"][..], Value::Null), (&[], json!(true))]);
    }
    for (flag, terminal) in forms {
        let mut document = process(&[
            "sh",
            "-c",
            "read line; stty size; echo \"got $line\"; exit 5",
        ]);
        document["terminal"] = terminal;
        document["consoleSize"] = json!({"height": 30, "width": 90});
        fs::write(file, document.to_string()).unwrap();
        let flags = [flag, &["--console-socket", console.path()]].concat();
        let pid = container.exec_detached(file, &flags);
        let mut terminal = console.receive();
        terminal.write("hello\n");
        terminal.wait("got hello");
        assert_eq!(reap(pid), 5, "{}", runtime.name());
        let text = terminal.rest();
        assert!(text.contains("30 90"), "{}: {text:?}", runtime.name());
    }
}

/// A program that can't be had: no pid file, and a reason.
fn what_is_not_there(
    runtime: &Runtime<'_>,
    container: &Container<'_>,
    file: &Path,
    pid_file: &Path,
) {
    fs::write(file, process(&["/no/such"]).to_string()).unwrap();
    let words = [
        "exec",
        "--pid-file",
        pid_file.to_str().unwrap(),
        "--process",
        file.to_str().unwrap(),
        "--detach",
        &container.id,
    ];
    let done = runtime.call(&words);
    assert!(
        done.code != 0 && done.stderr.contains("no such file or directory"),
        "{done:?}"
    );
    assert!(!pid_file.exists());
}
