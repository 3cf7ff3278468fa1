//! The configuration file, `/etc/coffer/coffer.toml`. Everything has a default: no file is the usual case.
//!
//! `docs/configuration.md` has one row for every key here; a test compares them.

use crate::machine::{Hypervisor, SandboxOptions, UidRange};
use coffer_proto::ids::SandboxId;
use coffer_proto::limits::MAX_VCPUS;
use serde::Deserialize;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Read when it exists.
pub const DEFAULT_PATH: &str = "/etc/coffer/coffer.toml";
/// Where sandboxes live unless `--root`, `COFFER_ROOT` or the file say otherwise.
pub const DEFAULT_ROOT: &str = "/run/coffer";
/// Where the parts of Coffer are when they are not beside the running program.
const INSTALLED: &str = "/usr/lib/coffer";
/// The guest's kernel, its page tables and the agent fit; less does not boot.
pub const MIN_MEMORY_MIB: u32 = 64;
/// Guest-physical addresses end at 1 TiB in the machine's layout.
pub const MAX_MEMORY_MIB: u32 = 1 << 20;

/// What an error quotes of a line.
const QUOTED_CHARACTERS: usize = 80;

/// Why the configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("can't read the configuration {path:?}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the configuration {path:?} is not valid: line {number}, `{line}`: {message}")]
    Parse {
        path: PathBuf,
        number: usize,
        line: String,
        message: String,
    },
    #[error("the configuration {path:?} is not valid: {key} = {value} is not {expected}")]
    Value {
        path: PathBuf,
        key: &'static str,
        value: String,
        expected: String,
    },
}

/// Which program shall run VMs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum HypervisorChoice {
    /// coffer-vmm where KVM is backed by the processor, else QEMU.
    #[default]
    Auto,
    /// Coffer's own VMM. Needs KVM.
    CofferVmm,
    /// QEMU microvm, on KVM or by emulation.
    Qemu,
}

/// Log lines to keep.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// All settings.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// State of all sandboxes.
    pub root: PathBuf,
    pub hypervisor: HypervisorChoice,
    /// Virtual CPUs of a VM for which nobody asked for a number.
    pub vcpus: u8,
    /// Virtual CPUs up to which a pod's VM can grow while it runs; never more than the host has.
    pub max_vcpus: u8,
    /// Memory of a VM for which nobody asked for a size, in MiB.
    pub memory_mib: u32,
    /// Memory up to which a pod's VM can grow while it runs, in MiB; never more than the host has.
    pub max_memory_mib: u32,
    /// Added to a container's memory limit for the guest's kernel and agent, in MiB.
    pub memory_overhead_mib: u32,
    /// Programs of Coffer; None means beside the running one, else `/usr/lib/coffer`.
    pub libexec: Option<PathBuf>,
    /// Guest kernel; None means `vmlinux` in `libexec`.
    pub kernel: Option<PathBuf>,
    /// Guest initrd; None means `initrd` in `libexec`.
    pub initrd: Option<PathBuf>,
    /// Appended to the guest kernel's command line.
    pub kernel_params: Vec<String>,
    pub log_level: LogLevel,
    /// Guest kernel messages on the console, debug lines in the supervisor's log.
    pub debug: bool,
    /// First host uid for hypervisor processes; each running sandbox has its own.
    pub uid_first: u32,
    /// How many of them.
    pub uid_count: u32,
}

impl Default for Config {
    fn default() -> Self {
        let uids = UidRange::default();
        Self {
            root: DEFAULT_ROOT.into(),
            hypervisor: HypervisorChoice::Auto,
            vcpus: 1,
            max_vcpus: 8,
            memory_mib: 512,
            max_memory_mib: MAX_MEMORY_MIB,
            memory_overhead_mib: 128,
            libexec: None,
            kernel: None,
            initrd: None,
            kernel_params: Vec::new(),
            log_level: LogLevel::Info,
            debug: false,
            uid_first: uids.first,
            uid_count: uids.count,
        }
    }
}

