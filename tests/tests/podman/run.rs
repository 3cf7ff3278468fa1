//! `podman run` and `podman start` in front: codes, input and terminals.

use super::DIFFERENCES;
use coffer_tests::host;
use coffer_tests::podman::{IMAGE, Podman, compare, shown};

#[test]
fn podman_run_gives_codes_input_and_terminals() {
    compare("podrun", DIFFERENCES, |podman, report| {
        let sh = |options: &[&str], script: &str| podman.run(options, &["sh", "-c", script]);
        report.row(
            "code of the program",
            sh(&[], "echo out; exit 42"),
            "out\ncode 42",
        );
        report.row(
            "program that is not there",
            podman.run(&[], &["/no/such"]),
            "code 127",
        );
        report.row(
            "program that is none",
            podman.run(&[], &["/etc/passwd"]),
            "code 126",
        );
        let done = podman.call_with_input(
            &["run", "--rm", "-i", "--network", "none", IMAGE, "cat"],
            "through\n",
        );
        report.row("input", shown(&done), "through\ncode 0");
        let tty = podman.run(&["--tty"], &["sh", "-c", "tty; test -t 0 && exit 5"]);
        report.row("terminal", tty.replace('\r', ""), "/dev/pts/0\ncode 5");
        report.row(
            "time-out",
            podman.run(&["--timeout", "5"], &["sleep", "600"]),
            "code 255",
        );
        report.row(
            "nothing is left",
            podman.ok(&["ps", "--all", "--quiet"]),
            "",
        );
        podman.ok(&[
            "create",
            "--name",
            "a",
            "--network",
            "none",
            IMAGE,
            "sh",
            "-c",
            "echo attached; exit 6",
        ]);
        report.row(
            "start --attach",
            shown(&podman.call(&["start", "--attach", "a"])),
            "attached\ncode 6",
        );
        let attached = attach(podman);
        report.row("attach", attached, "got a line, then 4");
    });
}

/// Attaches to a container that waits for input.
fn attach(podman: &Podman<'_>) -> String {
    let script = "read line; echo \"got $line\"; exit 4";
    podman.run_detached("b", &["-i"], &["sh", "-c", script]);
    let done = podman.call_with_input(&["attach", "b"], "a line\n");
    podman.ok(&["wait", "b"]);
    // The code of podman 4's attach is its own.
    format!(
        "{}, then {}",
        done.text(),
        podman.inspect("b", ".State.ExitCode")
    )
}

#[test]
fn five_at_once_give_their_own_codes() {
    compare("podfive", DIFFERENCES, |podman, report| {
        let codes: Vec<_> = std::thread::scope(|scope| {
            let run = |n: usize| podman.run(&[], &["sh", "-c", &format!("echo {n}; exit {n}")]);
            let threads: Vec<_> = (1..=5).map(|n| scope.spawn(move || run(n))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let expected: Vec<_> = (1..=5).map(|n| format!("{n}\ncode {n}")).collect();
        report.row("five at once", codes.join(", "), expected.join(", "));
    });
}

#[test]
fn heavy_thirty_in_a_row_leave_nothing() {
    compare("podrow", DIFFERENCES, |podman, report| {
        let codes = (1..=30)
            .all(|n| podman.run(&[], &["sh", "-c", &format!("exit {n}")]) == format!("code {n}"));
        report.row("thirty in a row", codes, true);
        let left = host("ps", &["-eo", "args"]).unwrap();
        let storage = podman.dir().to_str().unwrap();
        let left = left
            .lines()
            .filter(|line| line.starts_with("/usr/bin/conmon") && line.contains(storage))
            .count();
        report.row("no conmon is left", left, 0);
    });
}
