//! Every field of the OCI spec is honoured or refused by its JSON name; nothing is dropped silently.
//!
//! This is where a spec enters the agent. What passes here can still fail in the kernel, with the step named.

use std::collections::HashSet;
use std::path::{Component, Path};

use oci_spec::runtime::{
    Linux, LinuxNamespaceType, LinuxSeccomp, LinuxSeccompAction, Process, Spec,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::mounts::Source;
use super::{Error, SharedNamespaces, affinity, capabilities, options, scheduling};

mod limits;
mod mounts;

pub use limits::resources;

/// `utsname` has no room for more.
const MAX_HOST_NAME: usize = 64;
/// Linux's lookup of one path.
const MAX_PATH: usize = 4096;

type Result<T = ()> = std::result::Result<T, Error>;

/// For a field that can't be honoured.
pub fn refuse<T>(field: impl Into<String>, reason: impl Into<String>) -> Result<T> {
    Err(Error::Refused {
        field: field.into(),
        reason: reason.into(),
    })
}

/// Refuses fields which are there and say something.
fn refuse_present(fields: &[(&str, bool)], reason: &str) -> Result {
    match fields.iter().find(|(_, present)| *present) {
        Some((field, _)) => refuse(*field, reason),
        None => Ok(()),
    }
}

/// Parses the JSON of an OCI object and refuses keys that this build doesn't know.
pub fn parse<T: DeserializeOwned + Serialize>(json: &[u8]) -> Result<T> {
    let given: Value =
        serde_json::from_slice(json).or_else(|error| refuse("JSON", error.to_string()))?;
    let parsed: T = serde_path_to_error::deserialize(&given)
        .or_else(|error| refuse(error.path().to_string(), error.inner().to_string()))?;
    let known = serde_json::to_value(&parsed).or_else(|e| refuse("JSON", e.to_string()))?;
    match unknown_key(&given, &known) {
        Some(path) => refuse(path, "is not known"),
        None => Ok(parsed),
    }
}

/// The first key of `given` that the parsed object doesn't have.
fn unknown_key(given: &Value, known: &Value) -> Option<String> {
    let below = |name: String, rest: String| {
        let dot = if rest.starts_with('[') || rest.is_empty() {
            ""
        } else {
            "."
        };
        format!("{name}{dot}{rest}")
    };
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            given.iter().find_map(|(key, value)| match known.get(key) {
                _ if value.is_null() => None,
                Some(other) => unknown_key(value, other).map(|rest| below(key.clone(), rest)),
                None => Some(key.clone()),
            })
        }
        (Value::Array(given), Value::Array(known)) => {
            given
                .iter()
                .zip(known)
                .enumerate()
                .find_map(|(i, (value, other))| {
                    unknown_key(value, other).map(|rest| below(format!("[{i}]"), rest))
                })
        }
        _ => None,
    }
}

/// Checks the whole spec of a container.
pub fn spec(id: &str, spec: &Spec, pod: &SharedNamespaces) -> Result {
    if spec.version().split('.').next() != Some("1") {
        return refuse(
            "ociVersion",
            format!("{:?} is not a 1.x version", spec.version()),
        );
    }
    let foreign = [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
    ];
    refuse_present(&foreign, "belongs to another platform")?;
    let Some(root) = spec.root() else {
        return refuse("root", "is missing");
    };
    path("root.path", root.path())?;
    if !matches!(Source::of(id, root.path()), Some(Source::Share(_))) {
        let reason = format!("{} is not in this container's share", root.path().display());
        return refuse("root.path", reason);
    }
    for (i, entry) in spec.mounts().iter().flatten().enumerate() {
        mounts::mount(id, i, entry)?;
    }
    let Some(block) = spec.process() else {
        return refuse("process", "is missing");
    };
    process(block, "process.")?;
    for (field, name) in [
        ("hostname", spec.hostname()),
        ("domainname", spec.domainname()),
    ] {
        if name
            .as_ref()
            .is_some_and(|n| n.len() > MAX_HOST_NAME || n.contains('\0'))
        {
            return refuse(field, "is longer than 64 bytes or has a NUL in it");
        }
    }
    hooks(spec)?;
    match spec.linux() {
        Some(platform) => linux(id, platform, pod),
        None => refuse("linux", "is missing"),
    }
}

/// A path that the container's root resolves: absolute, and without `..`, which no engine writes.
fn path(field: impl Into<String>, path: &Path) -> Result {
    let field = field.into();
    let bytes = path.as_os_str().as_encoded_bytes();
    if !path.is_absolute() {
        return refuse(field, format!("{} is not absolute", path.display()));
    }
    if bytes.contains(&0) || bytes.len() >= MAX_PATH {
        return refuse(field, "has a NUL in it or is longer than 4095 bytes");
    }
    if path.components().any(|c| c == Component::ParentDir) {
        return refuse(field, format!("{} has .. in it", path.display()));
    }
    Ok(())
}

