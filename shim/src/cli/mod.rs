//! The `coffer` command line. Every command is a client of a sandbox's supervisor, or reads what that wrote.
//!
//! - [`options`]: what can be said; [`values`]: what the words mean.
//! - [`run`] and [`exec`]: processes in the foreground ([`session`], [`stdio`], [`terminal`]).
//! - [`bundle`], [`default_spec`], [`user`]: from a root directory or an image to an OCI bundle.
//! - [`inspect`]: ps, state, stats, logs, console. [`delete`]: the end of a sandbox.
//! - [`client`]: the Task API; [`supervisor`]: the process that serves it.

mod bundle;
mod client;
mod default_spec;
mod delete;
mod exec;
mod inspect;
mod options;
mod run;
mod session;
mod stdio;
mod supervisor;
mod terminal;
mod timings;
mod user;
mod values;

use crate::check::{self, NoHypervisor, Report};
use crate::cleanup::CleanupError;
use crate::config::{Config, ConfigError};
use crate::spec::SpecError;
use crate::state::{ContainerRecord, State, StateError, Status};
use crate::supervise::SuperviseError;
use clap::Parser;
use client::{Process, Task, TaskError};
use coffer_proto::ids::{ContainerId, SandboxId};
use nix::sys::signal::Signal;
use options::{Command, CommandLine};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use supervisor::LogFile;

/// Exit status when Coffer failed, and not the container: as docker and podman have it.
const FAILED: u8 = 125;
/// The environment variable for `--root`.
const ROOT_VARIABLE: &str = "COFFER_ROOT";
/// From a SIGKILL until a container has ended; the supervisor ends the VM before that.
const KILL_TAKES: Duration = Duration::from_secs(30);

/// Why a command failed. Printed with its causes in one line.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Bundle(#[from] bundle::BundleError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    User(#[from] user::UserError),
    #[error(transparent)]
    NoHypervisor(#[from] NoHypervisor),
    #[error("the guest image can't be used: {0}")]
    GuestImage(String),
    #[error("there is no sandbox {id} in {root:?}")]
    NoSandbox { id: SandboxId, root: PathBuf },
    #[error("sandbox {id} exists already; coffer delete removes it")]
    Exists { id: SandboxId },
    #[error("sandbox {id} has no container of that name, but: {names}")]
    NoContainer { id: SandboxId, names: String },
    #[error("container {id} is {status}; stop it first, or delete with --force")]
    Running {
        id: ContainerId,
        status: &'static str,
    },
    #[error(
        "sandbox {id} was not started with --detach, so its output was not kept; --supervisor prints its log"
    )]
    NotDetached { id: SandboxId },
    #[error("sandbox {id} is dead: {reason}")]
    Dead { id: SandboxId, reason: String },
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cleanup(#[from] CleanupError),
    #[error(transparent)]
    Task(#[from] TaskError),
    #[error("{0}")]
    Supervisor(String),
    #[error(transparent)]
    Supervise(#[from] SuperviseError),
    #[error("interrupted by {0}")]
    Interrupted(Signal),
    #[error("{what}")]
    Io { what: String, source: io::Error },
}

impl Error {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Task(TaskError::Exec { kind, .. }) => kind.exit_status(),
            Self::Interrupted(signal) => u8::try_from(128 + *signal as i32).unwrap_or(FAILED),
            _ => FAILED,
        }
    }
}

/// An error and its causes. A cause whose text is in the text already is not repeated.
fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The whole program.
pub fn main() -> ExitCode {
    let line = match CommandLine::try_parse() {
        Ok(line) => line,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(FAILED)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match execute(line) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("coffer: {}", one_line(&error));
            ExitCode::from(error.exit_status())
        }
    }
}

