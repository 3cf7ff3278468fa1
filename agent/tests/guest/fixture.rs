//! What the cases need: a reaper, root file systems of busybox, a spec to change, and ways to run things.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use coffer_proto::ids::ContainerId;
use coffer_proto::limits::SHARE_DIR;
use nix::fcntl::OFlag;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};
use serde_json::{Value, json};

use crate::container::{self, ChildStdio, Container, Error, SharedNamespaces, Started};

/// No case waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest, with its reaper.
#[derive(Clone)]
pub struct Guest(Arc<Reaped>);

#[derive(Default)]
struct Reaped {
    statuses: Mutex<HashMap<Pid, i32>>,
    news: Condvar,
}

impl Guest {
    pub fn start() -> anyhow::Result<Self> {
        let reaped = Arc::new(Reaped::default());
        let all = reaped.clone();
        std::thread::Builder::new()
            .name("reaper".into())
            .spawn(move || {
                loop {
                    let (pid, status) = match waitpid(None, None) {
                        Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                        Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                        _ => {
                            std::thread::sleep(Duration::from_millis(2));
                            continue;
                        }
                    };
                    all.statuses.lock().unwrap().insert(pid, status);
                    all.news.notify_all();
                }
            })?;
        Ok(Self(reaped))
    }

    /// The exit status, 128 + n for signal n.
    pub fn wait(&self, pid: Pid) -> anyhow::Result<i32> {
        let statuses = self.0.statuses.lock().unwrap();
        let (mut statuses, timeout) = self
            .0
            .news
            .wait_timeout_while(statuses, PATIENCE, |statuses| !statuses.contains_key(&pid))
            .unwrap();
        ensure!(!timeout.timed_out(), "process {pid} didn't end");
        statuses.remove(&pid).context("no status")
    }
}

/// What a process wrote and how it ended.
#[derive(Debug)]
pub struct Output {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// The output of a process that ended well.
    pub fn good(self) -> anyhow::Result<String> {
        ensure!(
            self.status == 0,
            "status {}: {}{}",
            self.status,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }
}

/// A container to be: a root file system and a spec.
pub struct Draft {
    pub id: ContainerId,
    pub spec: Value,
    pub pod: SharedNamespaces,
}

const APPLETS: &[&str] = &[
    "sh", "cat", "ls", "echo", "id", "mkdir", "rmdir", "touch", "readlink", "stat", "mount",
    "umount", "grep", "sleep", "ps", "hostname", "ulimit", "dd", "tty", "stty", "uname", "true",
    "false", "ln", "rm", "chmod", "chown", "env", "pwd", "head", "tail", "wc", "kill", "mknod",
    "test", "seq", "sort", "cut", "tr", "date", "mv", "cp", "setsid", "basename", "printf", "yes",
    "expr", "find", "sysctl",
];

impl Draft {
    /// A container of this id that runs a shell script.
    pub fn new(id: &str, script: &str) -> anyhow::Result<Self> {
        let draft = Self {
            id: ContainerId::new(id)?,
            spec: base_spec(id, script),
            pod: SharedNamespaces::default(),
        };
        let rootfs = draft.rootfs();
        let _ = fs::remove_dir_all(draft.share());
        for directory in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(rootfs.join(directory))?;
        }
        fs::create_dir_all(draft.share().join("mounts"))?;
        fs::hard_link("/run/busybox", rootfs.join("bin/busybox"))?;
        for applet in APPLETS {
            symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        fs::write(
            rootfs.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/srv/web:\n",
        )?;
        Ok(draft)
    }

    /// The container's directory in the pod's share.
    pub fn share(&self) -> PathBuf {
        Path::new(SHARE_DIR).join(&self.id)
    }

    pub fn rootfs(&self) -> PathBuf {
        self.share().join("rootfs")
    }

    /// A directory that can be bound into the container.
    pub fn volume(&self, index: usize) -> anyhow::Result<PathBuf> {
        let path = self.share().join("mounts").join(index.to_string());
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// Puts this executable into the image as /probe, with its libraries (see `probe.rs`).
    pub fn add_probe(&self) -> anyhow::Result<()> {
        let root = self.rootfs();
        fs::copy("/proc/self/exe", root.join("probe"))?;
        for name in ["lib", "lib64", "usr"] {
            let from = Path::new("/").join(name);
            if from.exists() {
                crate::pid1::copy(&from, &root.join(name))?;
            }
        }
        Ok(())
    }

    /// Sets what a JSON pointer names, with the objects above it.
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let names = pointer.split('/').skip(1);
        *names.fold(&mut self.spec, |place, name| &mut place[name]) = value;
        self
    }

    pub fn add(mut self, pointer: &str, value: Value) -> Self {
        self.spec
            .pointer_mut(pointer)
            .unwrap()
            .as_array_mut()
            .unwrap()
            .push(value);
        self
    }

    pub fn mount(self, kind: &str, destination: &str, source: &str, options: &[&str]) -> Self {
        let mount =
            json!({"type": kind, "destination": destination, "source": source, "options": options});
        self.add("/mounts", mount)
    }