/// Checks the process block of a container or of a further process; `prefix` is "process." or "".
pub fn process(process: &Process, prefix: &str) -> Result {
    let field = |name: &str| format!("{prefix}{name}");
    let labelled = |label: &Option<String>| {
        label
            .as_deref()
            .is_some_and(|l| !l.is_empty() && l != "unconfined")
    };
    let unsupported = [
        (
            &*field("user.username"),
            process.user().username().is_some(),
        ),
        (&*field("commandLine"), process.command_line().is_some()),
        (
            &*field("apparmorProfile"),
            labelled(process.apparmor_profile()),
        ),
        (&*field("selinuxLabel"), labelled(process.selinux_label())),
    ];
    refuse_present(&unsupported, "is not supported in the guest")?;
    program(process, prefix)?;
    if process
        .oom_score_adj()
        .is_some_and(|score| !(-1000..=1000).contains(&score))
    {
        return refuse(field("oomScoreAdj"), "is not between -1000 and 1000");
    }
    rlimits(process, prefix)?;
    if let Some(set) = process.capabilities() {
        capabilities::parse(set)
            .or_else(|(name, reason)| refuse(field(&format!("capabilities.{name}")), reason))?;
    }
    if let Some(affinity) = process.exec_cpu_affinity() {
        for (name, list) in [
            ("initial", affinity.initial()),
            ("final", affinity.cpu_affinity_final()),
        ] {
            if let Some(list) = list {
                affinity::parse(list)
                    .or_else(|reason| refuse(field(&format!("execCPUAffinity.{name}")), reason))?;
            }
        }
    }
    scheduling::check(process).or_else(|(name, reason)| refuse(field(name), reason))
}

fn program(process: &Process, prefix: &str) -> Result {
    let field = |name: &str| format!("{prefix}{name}");
    let args = process.args().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return refuse(field("args"), "names no program");
    }
    if let Some(i) = args.iter().position(|arg| arg.contains('\0')) {
        return refuse(field(&format!("args[{i}]")), "has a NUL in it");
    }
    let env = process.env().as_deref().unwrap_or_default();
    if let Some(i) = env
        .iter()
        .position(|e| e.contains('\0') || e.find('=').is_none_or(|at| at == 0))
    {
        return refuse(
            field(&format!("env[{i}]")),
            format!("{:?} is not NAME=VALUE", env[i]),
        );
    }
    path(field("cwd"), process.cwd())?;
    if let Some(size) = process.console_size()
        && (size.height() > u64::from(u16::MAX) || size.width() > u64::from(u16::MAX))
    {
        return refuse(field("consoleSize"), "is larger than 65535");
    }
    Ok(())
}

fn rlimits(process: &Process, prefix: &str) -> Result {
    let field = |name: &str| format!("{prefix}{name}");
    let mut seen = HashSet::new();
    for (i, limit) in process.rlimits().iter().flatten().enumerate() {
        if limit.soft() > limit.hard() {
            return refuse(
                field(&format!("rlimits[{i}].soft")),
                "is above the hard limit",
            );
        }
        if !seen.insert(limit.typ().to_string()) {
            let reason = format!("{} is there twice", limit.typ());
            return refuse(field(&format!("rlimits[{i}].type")), reason);
        }
    }
    Ok(())
}

#[allow(
    deprecated,
    reason = "prestart is deprecated in the OCI spec, but engines still write it"
)]
fn hooks(spec: &Spec) -> Result {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    let there = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|l| !l.is_empty());
    let on_the_host = [
        ("hooks.prestart", there(hooks.prestart())),
        ("hooks.createRuntime", there(hooks.create_runtime())),
        ("hooks.poststart", there(hooks.poststart())),
        ("hooks.poststop", there(hooks.poststop())),
    ];
    refuse_present(&on_the_host, "runs on the host, not in the guest")?;
    for (name, list) in [
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
    ] {
        for (i, hook) in list.iter().flatten().enumerate() {
            path(format!("hooks.{name}[{i}].path"), hook.path())?;
            if hook.timeout().is_some_and(|seconds| seconds <= 0) {
                return refuse(
                    format!("hooks.{name}[{i}].timeout"),
                    "is not greater than 0",
                );
            }
        }
    }
    Ok(())
}

fn linux(id: &str, linux: &Linux, pod: &SharedNamespaces) -> Result {
    let unsupported = [
        ("linux.intelRdt", linux.intel_rdt().is_some()),
        ("linux.memoryPolicy", linux.memory_policy().is_some()),
        (
            "linux.netDevices",
            linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()),
        ),
        (
            "linux.mountLabel",
            linux.mount_label().as_ref().is_some_and(|l| !l.is_empty()),
        ),
        (
            "linux.personality.flags",
            linux
                .personality()
                .as_ref()
                .is_some_and(|p| p.flags().as_ref().is_some_and(|f| !f.is_empty())),
        ),
    ];
    refuse_present(&unsupported, "is not supported in the guest")?;
    namespaces(linux, pod)?;
    if let Some(cgroup) = linux.cgroups_path()
        && cgroup.file_name().is_some_and(|name| name != id)
    {
        let reason = format!("{} doesn't end in the container's id", cgroup.display());
        return refuse("linux.cgroupsPath", reason);
    }
    if let Some(name) = linux
        .rootfs_propagation()
        .as_deref()
        .filter(|name| !name.is_empty())
        && options::propagation(name).is_none()
    {
        return refuse("linux.rootfsPropagation", format!("{name:?} is not known"));
    }
    for (key, value) in linux.sysctl().iter().flatten() {
        if !is_namespaced_sysctl(key) || value.contains('\0') {
            return refuse(
                format!("linux.sysctl.{key}"),
                "is not a sysctl of the pod's namespaces",
            );
        }
    }
    paths_and_devices(linux)?;
    if let Some(filter) = linux.seccomp() {
        seccomp(filter)?;
    }
    match linux.resources() {
        Some(limits) => resources(limits, "linux.resources."),
        None => Ok(()),
    }
}