fn execute(line: CommandLine) -> Result<u8, Error> {
    let supervise = matches!(line.command, Command::Supervise(_));
    if supervise || matches!(line.command, Command::Reap(_)) {
        let failed = |source| Error::Io {
            what: "can't leave the caller's session".into(),
            source,
        };
        supervisor::daemonize().map_err(failed)?;
    }
    let mut config = Config::load(line.global.config.as_deref())?;
    let variable = std::env::var_os(ROOT_VARIABLE)
        .filter(|root| !root.is_empty())
        .map(PathBuf::from);
    if let Some(root) = line.global.root.or(variable) {
        config.root = root;
    }
    config.root = std::path::absolute(&config.root).map_err(|source| Error::Io {
        what: format!("the state root {:?} can't be used", config.root),
        source,
    })?;
    config.log_level = line.global.log_level.unwrap_or(config.log_level);
    let log: &'static LogFile = Box::leak(Box::default());
    start_logging(&config, supervise.then_some(log));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = runtime.map_err(|source| Error::Io {
        what: "can't start the runtime".into(),
        source,
    })?;
    let result = runtime.block_on(dispatch(&config, line.command, log));
    // A thread may still sit in a read of standard input.
    runtime.shutdown_background();
    result
}

async fn dispatch(config: &Config, command: Command, log: &'static LogFile) -> Result<u8, Error> {
    match command {
        Command::Run(options) => return run::run(config, &options).await,
        Command::Exec(options) => return exec::exec(config, &options).await,
        Command::Ps(options) => inspect::list(config, options.json).await?,
        Command::Kill(options) => {
            let (task, process) = live(config, &options.target.id).await?;
            task.kill(&process, options.signal.0, options.all).await?;
        }
        Command::State(target) => inspect::state(config, &target.id).await?,
        Command::Delete(options) => {
            delete::delete(config, &options.target.id, options.force).await?;
        }
        Command::Stats(options) => inspect::stats(config, &options).await?,
        Command::Logs(options) => inspect::logs(config, &options)?,
        Command::Console(target) => inspect::console(config, &target.id)?,
        Command::Pause(target) => {
            let (task, process) = live(config, &target.id).await?;
            task.pause(&process.container).await?;
        }
        Command::Resume(target) => {
            let (task, process) = live(config, &target.id).await?;
            task.resume(&process.container).await?;
        }
        Command::Check(options) => return Ok(check(config, options.json)),
        Command::Version(options) => version(config, options.json),
        Command::Supervise(options) => supervisor::serve(log, &config.root, &options.id).await?,
        Command::Reap(options) => delete::reap(config, &options.id).await?,
    }
    Ok(0)
}

/// Commands keep quiet unless asked; the supervisor logs to a file of its own.
fn start_logging(config: &Config, file: Option<&'static LogFile>) {
    let level = config.log_level.as_str();
    if let Some(file) = file {
        let filter = tracing_subscriber::EnvFilter::new(level);
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            .with_writer(file);
        log.init();
        std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
        return;
    }
    if config.log_level > crate::config::LogLevel::Info {
        let filter = tracing_subscriber::EnvFilter::new(level);
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr)
            .init();
    }
}

fn check(config: &Config, as_json: bool) -> u8 {
    let report = Report::make(config);
    if as_json {
        println!(
            "{}",
            serde_json::to_string_pretty(&report).expect("a report has only string keys")
        );
    } else {
        println!("{report}");
    }
    u8::from(!report.ok)
}

fn version(config: &Config, as_json: bool) {
    let guest = check::guest_image_version(config);
    if as_json {
        println!(
            "{}",
            serde_json::json!({"version": coffer_proto::VERSION, "guest": guest})
        );
        return;
    }
    println!("coffer version {}", coffer_proto::VERSION);
    match guest {
        Ok(guest) => println!(
            "guest image version {}, Linux {}",
            guest.version, guest.kernel
        ),
        Err(reason) => println!("guest image: {reason}"),
    }
}

/// Where a bundle is before its sandbox exists. No sandbox id begins with a dot.
fn staging_directory(root: &Path, id: &SandboxId) -> PathBuf {
    root.join(format!(".{id}"))
}

/// A sandbox by what it wrote.
#[derive(Debug)]
struct Found {
    id: SandboxId,
    root: PathBuf,
    state: State,
}

