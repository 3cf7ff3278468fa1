//! A container that runs in the background, through all commands about it.

use super::{DIFFERENCES, MEMORY_LIMIT, read};
use coffer_tests::podman::{Podman, Report, compare, shown};
use coffer_tests::wait_for;
use std::fs;

/// The image that is made of the container.
const COMMITTED: &str = "localhost/committed";

/// A container in the background, that answers signals and keeps a count of its starts.
const SERVICE: &str = "trap 'echo term; exit 3' TERM; trap 'echo usr1' USR1; echo start >> /count; \
                       echo started; echo problem >&2; while :; do sleep 0.1; done";

#[test]
fn a_container_lives_through_all_commands() {
    compare("podlife", DIFFERENCES, |podman, report| {
        podman.run_detached("c", &["--memory", "100m"], &["sh", "-c", SERVICE]);
        logged(podman, "started");
        report.row("status of a running container", status(podman), "running");
        report.row("ps", podman.ok(&["ps", "--format", "{{.Names}}"]), "c");
        report.row(
            "logs",
            shown(&podman.call(&["logs", "c"])),
            "started\ncode 0",
        );
        report.row(
            "logs of standard error",
            podman.call(&["logs", "c"]).stderr.trim(),
            "problem",
        );
        execs(podman, report);
        watch(podman, report);
        files(podman, report);
        podman.ok(&["update", "--memory", "90m", "c"]);
        report.row(
            "update",
            podman.ok(&["exec", "c", "sh", "-c", MEMORY_LIMIT]),
            "94371840",
        );
        ends(podman, report);
    });
}

fn status(podman: &Podman<'_>) -> String {
    podman.inspect("c", ".State.Status")
}

fn logged(podman: &Podman<'_>, text: &str) {
    wait_for(&format!("{text:?} in the log"), || {
        podman.call(&["logs", "c"]).text().contains(text)
    });
}

fn execs(podman: &Podman<'_>, report: &mut Report) {
    let exec = |options: &[&str], command: &[&str]| {
        let done = podman.call(&[&["exec"], options, &["c"], command].concat());
        shown(&done)
    };
    report.row(
        "exec",
        exec(&[], &["sh", "-c", "echo hello; exit 7"]),
        "hello\ncode 7",
    );
    report.row(
        "exec of what is not there",
        exec(&[], &["/no/such"]),
        "code 127",
    );
    report.row(
        "exec of what is no program",
        exec(&[], &["/etc/passwd"]),
        "code 126",
    );
    report.row(
        "exec ended by a signal",
        exec(&[], &["sh", "-c", "kill -9 $$"]),
        "code 137",
    );
    let done = podman.call_with_input(&["exec", "-i", "c", "cat"], "through\n");
    report.row("exec with input", shown(&done), "through\ncode 0");
    let tty = exec(&["--tty"], &["sh", "-c", "test -t 0 && echo terminal"]);
    report.row(
        "exec with a terminal",
        tty.replace('\r', ""),
        "terminal\ncode 0",
    );
    report.row(
        "exec as a user",
        exec(&["--user", "1000:2000"], &["sh", "-c", "id -u; id -g"]),
        "1000\n2000\ncode 0",
    );
    report.row(
        "exec as a user by name",
        exec(&["--user", "user"], &["id", "-G"]),
        "1000 10 2000\ncode 0",
    );
    report.row(
        "exec in a directory",
        exec(&["--workdir", "/etc"], &["pwd"]),
        "/etc\ncode 0",
    );
    report.row(
        "exec with environment",
        exec(&["--env", "A=1"], &["sh", "-c", "echo $A"]),
        "1\ncode 0",
    );
    podman.ok(&["exec", "--detach", "c", "sh", "-c", "echo done > /detached"]);
    wait_for("the detached exec", || {
        exec(&[], &["cat", "/detached"]) == "done\ncode 0"
    });
    report.row("exec, detached", "done", "done");
}

fn watch(podman: &Podman<'_>, report: &mut Report) {
    let mut top = String::new();
    // podman gives up when a process ends that it is just reading of.
    wait_for("podman top", || {
        let done = podman.call(&["top", "c", "pid", "comm"]);
        done.text().clone_into(&mut top);
        done.code == 0
    });
    let init = top
        .lines()
        .nth(1)
        .unwrap_or_default()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    report.row("top", init, "1 sh");
    let stats = podman.ok(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.Name}} {{.PIDs}}",
        "c",
    ]);
    let processes: u32 = stats
        .split(' ')
        .next_back()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    report.row("stats", processes >= 1, true);
    podman.ok(&["pause", "c"]);
    report.row("pause", status(podman), "paused");
    podman.ok(&["unpause", "c"]);
    report.row("unpause", status(podman), "running");
    podman.ok(&["kill", "--signal", "USR1", "c"]);
    logged(podman, "usr1");
    report.row("kill with a signal", status(podman), "running");
}

fn files(podman: &Podman<'_>, report: &mut Report) {
    let (from, to) = (podman.dir().join("from"), podman.dir().join("to"));
    fs::write(&from, "copied in").unwrap();
    podman.ok(&["cp", from.to_str().unwrap(), "c:/in"]);
    report.row(
        "cp into the container",
        podman.ok(&["exec", "c", "cat", "/in"]),
        "copied in",
    );
    podman.ok(&["exec", "c", "sh", "-c", "echo copied out > /out"]);
    podman.ok(&["cp", "c:/out", to.to_str().unwrap()]);
    report.row("cp out of the container", read(&to), "copied out\n");
    let changed = podman.ok(&["diff", "c"]);
    report.row("diff", changed.contains(" /out"), true);
    podman.ok(&["commit", "--quiet", "c", COMMITTED]);
    let done = podman.call(&["run", "--rm", "--network", "none", COMMITTED, "cat", "/in"]);
    let seen = shown(&done);
    report.row(
        "commit, and run of the new image",
        seen,
        "copied in\ncode 0",
    );
}

fn ends(podman: &Podman<'_>, report: &mut Report) {
    podman.ok(&["stop", "--time", "60", "c"]);
    report.row(
        "stop lets the program end",
        podman.inspect("c", ".State.ExitCode"),
        "3",
    );
    report.row("status of a stopped container", status(podman), "exited");
    report.row(
        "output until the end",
        podman.ok(&["logs", "--tail", "1", "c"]),
        "term",
    );
    podman.ok(&["start", "c"]);
    report.row("start again", status(podman), "running");
    podman.ok(&["restart", "--time", "1", "c"]);
    wait_for("the third start", || {
        podman.call(&["exec", "c", "cat", "/count"]).text() == "start\nstart\nstart"
    });
    report.row(
        "restart keeps the files",
        podman.ok(&["exec", "c", "wc", "-l", "/count"]),
        "3 /count",
    );
    podman.ok(&["kill", "c"]);
    report.row("wait", podman.ok(&["wait", "c"]), "137");
    podman.ok(&["rm", "c"]);
    report.row("rm", podman.ok(&["ps", "--all", "--quiet"]), "");
    // A second ^C: no time to stop.
    podman.run_detached("c", &[], &["sleep", "600"]);
    podman.ok(&["rm", "--force", "--time", "0", "c"]);
    report.row("rm --force", podman.ok(&["ps", "--all", "--quiet"]), "");
}