    pub fn remove_mount(mut self, destination: &str) -> Self {
        let mounts = self.spec["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["destination"] != destination);
        self
    }

    /// Creates the container, with pipes.
    pub fn create(&self) -> Result<Running, Error> {
        let (stdio, pipes) = Pipes::new();
        let spec = container::parse(self.spec.to_string().as_bytes())?;
        let (container, started) = container::create(&self.id, &spec, stdio, &self.pod)?;
        let pid = started.pid;
        Ok(Running {
            container: Arc::new(container),
            pid,
            started: Some(started),
            pipes: Some(pipes),
        })
    }

    /// Creates, starts, waits and deletes.
    pub fn run(&self, guest: &Guest) -> anyhow::Result<Output> {
        let mut running = self.create()?;
        running.start()?;
        let output = running.finish(guest)?;
        running.container.delete()?;
        self.check_gone()?;
        Ok(output)
    }

    /// Creates and expects that to fail; the error's text.
    pub fn refused(&self) -> anyhow::Result<String> {
        match self.create() {
            Ok(_) => bail!("the container was created"),
            Err(error) => {
                self.check_gone()?;
                Ok(error.to_string())
            }
        }
    }

    pub fn check_gone(&self) -> anyhow::Result<()> {
        let cgroup = Path::new("/sys/fs/cgroup").join(&self.id);
        ensure!(!cgroup.exists(), "{} is still there", cgroup.display());
        Ok(())
    }
}

/// A container that was created.
pub struct Running {
    pub container: Arc<Container>,
    pub pid: Pid,
    started: Option<Started>,
    pipes: Option<Pipes>,
}

impl Running {
    pub fn start(&mut self) -> Result<(), Error> {
        self.started.take().expect("started once").release()
    }

    pub fn container_handle(&self) -> Arc<Container> {
        self.container.clone()
    }

    pub fn drop_started(&mut self) {
        self.started = None;
    }

    /// Waits for the end of init and takes its output.
    pub fn finish(&mut self, guest: &Guest) -> anyhow::Result<Output> {
        let status = guest.wait(self.pid)?;
        self.pipes.take().expect("finished once").output(status)
    }

    /// Runs a further process to its end.
    pub fn exec(&self, guest: &Guest, process: &Value) -> anyhow::Result<Output> {
        self.prepare(process)?.finish(guest)
    }

    /// Makes a further process, which does not run its program yet.
    pub fn prepare(&self, process: &Value) -> anyhow::Result<Prepared> {
        let (stdio, pipes) = Pipes::new();
        let process = container::parse(process.to_string().as_bytes())?;
        let started = self.container.exec(&process, stdio)?;
        Ok(Prepared { started, pipes })
    }

    /// As `exec`, of a shell script by root without capabilities.
    pub fn sh(&self, guest: &Guest, script: &str) -> anyhow::Result<Output> {
        self.exec(guest, &process(script))
    }

    pub fn kill_and_delete(&mut self, guest: &Guest) -> anyhow::Result<()> {
        self.container.kill_all()?;
        guest.wait(self.pid)?;
        Ok(self.container.delete()?)
    }
}

/// A further process that is ready to run its program.
pub struct Prepared {
    started: Started,
    pipes: Pipes,
}

impl Prepared {
    /// Lets it run, to its end.
    pub fn finish(self, guest: &Guest) -> anyhow::Result<Output> {
        let pid = self.started.pid;
        self.started.release()?;
        self.pipes.output(guest.wait(pid)?)
    }
}

/// Our ends of a process's streams.
pub struct Pipes {
    stdin: Option<fs::File>,
    readers: [JoinHandle<String>; 2],
}

impl Pipes {
    pub fn new() -> (ChildStdio, Self) {
        let pair = || pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        let ((stdin, ours), (out, stdout), (err, stderr)) = (pair(), pair(), pair());
        let read = |fd: OwnedFd| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = fs::File::from(fd).read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        let stdio = ChildStdio::Streams {
            stdin: Some(stdin),
            stdout: Some(stdout),
            stderr: Some(stderr),
        };
        (
            stdio,
            Self {
                stdin: Some(ours.into()),
                readers: [read(out), read(err)],
            },
        )
    }

    fn output(mut self, status: i32) -> anyhow::Result<Output> {
        if let Some(mut stdin) = self.stdin.take() {
            stdin.flush()?;
        }
        let [stdout, stderr] = self.readers.map(|reader| reader.join().expect("a reader"));
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }
}

/// A process block of a shell script.
pub fn process(script: &str) -> Value {
    json!({
        "args": ["sh", "-c", script],
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
    })
}

fn base_spec(id: &str, script: &str) -> Value {
    let caps = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_SETUID",
        "CAP_SETGID",
    ];
    let mut process = process(script);
    process["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": format!("{SHARE_DIR}/{id}/rootfs")},
        "process": process,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "network"}, {"type": "cgroup"},
            ],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/bus", "/proc/irq", "/proc/sysrq-trigger"],
        },
    })
}

/// Waits until something is so.
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) -> anyhow::Result<()> {
    let until = Instant::now() + PATIENCE;
    while !check() {
        ensure!(Instant::now() < until, "{what} didn't happen");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Fails with both values unless they are the same.
#[allow(clippy::needless_pass_by_value, reason = "callers have values at hand")]
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, left: T, right: T) -> anyhow::Result<()> {
    ensure!(left == right, "{what}: {left:?} and not {right:?}");
    Ok(())
}