impl Found {
    fn sandbox(config: &Config, id: &SandboxId) -> Result<Self, Error> {
        let (id, root) = (id.clone(), config.root.clone());
        match State::load(&root, &id)? {
            Some(state) => Ok(Self { id, root, state }),
            None => Err(Error::NoSandbox { id, root }),
        }
    }

    /// The sandbox's directory, which also one has whose state can't be read.
    fn directory(config: &Config, id: &SandboxId) -> Result<PathBuf, Error> {
        let directory = config.root.join(id);
        if directory.is_dir() {
            Ok(directory)
        } else {
            Err(Error::NoSandbox {
                id: id.clone(),
                root: config.root.clone(),
            })
        }
    }

    fn alive(&self) -> bool {
        self.state.supervisor.is_alive()
    }

    /// The container of the sandbox's own name, or the only one.
    fn container(&self) -> Result<(ContainerId, &ContainerRecord), Error> {
        let containers = &self.state.containers;
        let own = containers
            .iter()
            .find(|(id, _)| id.as_str() == self.id.as_str());
        let only = containers
            .first_key_value()
            .filter(|_| containers.len() == 1);
        let (id, record) = own.or(only).ok_or_else(|| {
            let names = containers
                .keys()
                .map(ContainerId::as_str)
                .collect::<Vec<_>>()
                .join(", ");
            Error::NoContainer {
                id: self.id.clone(),
                names: if names.is_empty() {
                    "none".into()
                } else {
                    names
                },
            }
        })?;
        Ok((id.clone(), record))
    }

    /// Why a container ended, where its own process was not the cause.
    fn reason(&self, record: &ContainerRecord) -> Option<String> {
        if let Some(exit) = &record.exit {
            let oom = exit.oom_killed.then(|| "out of memory".to_owned());
            return exit.reason.clone().or(oom);
        }
        match &self.state.status {
            Status::Stopped { reason } => Some(reason.clone()),
            _ if !self.alive() => Some("its supervisor died".into()),
            _ => None,
        }
    }

    /// A supervisor that can't be reached is dead, or about to be.
    fn why_gone(&self, error: TaskError) -> Error {
        if !matches!(error, TaskError::Connect { .. } | TaskError::Gone) {
            return error.into();
        }
        let reason = match &self.state.status {
            Status::Stopped { reason } => reason.clone(),
            _ if self.alive() => one_line(&error),
            _ => "its supervisor died; coffer delete removes what is left".into(),
        };
        Error::Dead {
            id: self.id.clone(),
            reason,
        }
    }
}

/// A sandbox whose supervisor answers, and its container's init process.
async fn live(config: &Config, id: &SandboxId) -> Result<(Task, Process), Error> {
    let found = Found::sandbox(config, id)?;
    let (container, _) = found.container()?;
    let task = Task::connect(&config.root, id)
        .await
        .map_err(|error| found.why_gone(error))?;
    Ok((
        task,
        Process {
            container: container.to_string(),
            exec: String::new(),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn exactly_one_thing_is_run() {
        let parse = |words: &[&str]| {
            CommandLine::try_parse_from([&["coffer", "run"], words].concat()).is_ok()
        };
        assert!(
            parse(&["image"])
                && parse(&["--rootfs", "d", "--", "sh"])
                && parse(&["--bundle", "b", "-i", "--memory", "1g"])
        );
        assert!(parse(&[
            "-it", "image", "--name", "x", "--", "sh", "-c", "--help"
        ]));
        for bad in [
            &[][..],
            &["a", "b"],
            &["--rootfs", "d", "image"],
            &["--bundle", "b", "--", "sh"],
            &["--bundle", "b", "-t"],
        ] {
            assert!(!parse(bad), "{bad:?} was taken");
        }
    }

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let source = io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::Io {
            what: "can't write\n\"/x\"".into(),
            source,
        };
        assert_eq!(
            one_line(&error),
            "can't write \"/x\": No space left on device (os error 28)"
        );
        assert_eq!(
            (
                error.exit_status(),
                Error::Interrupted(Signal::SIGINT).exit_status()
            ),
            (125, 130)
        );
    }
}
