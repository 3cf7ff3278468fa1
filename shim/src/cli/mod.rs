//! The `coffer` command line. Every command is a client of a sandbox's supervisor, or reads what that wrote.
//!
//! - [`options`]: what can be said; [`values`]: what the words mean; [`unicode`]: of what they are made.
//! - [`run`] and [`exec`]: processes in the foreground ([`session`], [`stdio`], [`terminal`]).
//! - [`bundle`], [`default_spec`], [`user`]: from a root directory or an image to an OCI bundle.
//! - [`inspect`]: ps, state, stats, logs, console. [`delete`]: the end of a sandbox.
//! - [`create`], [`lifecycle`], [`order`], [`stand_in`], [`view`], [`console`]: what engines call by the OCI command line.
//! - [`client`]: the Task API; [`supervisor`]: the process that serves it; [`unit`]: systemd's for that.

mod bundle;
mod client;
mod console;
mod create;
mod default_spec;
mod delete;
mod events;
mod exec;
mod find;
mod inspect;
mod lifecycle;
mod list;
mod oci_run;
mod oom;
mod options;
mod order;
mod run;
mod session;
mod stand_in;
mod stdio;
mod supervisor;
mod terminal;
mod time;
mod timings;
mod unicode;
mod unit;
mod update;
mod user;
mod values;
mod view;

use crate::cgroup::CgroupError;
use crate::check::{self, NoHypervisor, NotRoot, Report};
use crate::cleanup::CleanupError;
use crate::config::{Config, ConfigError, LogLevel};
use crate::hooks::HookError;
use crate::lease::LeaseError;
use crate::network::NetworkError;
use crate::spec::SpecError;
use crate::state::StateError;
use crate::supervise::SuperviseError;
use clap::Parser;
use clap::error::ErrorKind;
use client::TaskError;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::{ContainerId, SandboxId};
use nix::sys::signal::Signal;
use options::{Command, CommandLine, ListFormat, LogFormat, RuntimeOptions};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};
use supervisor::LogFile;