impl Config {
    /// Reads the given file, or the default one if it is there.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, required) = (path.unwrap_or(Path::new(DEFAULT_PATH)), path.is_some());
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => {
                return Ok(Self::default());
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.into(),
                    source,
                });
            }
        };
        Self::parse(path, &text)
    }

    /// Parses a configuration that came from `path`, or from a containerd runtime's `options`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let parsed: Result<Self, _> = toml::from_str(text);
        let config = parsed.map_err(|error| parse_error(path, text, &error))?;
        let refuse = |key, value: String, expected: String| {
            Err(ConfigError::Value {
                path: path.into(),
                key,
                value,
                expected,
            })
        };
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return refuse(
                "vcpus",
                config.vcpus.to_string(),
                format!("between 1 and {MAX_VCPUS}"),
            );
        }
        if config.max_vcpus > MAX_VCPUS {
            return refuse(
                "max_vcpus",
                config.max_vcpus.to_string(),
                format!("at most {MAX_VCPUS}"),
            );
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&config.memory_mib) {
            let expected = format!("between {MIN_MEMORY_MIB} and {MAX_MEMORY_MIB}");
            return refuse("memory_mib", config.memory_mib.to_string(), expected);
        }
        if config.max_memory_mib > MAX_MEMORY_MIB {
            return refuse(
                "max_memory_mib",
                config.max_memory_mib.to_string(),
                format!("at most {MAX_MEMORY_MIB}"),
            );
        }
        // `--` would end the kernel's parameters and hand the rest to init.
        if let Some(bad) = config
            .kernel_params
            .iter()
            .find(|word| *word == "--" || word.contains(char::is_control))
        {
            return refuse(
                "kernel_params",
                format!("{bad:?}"),
                "a kernel parameter".into(),
            );
        }
        if config.uid_first == 0
            || config.uid_count == 0
            || config.uid_first.checked_add(config.uid_count).is_none()
        {
            let value = format!("{} and uid_count = {}", config.uid_first, config.uid_count);
            return refuse("uid_first", value, "a range of uids without root".into());
        }
        Ok(config)
    }

    /// Where the programs of Coffer are.
    pub fn libexec(&self) -> PathBuf {
        if let Some(directory) = &self.libexec {
            return directory.clone();
        }
        let beside = std::env::current_exe()
            .ok()
            .and_then(|program| Some(program.parent()?.to_owned()));
        beside
            .filter(|directory| directory.join("coffer-fsd").exists())
            .unwrap_or_else(|| INSTALLED.into())
    }

    pub fn kernel(&self) -> PathBuf {
        self.kernel
            .clone()
            .unwrap_or_else(|| self.libexec().join("vmlinux"))
    }

    pub fn initrd(&self) -> PathBuf {
        self.initrd
            .clone()
            .unwrap_or_else(|| self.libexec().join("initrd"))
    }

    /// What a sandbox of this configuration is; the caller changes what it was asked to.
    pub fn sandbox(&self, id: SandboxId, hypervisor: Hypervisor) -> SandboxOptions {
        SandboxOptions {
            id,
            root: self.root.clone(),
            hypervisor,
            vcpus: self.vcpus,
            max_vcpus: self.max_vcpus.min(host_cpus()),
            memory_mib: self.memory_mib,
            max_memory_mib: self.max_memory_mib.min(host_memory_mib()),
            overhead_mib: self.memory_overhead_mib,
            sized: false,
            kernel: self.kernel(),
            initrd: self.initrd(),
            kernel_params: self.kernel_params.clone(),
            libexec: self.libexec(),
            debug: self.debug,
            uids: UidRange {
                first: self.uid_first,
                count: self.uid_count,
            },
            cgroup: None,
            joins_cgroup: false,
            namespace: String::new(),
        }
    }
}

/// More virtual CPUs than these only wait for one another.
fn host_cpus() -> u8 {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    u8::try_from(count).unwrap_or(MAX_VCPUS)
}

/// A VM with more memory than the host would have its containers killed by the host, not by their limits.
fn host_memory_mib() -> u32 {
    let bytes = nix::sys::sysinfo::sysinfo().map_or(0, |info| info.ram_total());
    u32::try_from(bytes >> 20).unwrap_or(MAX_MEMORY_MIB)
}

