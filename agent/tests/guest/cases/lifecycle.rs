//! Create, start, pause, delete.

use std::fs;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::json;

use crate::container::{self, ChildStdio, Error};
use crate::fixture::{Draft, Guest, eventually, process, same};

pub fn exit_codes(guest: &Guest) -> anyhow::Result<()> {
    for code in [0, 1, 42, 255] {
        let output = Draft::new("exit", &format!("exit {code}"))?.run(guest)?;
        same("status", output.status, code)?;
    }
    // Init ignores the signals that it has no handler for, but not the kernel's own SIGKILL.
    let mut running = Draft::new("exit", "sleep 1000")?.create()?;
    running.start()?;
    running.container.kill_all()?;
    same("status", running.finish(guest)?.status, 137)?;
    Ok(running.container.delete()?)
}

pub fn programs_that_cannot_run(guest: &Guest) -> anyhow::Result<()> {
    for (program, expected, text) in [
        ("nosuch", 127, "executable file not found in $PATH"),
        ("/bin/nosuch", 127, "no such file or directory"),
        ("/etc/passwd", 126, "permission denied"),
        ("/etc", 126, "permission denied"),
        ("/etc/text", 126, "exec format error"),
        ("/etc/script", 127, "no such file or directory"),
        ("/proc/self/exe", 126, "too many symbolic links"),
    ] {
        let draft = Draft::new("cannot", "")?.set("/process/args", json!([program]));
        fs::write(draft.rootfs().join("etc/text"), "\x7fno program")?;
        fs::write(draft.rootfs().join("etc/script"), "#!/no/interpreter\n")?;
        for name in ["text", "script"] {
            make_executable(&draft.rootfs().join("etc").join(name))?;
        }
        let failure = match draft.create() {
            Ok(mut running) => {
                let failed = running.start();
                same(
                    "wait status",
                    running.finish(guest)?.status,
                    i32::from(expected),
                )?;
                running.container.delete()?;
                failed.err()
            }
            Err(error) => Some(error),
        };
        match failure {
            Some(Error::Exec { kind, message }) => {
                same(program, kind.exit_status(), expected)?;
                ensure!(
                    message.contains(text) && message.contains(program),
                    "{message}"
                );
            }
            other => bail!("{program}: {other:?}"),
        }
        draft.check_gone()?;
    }
    Ok(())
}