/// Exit status of run and exec when Coffer failed, and not the container: as docker and podman have it.
const FAILED: u8 = 125;
/// Exit status of exec in the forms of runc.
const NO_EXEC: u8 = 255;
/// Exit status for a command that does not exist, as runc has it.
const NO_COMMAND: u8 = 3;
/// Exit status of the other commands when they failed.
const REFUSED: u8 = 1;
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
    NotRoot(#[from] NotRoot),
    #[error(transparent)]
    NoHypervisor(#[from] NoHypervisor),
    #[error("the guest image can't be used: {0}")]
    GuestImage(String),
    /// Engines look for these words.
    #[error("container does not exist: there is no {id} in {root:?}")]
    NoSandbox { id: SandboxId, root: PathBuf },
    #[error("sandbox {id} exists already; coffer delete removes it")]
    Exists { id: SandboxId },
    #[error("sandbox {id} has no container of that name, but: {names}")]
    NoContainer { id: SandboxId, names: String },
    #[error("container with given ID already exists: {id}")]
    ContainerExists { id: ContainerId },
    #[error(
        "the VM of container {id} still runs for {other}, which joined its network; stop {other} first"
    )]
    NetworkHeld { id: ContainerId, other: ContainerId },
    #[error("cannot delete container {id} that is not stopped: {status}")]
    Running {
        id: ContainerId,
        status: &'static str,
    },
    #[error(
        "sandbox {id} was not started with --detach, so its output was not kept; --supervisor prints its log"
    )]
    NotDetached { id: SandboxId },
    /// The container is not in the state for it. Engines look for the words.
    #[error("{what}: {id}")]
    Refused { what: &'static str, id: ContainerId },
    #[error("{what} is not supported")]
    Unsupported { what: &'static str },
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Console(#[from] console::ConsoleError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    View(#[from] view::ViewError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The words of the process that stands for the container.
    #[error("{message}")]
    StandIn { message: String, status: Option<u8> },
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
    /// None where the command decides.
    fn exit_status(&self) -> Option<u8> {
        Some(match self {
            Self::StandIn { status, .. } => return *status,
            Self::Task(TaskError::Exec { kind, .. }) => kind.exit_status(),
            Self::Interrupted(signal) => u8::try_from(128 + *signal as i32).unwrap_or(FAILED),
            _ => return None,
        })
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    if let Some(word) = unicode::misfit(std::env::args_os()) {
        eprintln!("coffer: the argument {word:?} is not UTF-8");
        return ExitCode::from(FAILED);
    }
    let line = match CommandLine::try_parse() {
        Ok(line) => line,
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            return ExitCode::from(FAILED);
        }
        Err(error) if error.use_stderr() => {
            eprintln!("coffer: {}", usage(&error));
            return ExitCode::from(usage_status(&error));
        }
        Err(help) => {
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
    };
    let failed = line.command.failure_status();
    let runtime = line.global.runtime.clone();
    match execute(line) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let message = chain(&error);
            eprintln!("coffer: {message}");
            write_error_log(&runtime, &message);
            // Only commands that end with a program's status have more than one.
            ExitCode::from(match failed {
                REFUSED => REFUSED,
                failed => error.exit_status().unwrap_or(failed),
            })
        }
    }
}

/// What is wrong with the command line, in one line: engines show it to their users.
fn usage(error: &clap::Error) -> String {
    let text = error.to_string();
    let said = text.split("\n\nUsage:").next().unwrap_or(&text);
    let said = said
        .split("\n\nFor more information")
        .next()
        .unwrap_or(said);
    let words: Vec<_> = said
        .trim_start_matches("error: ")
        .split_whitespace()
        .collect();
    format!("{}; --help shows what is taken", words.join(" "))
}

/// The line could not be parsed, so the command is taken to be the first word.
fn usage_status(error: &clap::Error) -> u8 {
    if error.kind() == ErrorKind::InvalidSubcommand {
        return NO_COMMAND;
    }
    let command = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    match command.as_deref() {
        Some("run" | "exec") => FAILED,
        _ => REFUSED,
    }
}

/// Where an engine wants to read why a command failed: one line for each failure.
fn write_error_log(options: &RuntimeOptions, message: &str) {
    let Some(path) = &options.log else { return };
    let now = time::rfc3339(SystemTime::now());
    let line = match options.log_format {
        LogFormat::Json => {
            serde_json::json!({"level": "error", "msg": message, "time": now}).to_string()
        }
        LogFormat::Text => format!("time={now:?} level=error msg={message:?}"),
    };
    let file = fs::File::options().append(true).create(true).open(path);
    let written =
        file.and_then(|mut file| io::Write::write_all(&mut file, (line + "\n").as_bytes()));
    if let Err(error) = written {
        eprintln!("coffer: can't write the log {path:?}: {error}");
    }
}

fn execute(line: CommandLine) -> Result<u8, Error> {
    let stand_in = match &line.command {
        Command::StandIn(options) => match stand_in::prepare(options) {
            None => return Ok(REFUSED),
            prepared => prepared,
        },
        _ => None,
    };
    let supervise = matches!(line.command, Command::Supervise(_));
    if supervise || matches!(line.command, Command::Reap(_)) {
        let failed = |source| Error::Io {
            what: "can't leave the caller's session".into(),
            source,
        };
        supervisor::daemonize().map_err(failed)?;
    }
    if let Command::Supervise(options) = &line.command
        && let Some(caller) = options.beside
    {
        unit::enter(caller).map_err(|source| Error::Io {
            what: format!("can't enter the namespaces of process {caller}"),
            source,
        })?;
    }
    let mut config = Config::load(line.global.config.as_deref())?;
    let variable = std::env::var_os(ROOT_VARIABLE)
        .filter(|root| !root.is_empty())
        .map(PathBuf::from);
    if let Some(root) = line.global.root.or(variable) {
        config.root = root;
    }
    let root = std::path::absolute(&config.root).and_then(unicode::path);
    config.root = root.map_err(|source| Error::Io {
        what: format!("the state root {:?} can't be used", config.root),
        source,
    })?;
    config.log_level = line.global.log_level.unwrap_or(config.log_level);
    if line.global.runtime.debug {
        config.log_level = config.log_level.max(LogLevel::Debug);
    }
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
    let result = match stand_in {
        Some(prepared) => stand_in::run(&runtime, config, prepared),
        None => runtime.block_on(dispatch(&config, line.command, log)),
    };
    // A thread may still sit in a read of standard input.
    runtime.shutdown_background();
    result
}

async fn dispatch(config: &Config, command: Command, log: &'static LogFile) -> Result<u8, Error> {
    match command {
        Command::Run(options) => return run::run(config, &options).await,
        Command::Exec(options) => return exec::exec(config, &options).await,
        Command::Ps(options) => match &options.id {
            Some(id) => list::processes(config, id, options.format)?,
            None => {
                inspect::list(
                    config,
                    options.json.json || options.format == ListFormat::Json,
                )
                .await?;
            }
        },
        Command::List(options) if options.json.json => inspect::list(config, true).await?,
        Command::List(options) => list::list(config, &options).await?,
        Command::Events(options) => events::events(config, &options).await?,
        Command::Update(options) => update::update(config, &options).await?,
        Command::Features => println!("{}", crate::features::features()),
        Command::Spec(options) => bundle::write_spec(options.bundle.as_deref())?,
        Command::Create(options) => create::create(config, &options).await?,
        Command::Start(target) => lifecycle::start(config, &target.id).await?,
        Command::Kill(options) => lifecycle::kill(config, &options).await?,
        Command::State(target) => inspect::state(config, &target.id).await?,
        Command::Delete(options) => {
            delete::delete(config, &options.target.id, options.force).await?;
        }
        Command::Stats(options) => inspect::stats(config, &options).await?,
        Command::Logs(options) => inspect::logs(config, &options)?,
        Command::Console(target) => inspect::console(config, &target.id)?,
        Command::Pause(target) => lifecycle::pause(config, &target.id).await?,
        Command::Resume(target) => lifecycle::resume(config, &target.id).await?,
        Command::Checkpoint(_) => return Err(Error::Unsupported { what: "checkpoint" }),
        Command::Restore(_) => return Err(Error::Unsupported { what: "restore" }),
        Command::Exhaust(options) => {
            oom::take_memory(&options.cgroup).map_err(|source| Error::Io {
                what: "can't take memory".into(),
                source,
            })?;
        }
        Command::StandIn(_) => unreachable!("it is not dispatched"),
        Command::Check(options) => return Ok(check(config, options.json)),
        Command::Version(options) => version(config, options.json),
        Command::Supervise(options) => supervisor::serve(log, &config.root, &options).await?,
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
    if config.log_level > LogLevel::Info {
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
    fn the_command_lines_of_engines_are_taken() {
        for line in [
            "--log-format=json --log F create --bundle B --pid-file P --no-pivot --no-new-keyring --console-socket S ID",
            "--systemd-cgroup --root=/r create ID --bundle=B --preserve-fds 0",
            "exec --pid-file P --process F --detach --tty --console-socket S ID",
            "exec -d --console-socket=S --tty --pid-file=P ID sh -c x --bundle",
            "--debug exec --env k=v ID -- ls -l",
            "exec --process F ID",
            "start ID --root /r",
            "--rootless=false state ID",
            "--rootless state ID",
            "kill -a ID 9",
            "kill --all ID SIGRTMIN+1",
            "kill ID",
            "delete --force ID",
            "update --resources=- ID",
            "update --resources - ID",
            "update --memory -1 --cpu-share 512 ID",
            "ps --format json ID",
            "list --format=json",
            "list -q",
            "events --stats ID",
            "events --interval=5s ID",
            "run --bundle B --pid-file P --detach ID",
            "checkpoint --help",
            "restore --detach --image-path C --tcp-established ID",
            "features",
        ] {
            let parsed = CommandLine::try_parse_from(["coffer"].into_iter().chain(line.split(' ')));
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
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
            chain(&error),
            "can't write \"/x\": No space left on device (os error 28)"
        );
        assert_eq!(
            (
                error.exit_status(),
                Error::Interrupted(Signal::SIGINT).exit_status()
            ),
            (None, Some(130))
        );
    }
}