fn paths_and_devices(linux: &Linux) -> Result {
    let masked = linux
        .masked_paths()
        .iter()
        .flatten()
        .map(|path| ("linux.maskedPaths", path));
    let readonly = linux
        .readonly_paths()
        .iter()
        .flatten()
        .map(|path| ("linux.readonlyPaths", path));
    for (field, entry) in masked.chain(readonly) {
        path(field, Path::new(entry))?;
    }
    for (i, device) in linux.devices().iter().flatten().enumerate() {
        path(format!("linux.devices[{i}].path"), device.path())?;
        super::devices::Device::of_spec(device)
            .or_else(|reason| refuse(format!("linux.devices[{i}]"), reason))?;
    }
    Ok(())
}

fn namespaces(linux: &Linux, pod: &SharedNamespaces) -> Result {
    let mut seen = HashSet::new();
    for namespace in linux.namespaces().iter().flatten() {
        let name = format!("linux.namespaces[{}]", namespace.typ());
        if !seen.insert(namespace.typ() as u32) {
            return refuse(name, "is there twice");
        }
        if namespace
            .path()
            .as_ref()
            .is_some_and(|path| !path.as_os_str().is_empty())
        {
            return refuse(
                format!("{name}.path"),
                "a namespace of the guest can't be named by path",
            );
        }
    }
    let has = |kind: LinuxNamespaceType| seen.contains(&(kind as u32));
    if !has(LinuxNamespaceType::Mount) {
        return refuse("linux.namespaces", "no mount namespace");
    }
    if !has(LinuxNamespaceType::Pid) && pod.pid.is_none() {
        return refuse(
            "linux.namespaces",
            "no pid namespace, and the pod shares none",
        );
    }
    let empty = |list: &Option<Vec<_>>| list.as_ref().is_none_or(Vec::is_empty);
    let mappings = [
        ("linux.uidMappings", empty(linux.uid_mappings())),
        ("linux.gidMappings", empty(linux.gid_mappings())),
    ];
    for (field, empty) in mappings {
        match (has(LinuxNamespaceType::User), empty) {
            (true, true) => return refuse(field, "is missing for the user namespace"),
            (false, false) => return refuse(field, "there is no user namespace"),
            _ => {}
        }
    }
    let offsets = linux
        .time_offsets()
        .as_ref()
        .filter(|offsets| !offsets.is_empty());
    if let Some(offsets) = offsets {
        if !has(LinuxNamespaceType::Time) {
            return refuse("linux.timeOffsets", "there is no time namespace");
        }
        if let Some(clock) = offsets
            .keys()
            .find(|k| !["monotonic", "boottime"].contains(&k.as_str()))
        {
            return refuse(
                format!("linux.timeOffsets.{clock}"),
                "is no clock with an offset",
            );
        }
    }
    Ok(())
}

/// Whether a sysctl belongs to the pod's network or IPC namespace, and so touches nothing else.
fn is_namespaced_sysctl(key: &str) -> bool {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    // As in sysctl(8), "net/ipv4/ip_forward" is the same key.
    let key = key.replace('/', ".");
    let plain = !key.split('.').any(str::is_empty);
    plain && (key.starts_with("net.") || key.starts_with("fs.mqueue.") || IPC.contains(&&*key))
}

fn seccomp(filter: &LinuxSeccomp) -> Result {
    let notify = [
        (
            "linux.seccomp.listenerPath",
            filter.listener_path().is_some(),
        ),
        (
            "linux.seccomp.listenerMetadata",
            filter.listener_metadata().is_some(),
        ),
    ];
    refuse_present(&notify, "no listener can be reached from the guest")?;
    if filter.default_action() == LinuxSeccompAction::ScmpActNotify {
        return refuse(
            "linux.seccomp.defaultAction",
            "SCMP_ACT_NOTIFY is not supported",
        );
    }
    for (i, rule) in filter.syscalls().iter().flatten().enumerate() {
        if rule.action() == LinuxSeccompAction::ScmpActNotify {
            let field = format!("linux.seccomp.syscalls[{i}].action");
            return refuse(field, "SCMP_ACT_NOTIFY is not supported");
        }
        if rule.args().iter().flatten().any(|arg| arg.index() > 5) {
            let field = format!("linux.seccomp.syscalls[{i}].args");
            return refuse(field, "a system call has arguments 0 to 5");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
