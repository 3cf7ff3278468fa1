//! The command line: every option of `coffer`, with the text of its help.

mod process;

pub(super) use process::{ContainerOptions, ExecOptions, RunOptions, SourceOptions};

use super::inspect::OCI_VERSION;
use super::values::{Limit, SignalNumber, parse_duration};
use crate::config::LogLevel;
use clap::{Args, Parser, Subcommand};
use coffer_proto::ids::SandboxId;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

/// What `--version` prints after the name, in the lines that engines know from runc. A build that knows its commit says it.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let commit = option_env!("COFFER_COMMIT").unwrap_or("unknown");
    let version = env!("CARGO_PKG_VERSION");
    format!("version {version}\ncommit: {commit}\nspec: {OCI_VERSION}")
});

/// Runs containers in microVMs of their own.
#[derive(Debug, Parser)]
#[command(
    name = "coffer",
    version = VERSION.as_str(),
    propagate_version = true,
    max_term_width = 100,
    after_help = "\
Examples:
  coffer check
  coffer run --rootfs ./busybox -- uname -r
  coffer run -it oci:./alpine -- sh
  coffer run -d --name web --memory 512m --volume $PWD/site:/srv:ro ./nginx.tar
  coffer exec -it web -- sh
  coffer delete --force web

Exit status: that of the container's process; 128+n when signal n ended it;
126 and 127 when its program can't be executed or found; 125 when Coffer failed."
)]
pub(super) struct CommandLine {
    #[command(flatten)]
    pub(super) global: GlobalOptions,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Args)]
pub(super) struct GlobalOptions {
    /// Directory of all sandboxes' state [default: $COFFER_ROOT, else /run/coffer]
    #[arg(long, global = true, value_name = "DIR")]
    pub(super) root: Option<PathBuf>,
    /// Configuration file [default: /etc/coffer/coffer.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Log lines to keep: on stderr, and in the supervisor's log for run
    #[arg(long, global = true, value_name = "LEVEL")]
    pub(super) log_level: Option<LogLevel>,
    #[command(flatten)]
    pub(super) runtime: RuntimeOptions,
}

/// Options that container engines give every OCI runtime, as runc has them.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options for container engines")]
pub(super) struct RuntimeOptions {
    /// Also write an error to this file
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) log: Option<PathBuf>,
    /// How it is written there
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
    /// Log debug lines
    #[arg(long, global = true)]
    pub(super) debug: bool,
    /// Taken and not needed: the form of linux.cgroupsPath tells who made it
    #[arg(long, global = true)]
    pub(super) systemd_cgroup: bool,
    /// Only false and auto: VMs need root
    #[arg(long, global = true, value_name = "true|false|auto", num_args = 0..=1, require_equals = true,
        default_missing_value = "true")]
    pub(super) rootless: Option<String>,
}

/// Form of the file that `--log` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a container in a new microVM
    Run(Box<RunOptions>),
    /// Run a further process in a running container
    Exec(ExecOptions),
    /// List sandboxes, also dead ones; or, of one container, the processes of the host that stand for it
    #[command(visible_alias = "ls")]
    Ps(PsOptions),
    /// List containers
    List(ListOptions),
    /// Create a container of an OCI bundle, in a new microVM or in that of its pod
    Create(CreateOptions),
    /// Let a created container run its program
    Start(Target),
    /// Send a signal to a container's init process
    Kill(KillOptions),
    /// Print a container's OCI state as JSON
    State(Target),
    /// Remove a container, and with the last one its sandbox
    Delete(DeleteOptions),
    /// Print what a container uses as an OCI runtime does, and when it runs out of memory
    Events(EventsOptions),
    /// Change the limits of a running container
    Update(Box<UpdateOptions>),
    /// Print what of the OCI runtime specification is supported, as JSON
    Features,
    /// Write a config.json to begin with
    Spec(SpecOptions),
    /// Print what a container uses
    Stats(StatsOptions),
    /// Print the output of a detached container
    Logs(LogsOptions),
    /// Print the console of a sandbox's guest: its kernel's last messages
    Console(Target),
    /// Freeze all processes of a container
    Pause(Target),
    /// Let a paused container go on
    Resume(Target),
    /// Check whether this machine can run VMs, and how
    Check(JsonOption),
    /// Print the versions of Coffer and its guest image
    Version(JsonOption),
    /// Not supported
    #[command(disable_help_flag = true)]
    Checkpoint(Anything),
    /// Not supported
    #[command(disable_help_flag = true)]
    Restore(Anything),
    /// Runs out of memory on purpose; started by a stand-in whose container did
    #[command(hide = true)]
    Exhaust(ExhaustOptions),
    /// Stands for a process of the guest; started by create and exec
    #[command(hide = true)]
    StandIn(StandInOptions),
    /// The supervisor of one sandbox; its options come as JSON on standard input
    #[command(hide = true)]
    Supervise(SuperviseOptions),
    /// Waits for a container's end and deletes its sandbox; started by run --detach --rm
    #[command(hide = true)]
    Reap(IdOption),
}