/// What the parser says, in one line: callers show only one.
fn parse_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start);
    let before = text.get(..at).unwrap_or_default();
    let index = before.matches('\n').count();
    let line = text.lines().nth(index).unwrap_or_default();
    ConfigError::Parse {
        path: path.into(),
        number: index + 1,
        line: line.trim().chars().take(QUOTED_CHARACTERS).collect(),
        message: error.message().replace('\n', " "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let error = Config::parse(Path::new("test.toml"), text).unwrap_err();
        format!(
            "{error}: {}",
            std::error::Error::source(&error)
                .map(ToString::to_string)
                .unwrap_or_default()
        )
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(
            Config::parse(Path::new("x"), "").unwrap(),
            Config::default()
        );
        assert_eq!(
            Config::load(Some(Path::new("/dev/null"))).unwrap(),
            Config::default()
        );
    }

    #[test]
    fn all_keys_are_taken() {
        let text = r#"
            root = "/r"
            hypervisor = "coffer-vmm"
            vcpus = 2
            max_vcpus = 3
            memory_mib = 256
            max_memory_mib = 300
            memory_overhead_mib = 64
            libexec = "/l"
            kernel = "/k"
            initrd = "/i"
            kernel_params = ["a=b"]
            log_level = "debug"
            debug = true
            uid_first = 5
            uid_count = 6
        "#;
        let config = Config::parse(Path::new("x"), text).unwrap();
        let expected = Config {
            root: "/r".into(),
            hypervisor: HypervisorChoice::CofferVmm,
            vcpus: 2,
            max_vcpus: 3,
            memory_mib: 256,
            max_memory_mib: 300,
            memory_overhead_mib: 64,
            libexec: Some("/l".into()),
            kernel: Some("/k".into()),
            initrd: Some("/i".into()),
            kernel_params: vec!["a=b".into()],
            log_level: LogLevel::Debug,
            debug: true,
            uid_first: 5,
            uid_count: 6,
        };
        assert_eq!(config, expected);
        let options = config.sandbox(SandboxId::new("s").unwrap(), Hypervisor::CofferVmm);
        assert_eq!(
            (options.kernel, options.libexec, options.uids.first),
            ("/k".into(), "/l".into(), 5)
        );
    }

    #[test]
    fn unknown_keys_and_bad_values_are_named() {
        let typed = error("debug = true\nvcpus = \"two\"");
        assert!(
            typed.contains("line 2, `vcpus = \"two\"`") && !typed.contains('\n'),
            "{typed}"
        );
        assert!(error("vcpu = 1").contains("vcpu"));
        assert!(error("hypervisor = \"xen\"").contains("xen"));
        assert!(error("vcpus = 0").contains("vcpus = 0"));
        assert!(error("memory_mib = 1").contains("memory_mib = 1"));
        assert!(error("kernel_params = [\"--\"]").contains("kernel_params"));
        assert!(error("uid_first = 0").contains("uid_first"));
        assert!(error("uid_first = 4294967295").contains("uid_count"));
        let missing = Config::load(Some(Path::new("/no/such.toml"))).unwrap_err();
        assert!(missing.to_string().contains("/no/such.toml"));
    }

    #[test]
    fn every_key_has_a_row_in_the_documentation() {
        let page = include_str!("../../docs/configuration.md");
        let documented: Vec<_> = page
            .lines()
            .filter_map(|line| {
                line.strip_prefix("| `")?
                    .split_once('`')
                    .map(|(key, _)| key.to_owned())
            })
            .collect();
        // serde names all keys it knows when it meets one that it does not.
        let known = error("no_such_key = 1");
        let known: Vec<_> = known
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|key| *key != "no_such_key")
            .collect();
        let known: Vec<_> = known.into_iter().filter(|key| !key.contains(' ')).collect();
        assert!(known.len() > 10, "{known:?}");
        assert_eq!(documented, known);
    }
}
