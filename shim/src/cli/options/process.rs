//! Options of `run` and `exec`, which have a process in the foreground.

use super::{CompatibleOptions, DetachedOptions, Target};
use crate::cli::values::{Cpus, MemorySize, Ulimit, Volume, parse_env, parse_pair};
use crate::config::HypervisorChoice;
use clap::Args;
use coffer_proto::ids::SandboxId;
use std::path::PathBuf;

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
pub(in crate::cli) struct RunOptions {
    #[command(flatten)]
    pub(in crate::cli) source: SourceOptions,
    /// Name of the sandbox and its container [default: twelve random digits]
    #[arg(long, visible_alias = "id", value_name = "NAME")]
    pub(in crate::cli) name: Option<SandboxId>,
    /// Return when the container runs, and print its name; it stays until coffer delete
    #[arg(long, short)]
    pub(in crate::cli) detach: bool,
    /// With --detach: remove everything when the container ends
    #[arg(long)]
    pub(in crate::cli) rm: bool,
    /// Who runs the VM [default: auto]
    #[arg(long, value_name = "WHO")]
    pub(in crate::cli) hypervisor: Option<HypervisorChoice>,
    /// Print when each step of the boot was done, on stderr
    #[arg(long)]
    pub(in crate::cli) timings: bool,
    /// Print the timings as JSON
    #[arg(long, requires = "timings")]
    pub(in crate::cli) json: bool,
    /// With a bundle and a name: keep the container when it has ended
    #[arg(long, requires = "bundle")]
    pub(in crate::cli) keep: bool,
    #[command(flatten)]
    pub(in crate::cli) detached: DetachedOptions,
    #[command(flatten)]
    pub(in crate::cli) compatible: CompatibleOptions,
    #[command(flatten)]
    pub(in crate::cli) container: ContainerOptions,
}

/// What to run. Exactly one.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(in crate::cli) struct SourceOptions {
    /// OCI bundle directory; with a name after it, run as an OCI runtime does
    #[arg(long, value_name = "DIR", conflicts_with_all = ["netns", "volumes", "hostname", "read_only", "cap_add",
        "cap_drop", "ulimits", "sysctls", "command", "env", "workdir", "user", "tty"])]
    pub(in crate::cli) bundle: Option<PathBuf>,
    /// Root directory of the container
    #[arg(long, value_name = "DIR", conflicts_with_all = ["bundle", "image"])]
    pub(in crate::cli) rootfs: Option<PathBuf>,
    /// Image layout or archive, as PATH or PATH:NAME
    #[arg(value_name = "IMAGE")]
    pub(in crate::cli) image: Option<String>,
}

/// What shapes a container that has no bundle.
#[derive(Debug, Args)]
pub(in crate::cli) struct ContainerOptions {
    #[command(flatten)]
    pub(in crate::cli) process: ProcessOptions,
    /// Processors: the VM gets as many as are needed, and fractions are a quota
    #[arg(long, value_name = "NUMBER")]
    pub(in crate::cli) cpus: Option<Cpus>,
    /// Memory limit of the container, such as 512m; the VM gets it and some for its kernel
    #[arg(long, short, value_name = "SIZE")]
    pub(in crate::cli) memory: Option<MemorySize>,
    /// Show a file or directory of the host in the container
    #[arg(long = "volume", short, value_name = "SOURCE:DESTINATION[:ro]")]
    pub(in crate::cli) volumes: Vec<Volume>,
    /// Host name [default: the name of the sandbox]
    #[arg(long)]
    pub(in crate::cli) hostname: Option<String>,
    /// Network namespace whose interfaces the VM takes over [default: none, only loopback]
    #[arg(long, value_name = "PATH")]
    pub(in crate::cli) netns: Option<PathBuf>,
    /// Mount the container's root read-only
    #[arg(long)]
    pub(in crate::cli) read_only: bool,
    /// Give a capability, or all
    #[arg(long, value_name = "CAPABILITY")]
    pub(in crate::cli) cap_add: Vec<String>,
    /// Take a capability, or all
    #[arg(long, value_name = "CAPABILITY")]
    pub(in crate::cli) cap_drop: Vec<String>,
    /// Resource limit of the process
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]")]
    pub(in crate::cli) ulimits: Vec<Ulimit>,
    /// Kernel parameter of the container's namespaces
    #[arg(long = "sysctl", value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub(in crate::cli) sysctls: Vec<(String, String)>,
    /// Program and arguments instead of the image's
    #[arg(last = true, value_name = "COMMAND")]
    pub(in crate::cli) command: Vec<String>,
}

/// What shapes one process, of run and of exec.
#[derive(Debug, Args)]
pub(in crate::cli) struct ProcessOptions {
    /// Give the process a terminal
    #[arg(long, short)]
    pub(in crate::cli) tty: bool,
    /// Pass standard input on
    #[arg(long, short)]
    pub(in crate::cli) interactive: bool,
    /// Environment variable; KEY alone takes the caller's value
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = parse_env)]
    pub(in crate::cli) env: Vec<String>,
    /// Working directory
    #[arg(long, short, visible_alias = "cwd", value_name = "DIR")]
    pub(in crate::cli) workdir: Option<String>,
    /// User and group, by name or number
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub(in crate::cli) user: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  coffer exec web -- cat /proc/meminfo
  coffer exec -it --user 1000 --workdir /srv web -- sh
  coffer exec --detach --process process.json --pid-file pid web")]
pub(in crate::cli) struct ExecOptions {
    #[command(flatten)]
    pub(in crate::cli) process: ProcessOptions,
    /// OCI process block as JSON, instead of the options that shape one; standard input is passed on
    #[arg(long = "process", short = 'p', value_name = "FILE",
        conflicts_with_all = ["env", "workdir", "user", "caps", "additional_gids", "no_new_privs"])]
    pub(in crate::cli) block: Option<PathBuf>,
    /// Leave a process behind that stands for the new one
    #[arg(long, short)]
    pub(in crate::cli) detach: bool,
    #[command(flatten)]
    pub(in crate::cli) detached: DetachedOptions,
    /// Give a capability
    #[arg(long = "cap", short = 'c', value_name = "CAPABILITY")]
    pub(in crate::cli) caps: Vec<String>,
    /// Give a further group
    #[arg(long, short = 'g', value_name = "GID")]
    pub(in crate::cli) additional_gids: Vec<u32>,
    /// No privileges by execve(2)
    #[arg(long)]
    pub(in crate::cli) no_new_privs: bool,
    /// Also in a paused container; the process waits until that goes on
    #[arg(long)]
    pub(in crate::cli) ignore_paused: bool,
    #[command(flatten)]
    pub(in crate::cli) target: Target,
    /// Program and arguments
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        required_unless_present = "block",
        value_name = "COMMAND"
    )]
    pub(in crate::cli) command: Vec<String>,
}
