//! conmon over an OCI runtime, driven as podman drives it.
//!
//! podman starts conmon with two pipes: over the sync pipe conmon says, in one JSON object per line, which pid the container
//! has or why it has none; conmon does nothing before a byte has come over the start pipe. It forks itself away, calls the
//! runtime's `create` (or `exec`), and stays as the parent of what that left running. At the end it writes the exit code to
//! a file, runs the exit command and goes.

use crate::bundle::Bundle;
use crate::oci::{Runtime, reap};
use crate::{PATIENCE, Test, wait_for};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// First byte of a packet on the attach socket.
const STDOUT_PACKET: u8 = 2;
const STDERR_PACKET: u8 = 3;

/// One conmon, with its container or its exec.
#[derive(Debug)]
pub struct Conmon<'t> {
    runtime: &'t Runtime<'t>,
    pub id: String,
    bundle: PathBuf,
    /// Directory for what this conmon writes.
    pub dir: PathBuf,
    sync: PipeReader,
    start: PipeWriter,
    attach: PipeReader,
    /// In the foreground it writes no pid file of its own.
    foreground: Option<Pid>,
}

impl<'t> Conmon<'t> {
    /// conmon for a new container; `@` among its options is the container's id.
    pub fn create(
        test: &Test,
        runtime: &'t Runtime<'t>,
        bundle: &Bundle,
        options: &[&str],
    ) -> Self {
        bundle.write();
        Self::launch(test, runtime, &bundle.dir, &test.id(), options)
    }

    /// The same, with the container's program started.
    pub fn started(
        test: &Test,
        runtime: &'t Runtime<'t>,
        bundle: &Bundle,
        options: &[&str],
    ) -> Self {
        let mut conmon = Self::create(test, runtime, bundle, options);
        conmon.pid();
        conmon.start();
        conmon
    }

    /// conmon for a new container with another text in the place of its config.json.
    pub fn create_with(
        test: &Test,
        runtime: &'t Runtime<'t>,
        bundle: &Bundle,
        options: &[&str],
        config: &str,
    ) -> Self {
        fs::write(bundle.dir.join("config.json"), config).expect("scratch is ours");
        Self::launch(test, runtime, &bundle.dir, &test.id(), options)
    }

    /// conmon for a process in the container of this one; `process` is the document that says which.
    pub fn exec(&self, test: &Test, process: &Value, options: &[&str]) -> Self {
        let file = test.dir().join(format!("{}.process", test.id()));
        fs::write(&file, process.to_string()).expect("scratch is ours");
        let exec = ["-e", "--exec-process-spec", file.to_str().expect("UTF-8")];
        let bundle = test.dir().join(format!("exec-{}", test.id()));
        fs::create_dir(&bundle).expect("scratch is ours");
        Self::launch(
            test,
            self.runtime,
            &bundle,
            &self.id,
            &[&exec, options].concat(),
        )
    }

