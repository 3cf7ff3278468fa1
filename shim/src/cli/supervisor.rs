//! The supervisor as a process: how `run` starts it, and what it does before it serves.
//!
//! ```text
//! coffer run ── spawns ──► coffer supervise --id ID      in a session of its own
//!            ── stdin ───►   SandboxOptions as JSON
//!            ◄── stdout ──   "unix://…/task.sock\n" when it serves, or "error: why\n"
//! ```

use super::client::Task;
use super::options::SuperviseOptions;
use super::{Error, unit};
use crate::cleanup;
use crate::machine::SandboxOptions;
use crate::machine::child::printable;
use crate::supervise::supervise;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::SandboxId;
use nix::unistd::{getpid, getsid, setsid};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest, Take};
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdout, Command};
use tracing_subscriber::fmt::MakeWriter;

/// The supervisor's log in the sandbox's directory.
pub(super) const LOG_FILE: &str = "supervisor.log";
/// Longest answer of a supervisor: a path or one line of an error.
const MAX_ANSWER: u64 = 16 << 10;
/// Longest options; they hold paths and kernel parameters.
const MAX_OPTIONS: u64 = 1 << 20;
/// From the start of the program until it serves. It only makes a directory and a socket, but the machine may be busy.
const START: Duration = Duration::from_secs(60);
/// How often is looked whether it serves.
const LOOK: Duration = Duration::from_millis(50);
/// From Shutdown until everything is gone: the guest powers off, or is stopped.
const END: Duration = Duration::from_secs(20);

/// A supervisor that this process started.
#[derive(Debug)]
pub(super) struct Supervisor {
    process: Child,
    /// The end of this tells it that we are gone.
    _answers: BufReader<Take<ChildStdout>>,
    root: PathBuf,
    id: SandboxId,
}

impl Supervisor {
    /// Starts it and waits until it serves.
    pub(super) async fn start(options: &SandboxOptions, log_level: &str) -> Result<Self, Error> {
        let mut command = this_program(&options.root)?;
        command.args(words(options, log_level));
        command.stderr(Stdio::null());
        let (started, answer) = Starting::new(command, options, START)
            .await
            .map_err(not_started)?;
        started.judge(&answer, options)
    }

    /// The same, where the end of whoever called this program does not reach it: in a unit of systemd's, or else in the sandbox's cgroup.
    pub(super) async fn start_apart(
        mut options: SandboxOptions,
        log_level: &str,
    ) -> Result<Self, Error> {
        options.joins_cgroup = true;
        if !unit::is_possible() {
            return Self::start(&options, log_level).await;
        }
        let service = SandboxOptions {
            joins_cgroup: false,
            ..options.clone()
        };
        match Self::start_as_service(&service, log_level).await? {
            Ok(started) => Ok(started),
            Err(reason) => {
                let started = Self::start(&options, log_level).await?;
                note(&options, &format!("systemd made no unit for it: {reason}"));
                Ok(started)
            }
        }
    }

    /// Gives the reason if there is no such service.
    async fn start_as_service(
        options: &SandboxOptions,
        log_level: &str,
    ) -> Result<Result<Self, String>, Error> {
        let program = this_program(&options.root)?.into_std();
        let mut line = vec![program.get_program().to_owned()];
        line.extend(program.get_args().map(ToOwned::to_owned));
        line.extend(words(options, log_level).map(OsString::from));
        line.push(format!("--beside={}", std::process::id()).into());
        let line = unit::words(options, &line);
        let mut command = Command::new(&line[0]);
        // It is not the supervisor, and waits for the service's end as long as this program does.
        command
            .args(&line[1..])
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let starting = Starting::new(command, options, unit::START).await;
        let (mut started, answer) = match starting {
            Ok(started) => started,
            Err(error) => return Ok(Err(error.to_string())),
        };
        if answer.is_empty() {
            return Ok(Err(started.last_words().await));
        }
        started.judge(&answer, options).map(Ok)
    }

