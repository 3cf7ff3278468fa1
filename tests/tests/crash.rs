//! A process of the sandbox dies without warning. Everything of the sandbox is gone within ten seconds, the container is
//! reported dead with a reason, and `coffer delete` leaves nothing (the harness looks).

use coffer_tests::bundle::Bundle;
use coffer_tests::{Background, Test, asset, leaks, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::Stdio;
use std::time::{Duration, Instant};

const REPORTED_WITHIN: Duration = Duration::from_secs(10);

const IDLE: &[&str] = &["sleep", "600"];
const BUSY: &[&str] = &[
    "sh",
    "-c",
    "while :; do dd if=/dev/urandom of=/tmp/f bs=64k count=64 2>/dev/null; cat /tmp/f > /tmp/g; done",
];

/// Descendants of the test that run this program.
fn processes(program: &str) -> Vec<u32> {
    let runs = |pid: &u32| {
        let line = leaks::command_line(*pid);
        line.split(' ')
            .next()
            .and_then(|first| first.rsplit('/').next())
            == Some(program)
    };
    leaks::descendants(std::process::id())
        .unwrap()
        .into_iter()
        .filter(runs)
        .collect()
}

fn supervisors() -> Vec<u32> {
    let all = leaks::descendants(std::process::id()).unwrap();
    all.into_iter()
        .filter(|pid| leaks::command_line(*pid).contains(" supervise "))
        .collect()
}

fn hypervisors(test: &Test) -> Vec<u32> {
    processes(if test.hypervisor() == "qemu" {
        "coffer-qemu"
    } else {
        "coffer-vmm"
    })
}

fn kill_all(pids: &[u32]) {
    assert!(!pids.is_empty(), "there is nothing to kill");
    for pid in pids {
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    }
}

/// The supervisor still answers: the container is stopped, in time and with a reason.
fn reported_dead(sandbox: &Background<'_>, since: Instant) {
    wait_for("the container to be reported dead", || {
        sandbox.status() == "stopped"
    });
    assert!(
        since.elapsed() < REPORTED_WITHIN,
        "it took {:?}",
        since.elapsed()
    );
    let state = sandbox.state();
    let reason = state["annotations"]["io.coffer.reason"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(!reason.is_empty(), "no reason in {state}");
    assert_ne!(
        sandbox.exec(&["true"]).code,
        0,
        "an exec worked in a dead sandbox"
    );
}

fn die(name: &str, command: &[&str], victims: impl Fn(&Test) -> Vec<u32>) {
    let test = Test::new(name);
    let rootfs = test.copy_of("busybox");
    let sandbox = test.background_on(&["--rootfs", rootfs.to_str().unwrap()], &[], command);
    std::thread::sleep(Duration::from_millis(500));
    let since = Instant::now();
    kill_all(&victims(&test));
    reported_dead(&sandbox, since);
}

#[test]
fn the_hypervisor_dies_idle() {
    die("vmm-idle", IDLE, hypervisors);
}

#[test]
fn the_hypervisor_dies_busy() {
    die("vmm-busy", BUSY, hypervisors);
}

#[test]
fn the_hypervisor_dies_while_it_boots() {
    let test = Test::new("vmm-boot");
    let rootfs = asset("busybox");
    let id = test.id();
    let mut command = test.run_command(&["--id", &id, "--rootfs", rootfs.to_str().unwrap()]);
    command.args(["--", "true"]).stderr(Stdio::piped());
    let run = command.spawn().unwrap();
    wait_for("the hypervisor", || !hypervisors(&test).is_empty());
    let since = Instant::now();
    kill_all(&hypervisors(&test));
    let done = run.wait_with_output().unwrap();
    assert!(
        since.elapsed() < REPORTED_WITHIN,
        "it took {:?}",
        since.elapsed()
    );
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(125), "{said}");
    assert!(said.contains("the VM did not start"), "{said}");
}

#[test]
fn the_hypervisor_dies_while_the_sandbox_stops() {
    for millis in [0, 100, 300] {
        let test = Test::new("vmm-stop");
        let sandbox = test.background(&[], IDLE);
        let victims = hypervisors(&test);
        let mut delete = test.coffer(&["delete", "--force", &sandbox.id]);
        let mut delete = delete.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(millis));
        for pid in victims {
            // It may have ended in order by now.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        assert!(delete.wait().unwrap().success());
    }
}

#[test]
fn the_file_server_dies_idle() {
    die("fsd-idle", IDLE, |_| processes("coffer-fsd"));
}

#[test]
fn the_file_server_dies_busy() {
    die("fsd-busy", BUSY, |_| processes("coffer-fsd"));
}

/// The guest's kernel shields PID 1 from every signal, and its end would be the kernel's panic; so the guest is made to
/// panic, at the next process that hits its memory limit.
#[test]
fn the_agent_dies() {
    let test = Test::new("agent");
    let mut bundle = Bundle::new(&test, "sleep 600");
    bundle.config["linux"]["readonlyPaths"] = serde_json::json!([]);
    bundle.config["linux"]["resources"]["memory"] = serde_json::json!({"limit": 32 << 20});
    let sandbox = test.background_on(&["--bundle", bundle.write()], &[], &[]);
    let since = Instant::now();
    let exec = sandbox.exec(&[
        "sh",
        "-c",
        "echo 2 > /proc/sys/vm/panic_on_oom && tail -c 100m /dev/zero",
    ]);
    // Coffer failed, not the program; the line names the sandbox and says why.
    assert_eq!(exec.code, 125, "{}", exec.stderr);
    assert!(exec.stderr.contains(&sandbox.id), "{}", exec.stderr);
    reported_dead(&sandbox, since);
}

/// A guest that stands still answers no call of the supervisor, and neither does its agent.
#[test]
fn a_guest_that_answers_nothing_is_listed_and_killed() {
    const PROMPT: Duration = Duration::from_secs(2);
    let test = Test::new("silent");
    let rootfs = test.copy_of("busybox");
    let sandbox = test.background_on(&["--rootfs", rootfs.to_str().unwrap()], &[], IDLE);
    let guests = processes(if test.hypervisor() == "qemu" {
        "qemu-system-x86_64"
    } else {
        "coffer-vmm"
    });
    assert!(!guests.is_empty());
    for pid in &guests {
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP).unwrap();
    }
    // A call that waits for the agent holds up nobody else, and ends with the sandbox.
    let mut exec = sandbox.exec_command(&[], &["true"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let since = Instant::now();
    assert_eq!(sandbox.status(), "running");
    assert!(since.elapsed() < PROMPT, "state took {:?}", since.elapsed());
    let deleted = test.call(&["delete", "--force", &sandbox.id]);
    assert_eq!(deleted.code, 0, "{}", deleted.stderr);
    assert!(!exec.wait().unwrap().success());
    // The agent gets three seconds to end the guest in order, under emulation nine.
    assert!(
        since.elapsed() < 2 * REPORTED_WITHIN,
        "it took {:?}",
        since.elapsed()
    );
}

#[test]
fn the_supervisor_dies() {
    for command in [IDLE, BUSY] {
        let test = Test::new("supervisor");
        let rootfs = test.copy_of("busybox");
        let sandbox = test.background_on(&["--rootfs", rootfs.to_str().unwrap()], &[], command);
        std::thread::sleep(Duration::from_millis(500));
        let since = Instant::now();
        kill_all(&supervisors());
        // The hypervisor and the file server see the end of their sockets.
        let others = || {
            [
                hypervisors(&test),
                processes("coffer-fsd"),
                processes("qemu-system-x86_64"),
            ]
            .concat()
        };
        wait_for("the VM to be gone", || others().is_empty());
        assert!(
            since.elapsed() < REPORTED_WITHIN,
            "it took {:?}",
            since.elapsed()
        );
        assert_eq!(sandbox.status(), "stopped");
    }
}

#[test]
fn everything_dies_at_once() {
    let test = Test::new("all");
    let sandbox = test.background(&[], IDLE);
    kill_all(&[supervisors(), hypervisors(&test), processes("coffer-fsd")].concat());
    wait_for("QEMU to follow", || {
        processes("qemu-system-x86_64").is_empty()
    });
    assert_eq!(sandbox.status(), "stopped");
}