fn make_executable(path: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

pub fn create_waits_for_start(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("waits", "echo started > /etc/mark")?;
    let mut running = draft.create()?;
    std::thread::sleep(Duration::from_millis(200));
    ensure!(
        !draft.rootfs().join("etc/mark").exists(),
        "it ran before start"
    );
    same("processes", running.container.pids()?, vec![running.pid])?;
    running.start()?;
    running.finish(guest)?.good()?;
    ensure!(draft.rootfs().join("etc/mark").exists(), "it didn't run");
    Ok(running.container.delete()?)
}

pub fn unwanted_processes_end(guest: &Guest) -> anyhow::Result<()> {
    let mut running = Draft::new("unwanted", "sleep 1000")?.create()?;
    running.drop_started();
    running.finish(guest)?;
    ensure!(running.container.pids()?.is_empty(), "processes are left");
    Ok(running.container.delete()?)
}

pub fn delete_is_idempotent(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("twice", "sleep 1000 & sleep 1000")?;
    let mut running = draft.create()?;
    running.start()?;
    running.container.delete()?;
    draft.check_gone()?;
    running.container.delete()?;
    same("status", running.finish(guest)?.status, 137)?;
    // The name is free again.
    draft.run_script(guest, "true")
}

impl Draft {
    fn run_script(self, guest: &Guest, script: &str) -> anyhow::Result<()> {
        self.set("/process/args", json!(["sh", "-c", script]))
            .run(guest)?
            .good()
            .map(|_| ())
    }
}

pub fn failures_leave_nothing(_: &Guest) -> anyhow::Result<()> {
    let new = || Draft::new("broken", "true");
    for (draft, text) in [
        (
            new()?.set("/root/path", json!("/run/coffer/share/broken/none")),
            "root.path",
        ),
        (
            new()?.set(
                "/root/path",
                json!("/run/coffer/share/broken/rootfs/bin/busybox"),
            ),
            "Not a directory",
        ),
        (
            new()?.set("/linux/intelRdt", json!({"closID": "x"})),
            "linux.intelRdt",
        ),
        (
            new()?.mount("tmpfs", "/x", "tmpfs", &["size=nonsense"]),
            "mounts[7]",
        ),
        (
            new()?.mount("bind", "/x", "/run/coffer/share/broken/mounts/9", &["bind"]),
            "mounts[7]",
        ),
        (
            new()?.set("/linux/resources/unified", json!({"memory.nosuch": "1"})),
            "memory.nosuch",
        ),
        (
            new()?.set("/linux/sysctl", json!({"net.nosuch": "1"})),
            "linux.sysctl.net.nosuch",
        ),
        (
            new()?.set(
                "/process/rlimits",
                json!([{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 99_999_999_999u64}]),
            ),
            "RLIMIT_NOFILE",
        ),
    ] {
        let message = draft.refused()?;
        ensure!(message.contains(text), "{message:?} doesn't name {text:?}");
    }
    // A root that is a symlink is none.
    let draft = new()?;
    std::os::unix::fs::symlink("/", draft.share().join("link"))?;
    let message = draft
        .set("/root/path", json!("/run/coffer/share/broken/link"))
        .refused()?;
    ensure!(message.contains("root.path"), "{message}");
    Ok(())
}

pub fn pause_and_resume(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new(
        "pause",
        "while true; do echo x >> /etc/beat; sleep 0.02; done",
    )?;
    let mut running = draft.create()?;
    running.start()?;
    let beats = || fs::metadata(draft.rootfs().join("etc/beat")).map_or(0, |m| m.len());
    eventually("a beat", || beats() > 0)?;
    running.container.pause()?;
    let frozen = beats();
    std::thread::sleep(Duration::from_millis(300));
    same("beats while paused", beats(), frozen)?;
    let refused = running
        .sh(guest, "true")
        .err()
        .context("exec in a paused container")?;
    ensure!(refused.to_string().contains("paused"), "{refused}");
    running.container.resume()?;
    eventually("another beat", || beats() > frozen)?;
    // Killing works on a paused one.
    running.container.pause()?;
    running.container.kill_all()?;
    same("status", running.finish(guest)?.status, 137)?;
    Ok(running.container.delete()?)
}

/// An exec that meets a pause is prepared before it or refused; one that froze half way in would not be ready before the end of the pause.
pub fn execs_meet_pauses(guest: &Guest) -> anyhow::Result<()> {
    const PAUSE: Duration = Duration::from_secs(1);
    let mut running = Draft::new("meet", "sleep 1000")?.create()?;
    running.start()?;
    let mut prepared = 0;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let container = running.container_handle();
        let pauses = scope.spawn(move || {
            (1..8).try_for_each(|i| {
                std::thread::sleep(Duration::from_millis(i * 7));
                container.pause()?;
                std::thread::sleep(PAUSE);
                container.resume()
            })
        });
        while !pauses.is_finished() {
            let since = Instant::now();
            match running.prepare(&process("exit 5")) {
                // It ends as soon as it may run.
                Ok(ready) => {
                    ensure!(since.elapsed() < PAUSE, "it froze half way in");
                    same("status", ready.finish(guest)?.status, 5)?;
                    prepared += 1;
                }
                Err(error) => {
                    ensure!(error.to_string().contains("paused"), "{error:?}");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
        Ok(pauses.join().expect("a thread")?)
    })?;
    ensure!(prepared > 0, "all were refused");
    running.kill_and_delete(guest)
}

pub fn hooks_run(guest: &Guest) -> anyhow::Result<()> {
    let hook = |name: &str| {
        let script = format!("cat > /etc/{name}; echo $WORD >> /etc/{name}");
        json!([{"path": "/bin/busybox", "args": ["sh", "-c", script], "env": ["PATH=/bin", "WORD=word"], "timeout": 30}])
    };
    let draft = Draft::new("hooks", "cat /etc/start")?
        .set("/annotations", json!({"some": "note"}))
        .set("/hooks/createContainer", hook("create"))
        .set("/hooks/startContainer", hook("start"));
    let mut running = draft.create()?;
    let read = |name: &str| fs::read_to_string(draft.rootfs().join("etc").join(name));
    let created = read("create")?;
    for part in [
        "\"id\":\"hooks\"",
        "\"status\":\"creating\"",
        "\"some\":\"note\"",
        "word",
    ] {
        ensure!(created.contains(part), "{created} has no {part}");
    }
    ensure!(read("start").is_err(), "startContainer ran at create");
    running.start()?;
    let output = running.finish(guest)?.good()?;
    ensure!(
        output.contains("\"status\":\"created\"") && output.contains("word"),
        "{output}"
    );
    Ok(running.container.delete()?)
}

pub fn hooks_that_fail(guest: &Guest) -> anyhow::Result<()> {
    let hook = |script: &str| json!([{"path": "/bin/busybox", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": 1}]);
    let failing = Draft::new("hookfail", "true")?.set("/hooks/createContainer", hook("exit 3"));
    let message = failing.refused()?;
    ensure!(
        message.contains("createContainer[0]") && message.contains('3'),
        "{message}"
    );
    let start = Instant::now();
    let hanging = Draft::new("hookfail", "true")?.set("/hooks/startContainer", hook("sleep 100"));
    let mut running = hanging.create()?;
    let error = running.start().err().context("a hook that hangs")?;
    ensure!(error.to_string().contains("timeout of 1 s"), "{error}");
    ensure!(
        start.elapsed() < Duration::from_secs(20),
        "the timeout took {:?}",
        start.elapsed()
    );
    running.finish(guest)?;
    Ok(running.container.delete()?)
}

/// With threads that allocate all the time: what a fork of the agent itself would deadlock on.
pub fn eighty_creates_at_once(guest: &Guest) -> anyhow::Result<()> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::black_box(vec![0u8; 4096]);
                    std::thread::yield_now();
                }
            });
        }
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                scope.spawn(move || {
                    (0..20).try_for_each(|i| {
                        let status = i + worker * 20;
                        let draft =
                            Draft::new(&format!("many-{worker}-{i}"), &format!("exit {status}"))?;
                        let output = draft.run(guest)?;
                        fs::remove_dir_all(draft.share())?;
                        same("status", output.status, status)
                    })
                })
            })
            .collect();
        let outcome = workers
            .into_iter()
            .try_for_each(|w| w.join().expect("a thread"));
        stop.store(true, Ordering::Relaxed);
        outcome
    })
}