    /// Waits until it has ended, which it does after Shutdown, and removes what it could not.
    pub(super) async fn ended(mut self) -> Result<(), Error> {
        let _ = tokio::time::timeout(END, self.process.wait()).await;
        remove(self.root.clone(), self.id.clone()).await?;
        // Killed by the cleanup if it was still there, and to be reaped by us.
        let _ = self.process.wait().await;
        Ok(())
    }

    /// Leaves it alone: it lives on when this process ends. Only a systemd-run that waits for it does not.
    pub(super) fn detach(self) {}
}

/// A process that is, or starts, a supervisor.
struct Starting {
    process: Child,
    answers: BufReader<Take<ChildStdout>>,
}

impl Starting {
    /// Starts it and gives it the options; gives also the line it answers, which is empty if it ended without one.
    async fn new(
        mut command: Command,
        options: &SandboxOptions,
        deadline: Duration,
    ) -> io::Result<(Self, String)> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let json = serde_json::to_vec(options)?;
        let mut process = command.spawn()?;
        let (mut stdin, stdout) = (
            process.stdin.take().expect("piped"),
            process.stdout.take().expect("piped"),
        );
        let answer = async {
            // One that ends without reading says why in its answer.
            let _ = stdin.write_all(&json).await;
            drop(stdin);
            let mut line = String::new();
            let mut answers = BufReader::new(stdout.take(MAX_ANSWER));
            answers.read_line(&mut line).await?;
            io::Result::Ok((line, answers))
        };
        let answer = tokio::time::timeout(deadline, answer).await;
        let (line, answers) = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        Ok((Self { process, answers }, line))
    }

    fn judge(self, answer: &str, options: &SandboxOptions) -> Result<Supervisor, Error> {
        if answer.starts_with("unix://") {
            return Ok(Supervisor {
                process: self.process,
                _answers: self.answers,
                root: options.root.clone(),
                id: options.id.clone(),
            });
        }
        let message = answer.trim_end().trim_start_matches("error: ");
        Err(Error::Supervisor(match message {
            "" => "the supervisor ended without a word".into(),
            message => message.into(),
        }))
    }

    /// What it wrote to standard error before its end.
    async fn last_words(&mut self) -> String {
        let mut text = Vec::new();
        if let Some(stderr) = self.process.stderr.take() {
            let mut stderr = stderr.take(MAX_ANSWER);
            let read = stderr.read_to_end(&mut text);
            let _ = tokio::time::timeout(unit::START, read).await;
        }
        printable(&text)
    }
}

fn words<'a>(options: &'a SandboxOptions, log_level: &'a str) -> impl Iterator<Item = &'a str> {
    let id = options.id.as_str();
    ["--log-level", log_level, "supervise", "--id", id].into_iter()
}

/// Adds a line to its log. That must not keep a container from being made.
fn note(options: &SandboxOptions, line: &str) {
    let log = options.dir().join(LOG_FILE);
    let log = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log);
    let _ = log.and_then(|mut log| writeln!(log, "WARN {line}"));
}

fn not_started(source: io::Error) -> Error {
    Error::Io {
        what: "can't start the supervisor".into(),
        source,
    }
}

/// Removes a sandbox by what its state says, on a thread that may block.
pub(super) async fn remove(root: PathBuf, id: SandboxId) -> Result<(), Error> {
    let removed = tokio::task::spawn_blocking(move || cleanup::cleanup(&root, &id)).await;
    Ok(removed.expect("cleanup does not panic")?)
}

