//! Host processes of a sandbox: how they are started, named across a restart, and ended.

use crate::oom_score;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::watch;

/// The inherited socket of coffer-vmm, coffer-qemu and coffer-fsd.
const INHERITED_FD: i32 = coffer_proto::vmm::CONTROL_FD;
/// Lines of a child's stderr that an error message quotes.
const QUOTED_LINES: usize = 8;
/// Longest line of a child's stderr that is kept; the rest of it is dropped.
const MAX_LINE: u64 = 1024;
/// All of a child's stderr that goes to the log. A compromised child must not fill the disk.
const MAX_LOGGED: usize = 1 << 20;

/// A process, named so that it can't be confused with a later one that got the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Clock ticks after boot, field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
}

impl ProcessId {
    /// Names the process that has this pid now.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time = start_time(&stat)
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))?;
        Ok(Self { pid, start_time })
    }

    /// Names this process.
    pub fn current() -> io::Result<Self> {
        Self::of(i32::try_from(std::process::id()).expect("pids are positive i32"))
    }

    /// Whether it still runs; a zombie does not.
    pub fn is_alive(&self) -> bool {
        self.open()
            .ok()
            .flatten()
            .is_some_and(|pidfd| !ended(&pidfd, Duration::ZERO))
    }

    /// Kills it and waits until it has ended, at most `deadline`. A process that is gone already is no error.
    pub fn kill(&self, deadline: Duration) -> io::Result<()> {
        let Some(pidfd) = self.open()? else {
            return Ok(());
        };
        send_sigkill(&pidfd)?;
        if ended(&pidfd, deadline) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("process {} did not end within {deadline:?}", self.pid),
        ))
    }

    /// A pidfd, or None when the process is gone. The start time is compared after opening, so the answer holds.
    fn open(&self) -> io::Result<Option<OwnedFd>> {
        let pidfd = match pidfd_open(self.pid) {
            // EINVAL: the number lives on as that of a process group whose first process is gone.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => {
                return Ok(None);
            }
            other => other?,
        };
        Ok(Self::of(self.pid)
            .is_ok_and(|now| now == *self)
            .then_some(pidfd))
    }
}

/// Field 22; the command name before it may hold spaces and parentheses.
fn start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// A descriptor of the process that has this pid now.
#[allow(unsafe_code)]
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[allow(unsafe_code)]
fn send_sigkill(pidfd: &OwnedFd) -> io::Result<()> {
    let no_info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the descriptor is open, and a null siginfo means that of kill(2).
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            no_info,
            0,
        )
    };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        gone if gone.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error),
    }
}

/// Waits for the end of a process that need not be a child.
fn ended(pidfd: &OwnedFd, deadline: Duration) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let until = Instant::now() + deadline;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)],
            timeout,
        ) {
            Ok(ready) => return ready > 0,
            Err(nix::Error::EINTR) => {}
            Err(_) => return false,
        }
    }
}

/// Why a child could not be started.
#[derive(Debug, thiserror::Error)]
#[error("can't start {program}")]
pub struct SpawnError {
    program: PathBuf,
    source: io::Error,
}

/// A running child. Dropping it changes nothing for the process; its end comes with the socket it inherited.
#[derive(Debug, Clone)]
pub struct Child {
    pub id: ProcessId,
    name: String,
    exit: watch::Receiver<Option<ExitStatus>>,
    stderr: Arc<Mutex<VecDeque<String>>>,
}

impl Child {
    /// Starts `program` with `socket` as its fd 3, no environment, and its stderr in our log.
    pub fn spawn(
        program: &Path,
        args: &[&OsStr],
        socket: BorrowedFd<'_>,
    ) -> Result<Self, SpawnError> {
        let fail = |source| SpawnError {
            program: program.to_owned(),
            source,
        };
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .current_dir("/")
            .process_group(0);
        if let Some(level) = std::env::var_os("RUST_LOG") {
            command.env("RUST_LOG", level);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        inherit(&mut command, socket.as_raw_fd());
        let mut child = command.spawn().map_err(fail)?;
        let pid = child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .ok_or_else(|| fail(io::Error::other("it has no pid")))?;
        let name = program
            .file_name()
            .unwrap_or(program.as_os_str())
            .to_string_lossy()
            .into_owned();
        let stderr = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(pipe) = child.stderr.take() {
            tokio::spawn(log_lines(pipe, name.clone(), stderr.clone()));
        }
        oom_score::offer(pid);
        let id = ProcessId::of(pid).map_err(fail)?;
        let (tx, exit) = watch::channel(None);
        tokio::spawn(async move {
            let status = child
                .wait()
                .await
                .unwrap_or_else(|_| ExitStatus::from_raw(libc::SIGKILL));
            tx.send_replace(Some(status));
        });
        Ok(Self {
            id,
            name,
            exit,
            stderr,
        })
    }

    /// Waits for its end, and tells it in words: "coffer-vmm was killed by signal 31".
    pub async fn ended(&self) -> String {
        let mut exit = self.exit.clone();
        let status = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|status| *status);
        self.describe(status)
    }