    fn launch(
        test: &Test,
        runtime: &'t Runtime<'t>,
        bundle: &Path,
        id: &str,
        options: &[&str],
    ) -> Self {
        let dir = test.dir().join(format!("conmon-{}", test.id()));
        for name in ["", "exits", "persist"] {
            fs::create_dir(dir.join(name)).expect("scratch is ours");
        }
        let path = |name: &str| dir.join(name).to_str().expect("UTF-8").to_owned();
        let (sync, its_sync) = std::io::pipe().expect("a pipe");
        let (its_start, start) = std::io::pipe().expect("a pipe");
        let (attach, its_attach) = std::io::pipe().expect("a pipe");
        for end in [its_sync.as_fd(), its_start.as_fd(), its_attach.as_fd()] {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::empty())).expect("the descriptor is open");
        }
        let mut command = Command::new("conmon");
        command
            .args(["-c", id, "-u", id, "-n", id])
            .arg("-r")
            .arg(runtime.program())
            .arg(format!("--runtime-arg=--root={}", runtime.root()))
            .args(["-b", bundle.to_str().expect("UTF-8"), "--full-attach"])
            .args(["-p", &path("pid"), "--conmon-pidfile", &path("conmon.pid")])
            .args([
                "--exit-dir",
                &path("exits"),
                "--persist-dir",
                &path("persist"),
            ])
            .args(
                options
                    .iter()
                    .map(|word| if *word == "@" { id } else { word }),
            )
            .env("_OCI_SYNCPIPE", its_sync.as_raw_fd().to_string())
            .env("_OCI_STARTPIPE", its_start.as_raw_fd().to_string())
            .env("_OCI_ATTACHPIPE", its_attach.as_raw_fd().to_string())
            .current_dir(bundle)
            .stdin(Stdio::null())
            .stdout(fs::File::create(dir.join("stdout")).expect("scratch is ours"))
            .stderr(fs::File::create(dir.join("stderr")).expect("scratch is ours"));
        if !options.contains(&"-l") {
            command.args(["-l", &format!("k8s-file:{}", path("log"))]);
        }
        if !options.contains(&"--api-version") {
            command.args(["--api-version", "1"]);
        }
        let mut first = command
            .spawn()
            .expect("conmon is installed; run `cargo xtask setup`");
        drop((its_sync, its_start, its_attach));
        let mut conmon = Self {
            runtime,
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            dir,
            sync,
            start,
            attach,
            foreground: options
                .contains(&"--sync")
                .then(|| Pid::from_raw(first.id().cast_signed())),
        };
        conmon.start.write_all(b"\0").expect("conmon waits for it");
        // The first process forks the one that stays, unless it is to stay itself.
        assert!(
            conmon.foreground.is_some() || first.wait().expect("our child").success(),
            "{}",
            conmon.errors()
        );
        conmon
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.dir.join("stderr")).unwrap_or_default()
    }

    /// Connects to an exec that waits for its caller, and lets it run.
    pub fn attach_first(&mut self) -> Attached {
        let (number, text) = message(&mut self.attach);
        assert_eq!(number, 0, "conmon is ready for a client: {text}");
        let attached = self.attach();
        self.start.write_all(b"\0").expect("conmon waits for it");
        attached
    }

    /// The next message of the sync pipe: its number, and its text if there is one.
    pub fn message(&mut self) -> (i64, String) {
        message(&mut self.sync)
    }

    /// The pid of the container's process, which is there now.
    pub fn pid(&mut self) -> Pid {
        let (number, text) = self.message();
        assert!(number > 0, "conmon got no process: {number} {text}");
        let file = fs::read_to_string(self.dir.join("pid")).expect("the runtime wrote it");
        assert_eq!(file, number.to_string());
        Pid::from_raw(i32::try_from(number).expect("a pid"))
    }

    pub fn start(&self) {
        self.runtime.ok(&["start", &self.id]);
    }

    /// conmon's own pid.
    pub fn own_pid(&self) -> Pid {
        if let Some(pid) = self.foreground {
            return pid;
        }
        let file = self.dir.join("conmon.pid");
        wait_for("conmon's pid", || {
            fs::read(&file).is_ok_and(|text| !text.is_empty())
        });
        let text = fs::read_to_string(&file).expect("it was there");
        Pid::from_raw(text.trim().parse().expect("a pid"))
    }

    /// The exit code that conmon wrote, when conmon itself has gone.
    pub fn exit_code(&self) -> i32 {
        let own = self.own_pid();
        reap(own);
        // `exits/` has a file named after the container, of an exec after the exec; `persist/` one of a fixed name.
        let text = fs::read_to_string(self.dir.join("persist/exit")).expect("conmon wrote it");
        text.trim().parse().expect("a number")
    }

    /// What the log has of a stream (`stdout`, `stderr`), put together again.
    pub fn logged(&self, stream: &str) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let mut text = String::new();
        for line in log.lines() {
            // "TIME STREAM TAG TEXT", where tag F ends a line and P does not.
            let mut fields = line.splitn(4, ' ').skip(1);
            if fields.next() != Some(stream) {
                continue;
            }
            let whole = fields.next() == Some("F");
            text.push_str(fields.next().unwrap_or_default());
            if whole {
                text.push('\n');
            }
        }
        text
    }

    pub fn wait_logged(&self, stream: &str, text: &str) {
        wait_for(&format!("{text:?} in the log of {}", self.id), || {
            self.logged(stream).contains(text)
        });
    }

    /// Writes to conmon's control fifo: `1 ROWS COLUMNS` resizes, `2 0 0` opens the log anew.
    pub fn control(&self, words: &str) {
        let fifo = self.bundle.join("ctl");
        wait_for("conmon's control fifo", || fifo.exists());
        let mut fifo = fs::File::options()
            .write(true)
            .open(fifo)
            .expect("conmon reads it");
        writeln!(fifo, "{words}").expect("conmon reads it");
    }

    /// Connects to the attach socket.
    pub fn attach(&self) -> Attached {
        let path = self.bundle.join("attach");
        wait_for("conmon's attach socket", || path.exists());
        let stream = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .expect("a socket");
        let address = UnixAddr::new(&path).expect("a short path");
        connect(stream.as_raw_fd(), &address).expect("conmon listens");
        Attached {
            stream: stream.into(),
            stdout: String::new(),
            stderr: String::new(),
        }
    }
}

