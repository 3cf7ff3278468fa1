//! A program of the caller's that reads a process's output: containerd's `binary://` loggers, as nerdctl has one.
//!
//! ```text
//! fd 3  the process's stdout        fd 5  closed, or written to, when the logger is ready; the process is not created before
//! fd 4  its stderr                  environment: CONTAINER_ID and CONTAINER_NAMESPACE, nothing else
//! ```

#![allow(
    unsafe_code,
    reason = "descriptors 3 to 5 are set between fork and exec"
)]

use super::endpoint::enlarge;
use crate::cgroup;
use crate::sandbox::process::ProcessKey;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Where the logger finds stdout; stderr and the ready signal follow.
const FIRST_FD: RawFd = 3;
/// Descriptors are moved up to here before, so that none of them is overwritten by another.
const ABOVE_THEM: RawFd = 10;
/// A logger opens a file or a connection before it is ready.
const READY: Duration = Duration::from_secs(10);
/// For what it still has to write after the end of its input; as in containerd's own shim.
const END: Duration = Duration::from_secs(12);

/// Why there is no logger.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    #[error("can't start the logger {program}")]
    Start { program: PathBuf, source: io::Error },
    #[error("the logger {program} was not ready within {READY:?}")]
    NotReady { program: PathBuf },
}

/// The program and its arguments.
#[derive(Debug, PartialEq, Eq)]
pub struct LoggerCommand {
    pub program: PathBuf,
    pub args: Vec<OsString>,
}

/// A running logger. It lives as long as its input, and a little longer.
#[derive(Debug)]
pub struct Logger {
    process: Child,
    program: PathBuf,
}

impl Logger {
    /// Starts it and waits until it is ready; gives the ends of its input for stdout and stderr.
    pub async fn start(
        command: &LoggerCommand,
        key: &ProcessKey,
        namespace: &str,
    ) -> Result<(Self, pipe::Sender, pipe::Sender), LoggerError> {
        let program = command.program.clone();
        let (process, stdout, stderr, ready) =
            spawn(command, key, namespace).map_err(|source| LoggerError::Start {
                program: program.clone(),
                source,
            })?;
        let logger = Self { process, program };
        let mut byte = [0; 1];
        let mut ready = ready;
        // The end of the pipe is as good as a byte: it closed it, or it has ended, and then there is nobody to wait for.
        match timeout(READY, ready.read(&mut byte)).await {
            Ok(_) => Ok((logger, stdout, stderr)),
            Err(_) => {
                let program = logger.program.clone();
                logger.kill().await;
                Err(LoggerError::NotReady { program })
            }
        }
    }

    /// Waits for the end of the process's output, and then for the logger's own end.
    pub async fn end_after(mut self, drained: impl Future<Output = ()>) {
        drained.await;
        match timeout(END, self.process.wait()).await {
            Ok(Ok(status)) if !status.success() => {
                tracing::warn!(program = %self.program.display(), %status, "a logger failed");
            }
            Ok(_) => {}
            Err(_) => {
                tracing::warn!(program = %self.program.display(), "a logger did not end within {END:?}");
                self.kill().await;
            }
        }
    }

    async fn kill(mut self) {
        if let Err(error) = self.process.kill().await {
            tracing::warn!(program = %self.program.display(), %error, "a logger can't be killed");
        }
    }
}

type Spawned = (Child, pipe::Sender, pipe::Sender, pipe::Receiver);

fn spawn(command: &LoggerCommand, key: &ProcessKey, namespace: &str) -> io::Result<Spawned> {
    let (stdout, to_stdout) = pipe2(OFlag::O_CLOEXEC)?;
    let (stderr, to_stderr) = pipe2(OFlag::O_CLOEXEC)?;
    let (ready, signal) = pipe2(OFlag::O_CLOEXEC)?;
    let theirs = [moved_up(&stdout)?, moved_up(&stderr)?, moved_up(&signal)?];
    let id = match &key.exec {
        Some(exec) => exec.as_str(),
        None => key.container.as_str(),
    };
    let mut process = Command::new(&command.program);
    process
        .args(&command.args)
        .env_clear()
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    let numbers = theirs.each_ref().map(AsRawFd::as_raw_fd);
    // SAFETY: the closure calls only dup2, which is async-signal-safe, and allocates nothing on success.
    unsafe { process.pre_exec(move || install(numbers)) };
    let child = process.spawn()?;
    // It may still write when the sandbox is gone.
    child.id().into_iter().for_each(cgroup::let_out);
    let senders = [to_stdout, to_stderr].map(pipe::Sender::from_owned_fd);
    let [stdout, stderr] = senders;
    let (stdout, stderr) = (stdout?, stderr?);
    enlarge(&stdout);
    enlarge(&stderr);
    Ok((child, stdout, stderr, pipe::Receiver::from_owned_fd(ready)?))
}

/// A copy with a number that is above those the logger gets.
fn moved_up(fd: &OwnedFd) -> io::Result<OwnedFd> {
    let copy = fcntl(fd.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(ABOVE_THEM))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Runs in the child. All other descriptors of the supervisor are close-on-exec.
fn install(numbers: [RawFd; 3]) -> io::Result<()> {
    for (fd, target) in numbers.into_iter().zip(FIRST_FD..) {
        // SAFETY: dup2 gets plain integers.
        if unsafe { libc::dup2(fd, target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_proto::ids::{ContainerId, ExecId};
    use std::fs;
    use tokio::io::AsyncWriteExt;

    fn shell(script: &str, args: &[&str]) -> LoggerCommand {
        let args = [&["-c", script, "sh"], args].concat();
        LoggerCommand {
            program: "/bin/sh".into(),
            args: args.into_iter().map(OsString::from).collect(),
        }
    }

    fn key() -> ProcessKey {
        ProcessKey {
            container: ContainerId::new("c").unwrap(),
            exec: Some(ExecId::new("e").unwrap()),
        }
    }

    #[tokio::test]
    async fn a_logger_reads_both_outputs_and_is_told_whose_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = "exec 5>&-; echo $CONTAINER_ID $CONTAINER_NAMESPACE ${HOME-none} > $1; cat <&3 >> $1; cat <&4 >> $1";
        let command = shell(script, &[log.to_str().unwrap()]);
        let (logger, mut stdout, mut stderr) =
            Logger::start(&command, &key(), "k8s.io").await.unwrap();
        stdout.write_all(b"out\n").await.unwrap();
        stderr.write_all(b"err\n").await.unwrap();
        drop((stdout, stderr));
        logger.end_after(async {}).await;
        assert_eq!(
            fs::read_to_string(log).unwrap(),
            "e k8s.io none\nout\nerr\n"
        );
    }

    #[tokio::test]
    async fn nobody_waits_for_a_logger_that_has_ended() {
        let (logger, ..) = Logger::start(&shell("exit 3", &[]), &key(), "")
            .await
            .unwrap();
        logger.end_after(async {}).await;
    }

    #[tokio::test]
    async fn a_logger_that_is_not_there_is_named() {
        let command = LoggerCommand {
            program: "/no/such/logger".into(),
            args: Vec::new(),
        };
        let error = Logger::start(&command, &key(), "").await.unwrap_err();
        assert!(error.to_string().contains("/no/such/logger"), "{error}");
    }
}