/// Starts the process that deletes a detached sandbox at its end.
pub(super) fn start_reaper(root: &Path, id: &SandboxId) -> Result<(), Error> {
    let mut command = this_program(root)?;
    command
        .args(["reap", "--id", id.as_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let spawned = command.spawn();
    spawned.map(drop).map_err(|source| Error::Io {
        what: "can't start coffer reap".into(),
        source,
    })
}

/// This program with its root; it is started in `/`.
pub(super) fn this_program(root: &Path) -> Result<Command, Error> {
    let program = std::env::current_exe();
    let program = program.map_err(|source| Error::Io {
        what: "can't find the own program".into(),
        source,
    })?;
    let mut command = Command::new(program);
    command.arg("--root").arg(root).current_dir("/");
    Ok(command)
}

/// Leaves the caller's session and closes what was inherited, before anything else is opened.
#[allow(unsafe_code)]
pub(super) fn daemonize() -> io::Result<()> {
    // systemd starts what it starts in a session of its own.
    if getsid(None)? != getpid() {
        setsid()?;
    }
    // SAFETY: this runs first in a process that has opened nothing itself, so no owner of a descriptor is robbed.
    nix::Error::result(unsafe { libc::close_range(3, libc::c_uint::MAX, 0) })?;
    Ok(())
}

/// `coffer supervise`: serves until the sandbox is deleted.
pub(super) async fn serve(
    log: &'static LogFile,
    root: &Path,
    told: &SuperviseOptions,
) -> Result<(), Error> {
    let id = &told.id;
    let result = async {
        let mut json = Vec::new();
        let read = io::stdin().take(MAX_OPTIONS).read_to_end(&mut json);
        read.map_err(|source| Error::Io {
            what: "can't read the options".into(),
            source,
        })?;
        let options: SandboxOptions = serde_json::from_slice(&json).map_err(|error| Error::Io {
            what: "can't parse the options".into(),
            source: error.into(),
        })?;
        if options.id != *id || options.root != *root {
            return Err(Error::Supervisor(
                "the options are for another sandbox".into(),
            ));
        }
        log.place
            .set(options.dir().join(LOG_FILE))
            .expect("set once");
        let ready = io::stdout().as_fd().try_clone_to_owned();
        let ready = ready.map_err(|source| Error::Io {
            what: "can't use standard output".into(),
            source,
        })?;
        let caller = ready.try_clone().and_then(pipe::Sender::from_owned_fd);
        let caller = caller.map_err(|source| Error::Io {
            what: "can't watch the caller".into(),
            source,
        })?;
        tokio::spawn(end_without(caller, root.to_owned(), id.clone()));
        Ok(supervise(options, Some(File::from(ready)), None).await?)
    };
    let result = result.await;
    if let Err(error) = &result {
        // Nobody reads it any more when the sandbox was there already.
        let _ = writeln!(io::stdout(), "error: {}", chain(error));
    }
    result
}

/// A caller that was killed before it asked for a container will never ask. With one, this changes nothing.
async fn end_without(caller: pipe::Sender, root: PathBuf, id: SandboxId) {
    // A pipe has an error when its reader is gone.
    if caller.ready(Interest::ERROR).await.is_err() {
        return;
    }
    let shutdown = async {
        loop {
            // This process may not serve yet.
            match Task::connect(&root, &id).await {
                Ok(task) => return task.shutdown(&id).await,
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    };
    let _ = tokio::time::timeout(START, shutdown).await;
}

/// A log file in a directory that the supervisor makes itself: opened with the first line after that.
#[derive(Debug, Default)]
pub(super) struct LogFile {
    place: OnceLock<PathBuf>,
    file: OnceLock<File>,
}

impl LogFile {
    fn file(&self) -> Option<&File> {
        if let Some(file) = self.file.get() {
            return Some(file);
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.place.get()?)
            .ok()?;
        Some(self.file.get_or_init(|| file))
    }
}

/// One line on its way to the file. A line that can't be written is lost: there is nobody to tell.
#[derive(Debug)]
pub(super) struct LogLine<'a>(Option<&'a File>);

impl Write for LogLine<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.map_or(Ok(line.len()), |mut file| file.write(line))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for &'static LogFile {
    type Writer = LogLine<'a>;

    fn make_writer(&'a self) -> LogLine<'a> {
        LogLine(self.file())
    }
}