    /// Whether it ended by itself and without an error: it saw the end of its socket.
    pub fn left_in_order(&self) -> bool {
        self.exit.borrow().is_some_and(|status| status.success())
    }

    /// Its end in words, if it has ended.
    pub fn has_ended(&self) -> Option<String> {
        let status = *self.exit.borrow();
        status.map(|status| self.describe(Some(status)))
    }

    fn describe(&self, status: Option<ExitStatus>) -> String {
        let how = match status {
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exited with status {code}"),
                (_, Some(signal)) => format!("was killed by signal {signal}"),
                _ => "ended".to_owned(),
            },
            None => "ended".to_owned(),
        };
        format!("{} {how}", self.name)
    }

    /// The last lines it wrote to stderr.
    pub fn last_words(&self) -> Vec<String> {
        self.stderr
            .lock()
            .expect("no holder of this lock panics")
            .iter()
            .cloned()
            .collect()
    }
}

#[allow(unsafe_code)]
fn inherit(command: &mut Command, fd: i32) {
    let prepare = move || {
        // SAFETY: dup2 and fcntl are async-signal-safe and get plain integers. All other descriptors of the
        // supervisor are close-on-exec.
        let result = unsafe {
            if fd == INHERITED_FD {
                libc::fcntl(fd, libc::F_SETFD, 0)
            } else {
                libc::dup2(fd, INHERITED_FD)
            }
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    // SAFETY: the closure calls only async-signal-safe functions and allocates nothing on success.
    unsafe { command.pre_exec(prepare) };
}

async fn log_lines(
    pipe: tokio::process::ChildStderr,
    name: String,
    kept: Arc<Mutex<VecDeque<String>>>,
) {
    let mut reader = BufReader::new(pipe);
    let mut logged = 0;
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) | Err(_) => return,
            Ok(length) => logged += length,
        }
        if logged > MAX_LOGGED {
            continue;
        }
        let text = printable(&line);
        tracing::info!(target: "child", process = name, "{text}");
        let mut kept = kept.lock().expect("no holder of this lock panics");
        if kept.len() == QUOTED_LINES {
            kept.pop_front();
        }
        kept.push_back(text);
    }
}

/// Text from a process we don't trust, fit for a log or an error: no control characters, one line.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim_end()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn the_start_time_is_found_behind_a_hostile_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 99";
        assert_eq!(start_time(stat), Some(4242));
        assert_eq!(start_time("7 (a"), None);
    }

    #[test]
    fn another_process_with_the_same_pid_is_left_alone() {
        let own = ProcessId::current().unwrap();
        assert!(own.is_alive());
        let impostor = ProcessId {
            start_time: own.start_time + 1,
            ..own
        };
        assert!(!impostor.is_alive());
        impostor.kill(Duration::from_secs(1)).unwrap();
    }

    #[tokio::test]
    async fn a_child_gets_its_socket_and_its_end_is_told() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let sh = Path::new("/bin/sh");
        let script = OsStr::new("echo hello >&3; echo oh >&2; exit 3");
        let child = Child::spawn(sh, &[OsStr::new("-c"), script], theirs.as_fd()).unwrap();
        drop(theirs);
        assert_eq!(child.ended().await, "sh exited with status 3");
        let mut got = String::new();
        io::Read::read_to_string(&mut &ours, &mut got).unwrap();
        assert_eq!(got, "hello\n");
        assert!(!child.id.is_alive());
    }

    #[tokio::test]
    async fn a_process_that_is_no_child_can_be_killed() {
        let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let child = Child::spawn(
            Path::new("/bin/sleep"),
            &[OsStr::new("600")],
            theirs.as_fd(),
        )
        .unwrap();
        let id = child.id;
        tokio::task::spawn_blocking(move || id.kill(Duration::from_secs(5)).unwrap())
            .await
            .unwrap();
        assert_eq!(child.ended().await, "sleep was killed by signal 9");
        id.kill(Duration::from_secs(1)).unwrap();
    }
}
