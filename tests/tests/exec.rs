//! Further processes in a running container, signals, terminals, pause.

use coffer_tests::{Test, asset, finish, wait_for};
use nix::sys::signal::{Signal, kill};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

#[test]
fn twenty_execs_at_once() {
    let test = Test::new("twenty");
    let sandbox = test.background(&[], &["sleep", "600"]);
    let script = |i: i32| format!("sleep 1; echo {i}; exit {i}");
    let commands: Vec<_> = (0..20)
        .map(|i| sandbox.exec_command(&[], &["sh", "-c", &script(i)]))
        .collect();
    let all: Vec<_> = commands
        .into_iter()
        .map(|c| std::thread::spawn(move || finish(c)))
        .collect();
    for (i, thread) in (0..).zip(all) {
        let done = thread.join().unwrap();
        assert_eq!(
            (done.code, done.text()),
            (i, i.to_string().as_str()),
            "{}",
            done.stderr
        );
    }
    assert_eq!(
        sandbox.sh("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l"),
        "0",
        "zombies"
    );
}

#[test]
fn an_exec_has_a_process_block_of_its_own() {
    let test = Test::new("block");
    let sandbox = test.background(&["--env", "A=container"], &["sleep", "600"]);
    let options = ["--env", "B=exec", "--workdir", "/tmp", "--user", "12:34"];
    let done =
        finish(sandbox.exec_command(&options, &["sh", "-c", "echo $A $B; pwd; id -u; id -g"]));
    assert_eq!(
        done.text(),
        "container exec\n/tmp\n12\n34",
        "{}",
        done.stderr
    );
    let missing = finish(sandbox.exec_command(&["--workdir", "/nowhere"], &["true"]));
    assert!(
        missing.code != 0 && missing.stderr.contains("/nowhere"),
        "{missing:?}"
    );
}

#[test]
fn signals_reach_the_container() {
    let test = Test::new("signals");
    let script = "trap 'echo got term > /tmp/s; exit 9' TERM; trap 'echo usr1 >> /tmp/u' USR1; touch /tmp/ready; while :; do sleep 0.1; done";
    let rootfs = test.copy_of("busybox");
    let sandbox = test.background_on(
        &["--rootfs", rootfs.to_str().unwrap()],
        &[],
        &["sh", "-c", script],
    );
    wait_for("the traps", || rootfs.join("tmp/ready").exists());
    test.ok(&["kill", &sandbox.id, "USR1"]);
    wait_for("the signal", || rootfs.join("tmp/u").exists());
    test.ok(&["kill", &sandbox.id, "SIGTERM"]);
    sandbox.wait_status("stopped");
    assert_eq!(
        std::fs::read_to_string(rootfs.join("tmp/s")).unwrap(),
        "got term\n"
    );
    let bad = test.call(&["kill", &sandbox.id, "SIGNONE"]);
    assert!(bad.code != 0 && bad.stderr.contains("SIGNONE"), "{bad:?}");
}

#[test]
fn an_init_that_ignores_sigterm_dies_of_sigkill() {
    let test = Test::new("sigkill");
    let sandbox = test.background(
        &[],
        &["sh", "-c", "trap '' TERM; while :; do sleep 0.2; done"],
    );
    test.ok(&["kill", &sandbox.id, "TERM"]);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(sandbox.status(), "running");
    test.ok(&["kill", &sandbox.id, "KILL"]);
    sandbox.wait_status("stopped");
}

#[test]
fn pause_stops_and_resume_goes_on() {
    let test = Test::new("pause");
    let rootfs = test.copy_of("busybox");
    let script = "i=0; while :; do i=$((i+1)); echo $i > /tmp/t; sleep 0.1; done";
    let sandbox = test.background_on(
        &["--rootfs", rootfs.to_str().unwrap()],
        &[],
        &["sh", "-c", script],
    );
    let tick = || std::fs::read_to_string(rootfs.join("tmp/t")).unwrap_or_default();
    wait_for("the first tick", || !tick().is_empty());
    test.ok(&["pause", &sandbox.id]);
    assert_eq!(sandbox.status(), "paused");
    std::thread::sleep(Duration::from_millis(500));
    let frozen = tick();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(tick(), frozen);
    test.ok(&["resume", &sandbox.id]);
    wait_for("another tick", || tick() != frozen);
}

/// A command on a pseudo terminal, and what it printed so far.
struct Terminal {
    master: File,
    child: Child,
    seen: String,
}

impl Terminal {
    fn spawn(mut command: Command, rows: u16, columns: u16) -> Self {
        let size = nix::pty::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = nix::pty::openpty(&size, None).unwrap();
        let slave = |fd: &OwnedFd| Stdio::from(fd.try_clone().unwrap());
        command
            .stdin(slave(&pty.slave))
            .stdout(slave(&pty.slave))
            .stderr(Stdio::inherit());
        let child = command.spawn().unwrap();
        Self {
            master: pty.master.into(),
            child,
            seen: String::new(),
        }
    }

    fn read_until(&mut self, word: &str) {
        let mut buffer = [0; 1024];
        while !self.seen.contains(word) {
            match self.master.read(&mut buffer) {
                Ok(n) if n > 0 => self.seen.push_str(&String::from_utf8_lossy(&buffer[..n])),
                end => panic!("no {word:?} but {end:?} after {:?}", self.seen),
            }
        }
    }

    #[allow(unsafe_code)]
    fn resize(&self, rows: u16, columns: u16) {
        let size = nix::pty::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let fd = self.master.as_raw_fd();
        // SAFETY: TIOCSWINSZ reads one winsize.
        let result = unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(result, 0);
        kill(
            nix::unistd::Pid::from_raw(self.child.id().cast_signed()),
            Signal::SIGWINCH,
        )
        .unwrap();
    }

    fn exit_code(&mut self) -> Option<i32> {
        wait_for("the command on the terminal to end", || {
            self.child.try_wait().unwrap().is_some()
        });
        self.child.wait().unwrap().code()
    }
}

#[test]
fn a_terminal_has_its_size_and_follows_resizes() {
    let test = Test::new("tty");
    let sandbox = test.background(&[], &["sleep", "600"]);
    let script =
        "tty; stty size; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut terminal = Terminal::spawn(
        sandbox.exec_command(&["-t", "-i"], &["sh", "-c", script]),
        33,
        101,
    );
    terminal.read_until("ready");
    assert!(
        terminal.seen.contains("/dev/pts/") && terminal.seen.contains("33 101"),
        "{:?}",
        terminal.seen
    );
    terminal.resize(44, 120);
    terminal.read_until("44 120");
    assert_eq!(terminal.exit_code(), Some(5));
}

#[test]
fn a_terminal_interrupts_the_container() {
    let test = Test::new("ctrlc");
    let rootfs = asset("busybox");
    let script = "trap 'exit 7' INT; echo ready; while :; do sleep 0.1; done";
    let command = test.run_command(&[
        "-t",
        "-i",
        "--rootfs",
        rootfs.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        script,
    ]);
    let mut terminal = Terminal::spawn(command, 24, 80);
    terminal.read_until("ready");
    terminal.master.write_all(&[3]).unwrap();
    assert_eq!(terminal.exit_code(), Some(7));
}