/// A client at conmon's attach socket.
#[derive(Debug)]
pub struct Attached {
    stream: fs::File,
    stdout: String,
    stderr: String,
}

impl Attached {
    /// Input for the container.
    pub fn write(&mut self, text: &str) {
        self.stream
            .write_all(text.as_bytes())
            .expect("conmon reads");
    }

    /// The end of input.
    pub fn close_input(&self) {
        nix::sys::socket::shutdown(self.stream.as_raw_fd(), nix::sys::socket::Shutdown::Write)
            .expect("it is open");
    }

    /// Reads until standard output has this text.
    pub fn wait(&mut self, text: &str) {
        while !self.stdout.contains(text) {
            assert!(
                self.read_packet(),
                "waited for {text:?}, but the end came after {:?}",
                self.stdout
            );
        }
    }

    /// Reads to the end; gives standard output and error.
    pub fn rest(mut self) -> (String, String) {
        while self.read_packet() {}
        (self.stdout, self.stderr)
    }

    fn read_packet(&mut self) -> bool {
        readable(self.stream.as_fd(), "output at the attach socket");
        let mut packet = vec![0; 64 << 10];
        let Ok(n @ 1..) = self.stream.read(&mut packet) else {
            return false;
        };
        let text = String::from_utf8_lossy(&packet[1..n]);
        match packet[0] {
            STDOUT_PACKET => self.stdout.push_str(&text),
            STDERR_PACKET => self.stderr.push_str(&text),
            other => panic!("conmon sent a packet of kind {other}"),
        }
        true
    }
}

/// One line of JSON from conmon.
fn message(pipe: &mut PipeReader) -> (i64, String) {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        readable(pipe.as_fd(), "a message of conmon");
        let mut byte = [0];
        let n = pipe.read(&mut byte).expect("the pipe is ours");
        assert_eq!(n, 1, "conmon said no more than {line:?}");
        line.push(byte[0]);
    }
    let message: Value = serde_json::from_slice(&line).expect("conmon sends JSON");
    let number = ["data", "pid", "exit_code"]
        .iter()
        .find_map(|key| message[key].as_i64());
    let text = message["message"].as_str().unwrap_or_default().to_owned();
    (number.unwrap_or_else(|| panic!("{message}")), text)
}

fn readable(descriptor: BorrowedFd<'_>, what: &str) {
    let patience = PollTimeout::try_from(PATIENCE).expect("it fits");
    let mut polled = [PollFd::new(descriptor, PollFlags::POLLIN)];
    let ready = poll(&mut polled, patience).expect("poll works");
    assert!(ready > 0, "waited {PATIENCE:?} for {what}");
}
