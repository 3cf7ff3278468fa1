//! The command line: every option of `coffer`, with the text of its help.

use super::values::{Cpus, MemorySize, SignalNumber, Ulimit, Volume, parse_env, parse_pair};
use crate::config::{HypervisorChoice, LogLevel};
use clap::{Args, Parser, Subcommand};
use coffer_proto::ids::SandboxId;
use std::path::PathBuf;

/// Runs containers in microVMs of their own.
#[derive(Debug, Parser)]
#[command(
    name = "coffer",
    version,
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
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a container in a new microVM
    Run(Box<RunOptions>),
    /// Run a further process in a running container
    Exec(ExecOptions),
    /// List sandboxes, also dead ones
    #[command(visible_alias = "list", visible_alias = "ls")]
    Ps(JsonOption),
    /// Send a signal to a container's init process
    Kill(KillOptions),
    /// Print a container's OCI state as JSON
    State(Target),
    /// Remove a sandbox and everything it has on the host
    Delete(DeleteOptions),
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
    /// The supervisor of one sandbox; its options come as JSON on standard input
    #[command(hide = true)]
    Supervise(IdOption),
    /// Waits for a container's end and deletes its sandbox; started by run --detach --rm
    #[command(hide = true)]
    Reap(IdOption),
}

#[derive(Debug, Args)]
pub(super) struct JsonOption {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Target {
    /// The sandbox
    pub(super) id: SandboxId,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The container is one of
  a bundle         --bundle DIR: an OCI bundle, its config.json as it is
  a root           --rootfs DIR: run in this directory, and write to it
  an image         IMAGE: an OCI image layout or docker archive (docker save, podman save), directory or tar;
                   unpacked below the state root for this one run

Without --detach the sandbox lives as long as the command: everything is removed at the end.

Examples:
  coffer run --rootfs ./debian --timings -- cat /etc/os-release
  coffer run --cpus 2 --memory 1g --env MODE=test ./image.tar -- make test
  coffer run --hypervisor qemu -it --rootfs ./busybox -- sh
  coffer run -d --name db --netns /run/netns/db oci:./postgres:16
  skopeo copy docker://alpine oci:alpine && coffer run alpine -- apk --version")]
pub(super) struct RunOptions {
    #[command(flatten)]
    pub(super) source: SourceOptions,
    /// Name of the sandbox and its container [default: twelve random digits]
    #[arg(long, visible_alias = "id", value_name = "NAME")]
    pub(super) name: Option<SandboxId>,
    /// Return when the container runs, and print its name; it stays until coffer delete
    #[arg(long, short)]
    pub(super) detach: bool,
    /// With --detach: remove everything when the container ends
    #[arg(long)]
    pub(super) rm: bool,
    /// Who runs the VM [default: auto]
    #[arg(long, value_name = "WHO")]
    pub(super) hypervisor: Option<HypervisorChoice>,
    /// Print when each step of the boot was done, on stderr
    #[arg(long)]
    pub(super) timings: bool,
    /// Print the timings as JSON
    #[arg(long, requires = "timings")]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) container: ContainerOptions,
}

/// What to run. Exactly one.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct SourceOptions {
    /// OCI bundle directory
    #[arg(long, value_name = "DIR", conflicts_with_all = ["netns", "volumes", "hostname", "read_only", "cap_add",
        "cap_drop", "ulimits", "sysctls", "command", "env", "workdir", "user", "tty"])]
    pub(super) bundle: Option<PathBuf>,
    /// Root directory of the container
    #[arg(long, value_name = "DIR")]
    pub(super) rootfs: Option<PathBuf>,
    /// Image layout or archive, as PATH or PATH:NAME
    #[arg(value_name = "IMAGE")]
    pub(super) image: Option<String>,
}

/// What shapes a container that has no bundle.
#[derive(Debug, Args)]
pub(super) struct ContainerOptions {
    #[command(flatten)]
    pub(super) process: ProcessOptions,
    /// Processors: the VM gets as many as are needed, and fractions are a quota
    #[arg(long, value_name = "NUMBER")]
    pub(super) cpus: Option<Cpus>,
    /// Memory limit of the container, such as 512m; the VM gets it and some for its kernel
    #[arg(long, short, value_name = "SIZE")]
    pub(super) memory: Option<MemorySize>,
    /// Show a file or directory of the host in the container
    #[arg(long = "volume", short, value_name = "SOURCE:DESTINATION[:ro]")]
    pub(super) volumes: Vec<Volume>,
    /// Host name [default: the name of the sandbox]
    #[arg(long)]
    pub(super) hostname: Option<String>,
    /// Network namespace whose interfaces the VM takes over [default: none, only loopback]
    #[arg(long, value_name = "PATH")]
    pub(super) netns: Option<PathBuf>,
    /// Mount the container's root read-only
    #[arg(long)]
    pub(super) read_only: bool,
    /// Give a capability, or all
    #[arg(long, value_name = "CAPABILITY")]
    pub(super) cap_add: Vec<String>,
    /// Take a capability, or all
    #[arg(long, value_name = "CAPABILITY")]
    pub(super) cap_drop: Vec<String>,
    /// Resource limit of the process
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]")]
    pub(super) ulimits: Vec<Ulimit>,
    /// Kernel parameter of the container's namespaces
    #[arg(long = "sysctl", value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub(super) sysctls: Vec<(String, String)>,
    /// Program and arguments instead of the image's
    #[arg(last = true, value_name = "COMMAND")]
    pub(super) command: Vec<String>,
}

/// What shapes one process, of run and of exec.
#[derive(Debug, Args)]
pub(super) struct ProcessOptions {
    /// Give the process a terminal
    #[arg(long, short)]
    pub(super) tty: bool,
    /// Pass standard input on
    #[arg(long, short)]
    pub(super) interactive: bool,
    /// Environment variable; KEY alone takes the caller's value
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = parse_env)]
    pub(super) env: Vec<String>,
    /// Working directory
    #[arg(long, short, value_name = "DIR")]
    pub(super) workdir: Option<String>,
    /// User and group, by name or number
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub(super) user: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  coffer exec web -- cat /proc/meminfo
  coffer exec -it --user 1000 --workdir /srv web -- sh")]
pub(super) struct ExecOptions {
    #[command(flatten)]
    pub(super) process: ProcessOptions,
    #[command(flatten)]
    pub(super) target: Target,
    /// Program and arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(super) command: Vec<String>,
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
pub(super) struct IdOption {
    #[arg(long)]
    pub(super) id: SandboxId,
}
