//! OCI runtimes by their command line: Coffer, and the runtime it is compared with.
//!
//! The tests are what an engine is to a runtime: they give it its standard streams, are the subreaper of the process whose
//! pid it wrote, and learn the exit code from waiting for that pid.

use crate::{Finished, PATIENCE, Test, exit_code, finish, host, product, wait_for};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::cell::Cell;
use std::fs;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Names, separated by commas, of the runtimes that the tests of the OCI command line run; all if it is not set.
const RUNTIMES_VARIABLE: &str = "COFFER_TEST_RUNTIMES";

/// A runtime with a state root of its own.
#[derive(Debug)]
pub struct Runtime<'t> {
    test: &'t Test,
    name: &'static str,
    program: PathBuf,
    root: PathBuf,
}

/// Whether the runtime of that name is to be tested.
pub fn is_wanted(name: &str) -> bool {
    std::env::var(RUNTIMES_VARIABLE).map_or(true, |names| names.split(',').any(|n| n == name))
}

impl<'t> Runtime<'t> {
    /// runc and then Coffer. What both do is what engines know.
    pub fn all(test: &'t Test) -> Vec<Self> {
        let runc = Self {
            test,
            name: "runc",
            program: program("runc"),
            root: test.dir().join("runc"),
        };
        let coffer = Self {
            test,
            name: "coffer",
            program: product("coffer"),
            root: test.root(),
        };
        [runc, coffer]
            .into_iter()
            .filter(|runtime| is_wanted(runtime.name))
            .collect()
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    pub fn is_coffer(&self) -> bool {
        self.name == "coffer"
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The value of its `--root`.
    pub fn root(&self) -> &str {
        self.root.to_str().expect("UTF-8")
    }

    /// The runtime with its `--root`, which is a flag before the verb.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--root")
            .arg(&self.root)
            .args(args)
            .stdin(Stdio::null());
        command
    }

    pub fn call(&self, args: &[&str]) -> Finished {
        finish(self.command(args))
    }

    /// Runs a command that must succeed; gives its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let done = self.call(args);
        assert_eq!(done.code, 0, "{} {args:?}: {}", self.name, done.stderr);
        done.text().to_owned()
    }

    /// Runs a command that must fail and say this on standard error.
    pub fn refuses(&self, args: &[&str], message: &str) -> Finished {
        let done = self.call(args);
        assert!(
            done.code != 0 && done.stderr.contains(message),
            "{} {args:?} must fail with {message:?}, but: {done:?}",
            self.name
        );
        done
    }

    /// Runs a `create` that must fail and say this, and nothing longer than a line.
    pub fn refuses_create(&self, args: &[&str], message: &str) {
        // What a create that does not fail leaves running would hold a pipe open.
        let output = self.test.dir().join("refused.out");
        let code = into_file(self.command(&[&["create"], args].concat()), &output);
        let text = fs::read_to_string(&output).expect("scratch is ours");
        assert!(
            code == 1 && text.contains(message) && text.trim_end().lines().count() == 1,
            "{} create {args:?} must fail with {message:?}, but: code {code}, {text}",
            self.name
        );
    }

    /// `create` with further flags, nothing on standard input.
    pub fn create(&self, bundle: &str, flags: &[&str]) -> Container<'_> {
        self.create_with_input(bundle, flags, Stdio::null())
    }

    pub fn create_with_input(&self, bundle: &str, flags: &[&str], input: Stdio) -> Container<'_> {
        let id = self.test.id();
        let pid_file = self.test.dir().join(format!("{id}.pid"));
        let head = ["create", "--bundle", bundle, "--pid-file"];
        let file = pid_file.to_str().expect("UTF-8");
        let mut command = self.command(&[&head[..], &[file], flags, &[&id]].concat());
        command.stdin(input);
        let output = self.test.dir().join(format!("{id}.out"));
        let code = into_file(command, &output);
        let text = || fs::read_to_string(&output).unwrap_or_default();
        assert_eq!(code, 0, "{} create {flags:?}: {}", self.name, text());
        let pid = read_pid(&pid_file);
        Container {
            runtime: self,
            id,
            pid,
            output,
            code: Cell::new(None),
        }
    }

    /// `state`, parsed.
    pub fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.ok(&["state", id])).expect("state is JSON")
    }

    pub fn status(&self, id: &str) -> String {
        self.state(id)["status"]
            .as_str()
            .expect("a status")
            .to_owned()
    }

    /// Whether an exec of [`MARKED`] runs in the container.
    pub fn marked_is_alive(&self, id: &str) -> bool {
        let asks = "kill -0 $(cat /dev/shm/marked)";
        let done = self.call(&["exec", id, "sh", "-c", asks]);
        assert!(done.code <= 1, "{}: {asks}: {done:?}", self.name);
        done.code == 0
    }
}

