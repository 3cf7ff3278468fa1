//! Capabilities of a container: podman's defaults, more or less.

use super::SpecError;
use crate::cli::options::ContainerOptions;
use std::collections::BTreeSet;

/// Podman's default capabilities: what programs in images use, and nothing that reaches out of a container.
pub(super) const DEFAULT_CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// The names that a container of these options has.
pub(super) fn of(options: &ContainerOptions) -> Result<BTreeSet<String>, SpecError> {
    let all = |names: &[String]| names.iter().any(|name| name.eq_ignore_ascii_case("all"));
    let mut set: BTreeSet<String> = DEFAULT_CAPABILITIES
        .iter()
        .map(ToString::to_string)
        .collect();
    if all(&options.cap_drop) {
        set.clear();
    }
    if all(&options.cap_add) {
        set.extend(CAPABILITIES.iter().map(|name| format!("CAP_{name}")));
    }
    let named = |names: &[String]| -> Result<Vec<String>, SpecError> {
        names
            .iter()
            .filter(|name| !name.eq_ignore_ascii_case("all"))
            .map(|name| capability(name))
            .collect()
    };
    for name in named(&options.cap_drop)? {
        set.remove(&name);
    }
    set.extend(named(&options.cap_add)?);
    Ok(set)
}

/// All of Linux 6.12, in the order of their numbers.
pub(super) const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// `net_admin` and `CAP_NET_ADMIN` are the same.
pub(in crate::cli) fn capability(name: &str) -> Result<String, SpecError> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let known = CAPABILITIES.contains(&short);
    if known {
        Ok(format!("CAP_{short}"))
    } else {
        Err(SpecError::Capability(name.into()))
    }
}