impl Command {
    /// Exit status when Coffer failed: of its own for the two that end with a program's.
    pub(super) fn failure_status(&self) -> u8 {
        match self {
            // As runc has it, for those who use it so.
            Self::Exec(options) if options.block.is_some() || options.detach => super::NO_EXEC,
            Self::Run(_) | Self::Exec(_) => super::FAILED,
            _ => super::REFUSED,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct JsonOption {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Target {
    /// The container, or the sandbox of one
    pub(super) id: SandboxId,
}

#[derive(Debug, Args)]
pub(super) struct CreateOptions {
    /// Directory of the OCI bundle [default: the current one]
    #[arg(long, short, value_name = "DIR")]
    pub(super) bundle: Option<PathBuf>,
    #[command(flatten)]
    pub(super) detached: DetachedOptions,
    #[command(flatten)]
    pub(super) compatible: CompatibleOptions,
    #[command(flatten)]
    pub(super) target: Target,
}

/// What a caller wants of a process that stays behind.
#[derive(Debug, Default, Args)]
pub(super) struct DetachedOptions {
    /// Where to write the pid of the process that stands for the container
    #[arg(long, value_name = "FILE")]
    pub(super) pid_file: Option<PathBuf>,
    /// Unix socket that is sent the terminal's master
    #[arg(long, value_name = "SOCKET")]
    pub(super) console_socket: Option<PathBuf>,
    /// Descriptors from 3 on for the process; none can be passed into a VM
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub(super) preserve_fds: u32,
}

/// Arguments of a command that is not there, so that whoever probes for it gets the answer.
#[derive(Debug, Args)]
pub(super) struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(super) words: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct ExhaustOptions {
    pub(super) cgroup: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct StandInOptions {
    /// Inherited socket on which the order comes
    #[arg(long)]
    pub(super) control: i32,
}

/// Options of runc that mean nothing here, and are taken all the same.
#[derive(Debug, Args)]
pub(super) struct CompatibleOptions {
    /// Taken and not needed: the guest has a root of its own
    #[arg(long)]
    pub(super) no_pivot: bool,
    /// Taken and not needed: keyrings of the host do not reach the guest
    #[arg(long)]
    pub(super) no_new_keyring: bool,
}

#[derive(Debug, Args)]
pub(super) struct KillOptions {
    #[command(flatten)]
    pub(super) target: Target,
    /// Number or name
    #[arg(default_value = "TERM")]
    pub(super) signal: SignalNumber,
    /// Signal every process of the container
    #[arg(long, short)]
    pub(super) all: bool,
}

#[derive(Debug, Args)]
pub(super) struct DeleteOptions {
    /// Also when it runs, or its supervisor died; no error when there is none
    #[arg(long, short)]
    pub(super) force: bool,
    #[command(flatten)]
    pub(super) target: Target,
}

#[derive(Debug, Args)]
pub(super) struct PsOptions {
    #[command(flatten)]
    pub(super) json: JsonOption,
    /// Form of the list
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub(super) format: ListFormat,
    /// Only this container's processes
    pub(super) id: Option<SandboxId>,
    /// Taken for the sake of runc's callers, and not needed
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(super) ps_options: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct ListOptions {
    #[command(flatten)]
    pub(super) json: JsonOption,
    /// Form of the list
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub(super) format: ListFormat,
    /// Only the ids
    #[arg(long, short)]
    pub(super) quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum ListFormat {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub(super) struct EventsOptions {
    /// Once, and end
    #[arg(long)]
    pub(super) stats: bool,
    /// Time between two lines, such as 5s or 500ms
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    pub(super) interval: Duration,
    #[command(flatten)]
    pub(super) target: Target,
}

/// Options of update, as runc has them. What is not given stays.
#[derive(Debug, Args)]
pub(super) struct UpdateOptions {
    /// File with OCI resources as JSON, - for standard input; then nothing else counts
    #[arg(long, short, value_name = "FILE")]
    pub(super) resources: Option<PathBuf>,
    /// Weight of block I/O, 10 to 1000
    #[arg(long, value_name = "NUMBER")]
    pub(super) blkio_weight: Option<u16>,
    /// Period of the CPU quota in microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    pub(super) cpu_period: Option<u64>,
    /// CPU time per period in microseconds, -1 for no limit
    #[arg(long, value_name = "MICROSECONDS", allow_hyphen_values = true)]
    pub(super) cpu_quota: Option<i64>,
    /// CPU time that may be saved up, in microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    pub(super) cpu_burst: Option<u64>,
    /// CPU weight, 2 to 262144
    #[arg(long, visible_alias = "cpu-shares", value_name = "NUMBER")]
    pub(super) cpu_share: Option<u64>,
    /// CPUs to run on
    #[arg(long, value_name = "LIST")]
    pub(super) cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long, value_name = "LIST")]
    pub(super) cpuset_mems: Option<String>,
    /// Memory limit, such as 512m; -1 for none
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(super) memory: Option<Limit>,
    /// Memory that is kept when memory is short
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(super) memory_reservation: Option<Limit>,
    /// Memory and swap together
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(super) memory_swap: Option<Limit>,
    /// Number of processes, -1 for no limit
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub(super) pids_limit: Option<i64>,
    #[command(flatten)]
    pub(super) target: Target,
}

#[derive(Debug, Args)]
pub(super) struct SpecOptions {
    /// Directory for it [default: the current one]
    #[arg(long, short, value_name = "DIR")]
    pub(super) bundle: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct StatsOptions {
    #[command(flatten)]
    pub(super) json: JsonOption,
    #[command(flatten)]
    pub(super) target: Target,
}

#[derive(Debug, Args)]
pub(super) struct LogsOptions {
    /// The log of the sandbox's supervisor instead
    #[arg(long)]
    pub(super) supervisor: bool,
    #[command(flatten)]
    pub(super) target: Target,
}

#[derive(Debug, Args)]
pub(super) struct SuperviseOptions {
    #[arg(long)]
    pub(super) id: SandboxId,
    /// The process that asked systemd for this one, whose namespaces it is to be in
    #[arg(long)]
    pub(super) beside: Option<i32>,
}

#[derive(Debug, Args)]
pub(super) struct IdOption {
    #[arg(long)]
    pub(super) id: SandboxId,
}