/// Kill against start, exec and delete: the result is any of the legal ones, and everything goes.
pub fn kill_at_any_moment(guest: &Guest) -> anyhow::Result<()> {
    for i in 0..12u64 {
        let draft = Draft::new("race", "sleep 1000")?;
        let mut running = draft.create()?;
        let pid = running.pid;
        std::thread::scope(|scope| -> anyhow::Result<()> {
            let container = running.container_handle();
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(i * 8));
                container.kill_all()
            });
            running.start()?;
            // It runs, is refused, or is killed on the way.
            if let Ok(output) = running.sh(guest, "exit 5") {
                ensure!([5, 137].contains(&output.status), "{output:?}");
            }
            Ok(())
        })?;
        ensure!([137, 0].contains(&guest.wait(pid)?), "another status");
        std::thread::scope(|scope| {
            let container = running.container_handle();
            let other = container.clone();
            let other = scope.spawn(move || other.delete());
            let own = container.delete();
            other.join().expect("a thread").and(own)
        })?;
        draft.check_gone()?;
    }
    Ok(())
}

pub fn terminal(guest: &Guest) -> anyhow::Result<()> {
    let script = "tty; stty size; echo to the console > /dev/console; echo a terminal > /dev/tty; read x; echo got $x; exit 9";
    let draft = Draft::new("tty", script)?.set("/process/terminal", json!(true));
    let spec = container::parse(draft.spec.to_string().as_bytes())?;
    let stdio = ChildStdio::Terminal {
        rows: 33,
        columns: 77,
    };
    let (container, started) = container::create(&draft.id, &spec, stdio, &draft.pod)?;
    let (pid, mut started) = (started.pid, started);
    let mut master: fs::File = started.terminal.take().context("no master")?.into();
    started.release()?;
    master.write_all(b"hello\n")?;
    let mut text = Vec::new();
    // A terminal whose last user is gone reads as EIO.
    let _ = master.read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text).replace("\r\n", "\n");
    same("status", guest.wait(pid)?, 9)?;
    for part in [
        "/dev/pts/0",
        "33 77",
        "to the console",
        "a terminal",
        "got hello",
    ] {
        ensure!(text.contains(part), "{text:?} has no {part:?}");
    }
    Ok(container.delete()?)
}

/// After all of the above: no process but this one, no cgroup, no mount of a container, no descriptor.
pub fn nothing_is_left(_: &Guest) -> anyhow::Result<()> {
    let left = || -> Vec<String> {
        let all = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let stat = |path: std::path::PathBuf| fs::read_to_string(path.join("stat")).ok();
        // pid (name) state parent …; the parent of kernel threads is 2 or none.
        let is_ours = |stat: &String| {
            let parent = stat
                .rsplit(") ")
                .next()
                .and_then(|rest| rest.split(' ').nth(1));
            !stat.starts_with("1 ") && !matches!(parent, Some("0" | "2"))
        };
        all.filter(|path| path.join("ns").exists())
            .filter_map(stat)
            .filter(is_ours)
            .collect()
    };
    eventually("the end of all processes", || left().is_empty())
        .with_context(|| format!("{:?}", left()))?;
    let cgroups = fs::read_dir("/sys/fs/cgroup")?
        .flatten()
        .filter(|e| e.path().is_dir())
        .map(|e| e.file_name());
    same(
        "cgroups",
        cgroups.collect::<Vec<_>>(),
        vec![".agent".into()],
    )?;
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    ensure!(!mounts.contains("/run/coffer"), "{mounts}");
    let open: Vec<_> = fs::read_dir("/proc/self/fd")?
        .flatten()
        .filter_map(|e| fs::read_link(e.path()).ok())
        .collect();
    // The three of the console and the listing itself, with room for a reader thread that is just ending.
    ensure!(open.len() <= 6, "{open:?}");
    Ok(())
}