/// A process document as podman writes it for an exec.
pub fn process(args: &[&str]) -> Value {
    json!({"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/", "env": ["PATH=/bin", "FROM=file"]})
}

/// A script for an exec whose life [`Runtime::marked_is_alive`] can tell.
pub const MARKED: &str = "echo $$ > /dev/shm/marked; exec sleep 600";

/// Where a program is: conmon takes no name without a path.
pub fn program(name: &str) -> PathBuf {
    let path = host("sh", &["-c", &format!("command -v {name}")]);
    path.unwrap_or_else(|_| panic!("{name} is not installed; run `cargo xtask setup`"))
        .trim()
        .into()
}

/// A container, until it is dropped.
#[derive(Debug)]
pub struct Container<'t> {
    runtime: &'t Runtime<'t>,
    pub id: String,
    /// What the pid file says.
    pub pid: Pid,
    output: PathBuf,
    code: Cell<Option<i32>>,
}

impl Container<'_> {
    pub fn start(&self) {
        self.runtime.ok(&["start", &self.id]);
    }

    pub fn status(&self) -> String {
        self.runtime.status(&self.id)
    }

    /// What it wrote so far, standard output and error together.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.output).expect("the output is ours")
    }

    /// `exec --detach` of a process document in a file, with further flags; gives what the pid file says.
    pub fn exec_detached(&self, document: &Path, flags: &[&str]) -> Pid {
        let runtime = self.runtime;
        let name = runtime.test.id();
        let pid_file = runtime.test.dir().join(format!("{name}.pid"));
        let head = [
            "exec",
            "--detach",
            "--pid-file",
            pid_file.to_str().expect("UTF-8"),
            "--process",
            document.to_str().expect("UTF-8"),
        ];
        let words = [&head[..], flags, &[&self.id]].concat();
        let output = runtime.test.dir().join(format!("{name}.out"));
        let code = into_file(runtime.command(&words), &output);
        let text = fs::read_to_string(&output).unwrap_or_default();
        assert_eq!(code, 0, "{} {words:?}: {text}", runtime.name);
        read_pid(&pid_file)
    }

    pub fn wait_output(&self, text: &str) {
        wait_for(
            &format!("{text:?} from {}: {:?}", self.runtime.name, self.output),
            || self.output().contains(text),
        );
    }

    /// Waits for its process as a subreaper does; gives the exit code.
    pub fn wait(&self) -> i32 {
        let code = reap(self.pid);
        self.code.set(Some(code));
        code
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let done = self.runtime.call(&["delete", "--force", &self.id]);
        if std::thread::panicking() {
            eprintln!("--- output of {}\n{}", self.id, self.output());
        } else {
            assert_eq!(done.code, 0, "delete --force: {}", done.stderr);
            if self.code.get().is_none() {
                self.wait();
            }
        }
    }
}

/// Waits for the end of a process that was orphaned to us, as conmon's exit codes are: 128 + n for signal n.
pub fn reap(pid: Pid) -> i32 {
    let mut code = None;
    wait_for(&format!("the end of process {pid}"), || {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)).expect("the process is our child") {
            WaitStatus::Exited(_, status) => code = Some(status),
            WaitStatus::Signaled(_, signal, _) => code = Some(128 + signal as i32),
            _ => {}
        }
        code.is_some()
    });
    code.expect("it ended")
}

/// The number in a pid file, which must be nothing but digits.
pub fn read_pid(file: &Path) -> Pid {
    let text = fs::read_to_string(file)
        .unwrap_or_else(|e| panic!("can't read the pid file {}: {e}", file.display()));
    assert!(
        text.bytes().all(|b| b.is_ascii_digit()),
        "pid file: {text:?}"
    );
    Pid::from_raw(text.parse().expect("a pid"))
}

/// Runs a command whose output goes to a file, as the output of what it leaves running does; gives the exit code.
pub fn into_file(mut command: Command, output: &Path) -> i32 {
    let file = fs::File::create(output).expect("scratch is ours");
    command.stderr(file.try_clone().expect("a descriptor"));
    command.stdout(file);
    let mut child = command
        .spawn()
        .unwrap_or_else(|e| panic!("can't run {command:?}: {e}"));
    let status = child.wait().expect("it is our child");
    exit_code(status)
}

/// Receives a terminal's master from a runtime, as conmon does.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    pub fn new(dir: &Path) -> Self {
        let path = dir.join("console.sock");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket in scratch");
        Self { listener, path }
    }

    pub fn path(&self) -> &str {
        self.path.to_str().expect("UTF-8")
    }

    /// The master. There must be a byte with it, and nothing but one descriptor.
    pub fn receive(&self) -> Terminal {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        let (stream, _) = self.listener.accept().expect("the runtime connected");
        let mut bytes = [0; 256];
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let mut space = nix::cmsg_space!([i32; 4]);
        let message = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .expect("a message");
        assert!(message.bytes > 0, "no data beside the descriptor");
        let descriptors: Vec<_> = message
            .cmsgs()
            .expect("control messages")
            .filter_map(|control| match control {
                ControlMessageOwned::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(descriptors.len(), 1, "one descriptor");
        Terminal {
            master: owned(descriptors[0]).into(),
            seen: String::new(),
        }
    }
}

/// The master of a container's terminal, and what was read from it.
#[derive(Debug)]
pub struct Terminal {
    pub master: fs::File,
    seen: String,
}

impl Terminal {
    pub fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("it is open");
    }

    /// Reads until this text has come.
    pub fn wait(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen.contains(text) {
            assert!(
                Instant::now() < deadline && self.read_more(),
                "waited for {text:?} on a terminal that said {:?}",
                self.seen
            );
        }
    }

    /// Reads until the other side is closed; gives all that was read.
    pub fn rest(mut self) -> String {
        let deadline = Instant::now() + PATIENCE;
        while self.read_more() {
            assert!(Instant::now() < deadline, "no end after {:?}", self.seen);
        }
        self.seen
    }

    /// Reads what comes within a second; false at the end.
    fn read_more(&mut self) -> bool {
        use nix::poll::{PollFd, PollFlags, poll};
        let mut polled = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, 1000_u16).expect("poll works") == 0 {
            return true;
        }
        let mut buffer = [0; 4096];
        // A terminal whose other side is closed reads as EIO.
        let Ok(n @ 1..) = self.master.read(&mut buffer) else {
            return false;
        };
        self.seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        true
    }

    pub fn set_size(&self, rows: u16, columns: u16) {
        let size = nix::pty::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        set_window_size(&self.master, &size).expect("it is a terminal");
    }
}

nix::ioctl_write_ptr_bad!(tiocswinsz, libc::TIOCSWINSZ, nix::pty::Winsize);

#[allow(unsafe_code)]
fn set_window_size(terminal: &fs::File, size: &nix::pty::Winsize) -> nix::Result<i32> {
    // SAFETY: the descriptor is open and the structure is what this request reads.
    unsafe { tiocswinsz(terminal.as_raw_fd(), size) }
}

#[allow(unsafe_code)]
fn owned(descriptor: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us in recvmsg, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}
