//! The OCI spec of a container for which nobody wrote one: podman's defaults, changed by options and image.
//!
//! What comes out is the text of a `config.json`. The supervisor parses and checks it like one that came from elsewhere.

use super::options::ContainerOptions;
use super::user::{self, UserError};
use super::values::Volume;
use crate::image::{Root, RunConfig};
use coffer_proto::ids::ContainerId;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;

/// Podman's default capabilities: what programs in images use, and nothing that reaches out of a container.
const DEFAULT_CAPABILITIES: [&str; 11] = [
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
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The period of a CPU quota in microseconds, which every tool uses.
const CPU_PERIOD: u64 = 100_000;

/// Why no spec can be made.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error(transparent)]
    User(#[from] UserError),
    #[error("there is no command to run: the image names none, give one after --")]
    NoCommand,
    #[error("the volume {path:?} can't be used")]
    Volume { path: PathBuf, source: io::Error },
    #[error("there is no capability {0:?}")]
    Capability(String),
    #[error("the working directory {0:?} is not an absolute path")]
    WorkingDirectory(String),
}

/// Makes the spec of a container whose root is `root`.
pub(super) fn make(
    id: &ContainerId,
    options: &ContainerOptions,
    image: &RunConfig,
    root: &Root,
) -> Result<Value, SpecError> {
    let mut spec: Value =
        serde_json::from_str(include_str!("default_spec.json")).expect("a file of this source");
    let hostname = options
        .hostname
        .clone()
        .unwrap_or_else(|| id.as_str().chars().take(63).collect());
    spec["process"] = process(spec["process"].take(), options, image, root, &hostname)?;
    spec["hostname"] = json!(hostname);
    spec["root"]["readonly"] = json!(options.read_only);
    for volume in &options.volumes {
        append(&mut spec["mounts"], mount(volume)?);
    }
    let capabilities = capabilities(options)?;
    spec["linux"]["seccomp"] = seccomp(&capabilities);
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] = json!(capabilities);
    }
    // A process that is not root starts without capabilities, as exec(2) has it.
    if spec["process"]["user"]["uid"] != 0 {
        spec["process"]["capabilities"]["effective"] = json!([]);
        spec["process"]["capabilities"]["permitted"] = json!([]);
    }
    if let Some(netns) = &options.netns {
        for namespace in spec["linux"]["namespaces"]
            .as_array_mut()
            .into_iter()
            .flatten()
        {
            if namespace["type"] == "network" {
                namespace["path"] = json!(netns);
            }
        }
    }
    if let Some(memory) = options.memory {
        spec["linux"]["resources"]["memory"] = json!({"limit": memory.0});
    }
    if let Some(quota) = options.cpus.and_then(super::values::Cpus::quota) {
        spec["linux"]["resources"]["cpu"] = json!({"quota": quota, "period": CPU_PERIOD});
    }
    if !options.sysctls.is_empty() {
        spec["linux"]["sysctl"] = options
            .sysctls
            .iter()
            .map(|(key, value)| (key.clone(), json!(value)))
            .collect();
    }
    Ok(spec)
}

fn process(
    mut process: Value,
    options: &ContainerOptions,
    image: &RunConfig,
    root: &Root,
    hostname: &str,
) -> Result<Value, SpecError> {
    let wanted = options.process.user.as_deref().unwrap_or(&image.user);
    let user = user::resolve(root, wanted)?;
    process["args"] = json!(arguments(options, image)?);
    process["cwd"] = json!(working_directory(options, image)?);
    let mut env = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if options.process.tty {
        env.push("TERM=xterm".into());
    }
    env.push(format!("HOME={}", user.home.as_deref().unwrap_or("/")));
    process["env"] = json!(merge_env(&[
        &env,
        image.env.as_deref().unwrap_or_default(),
        &options.process.env
    ]));
    process["user"]["uid"] = json!(user.uid);
    process["user"]["gid"] = json!(user.gid);
    process["user"]["additionalGids"] = json!(user.additional_gids);
    process["terminal"] = json!(options.process.tty);
    for limit in &options.ulimits {
        let kind = limit.kind.to_string();
        let limits = process["rlimits"]
            .as_array_mut()
            .expect("the default spec has limits");
        limits.retain(|other| other["type"] != kind.as_str());
        limits.push(json!({"type": kind, "soft": limit.soft, "hard": limit.hard}));
    }
    Ok(process)
}

/// The image's entry point and then the user's words, or its own when there are none.
fn arguments(options: &ContainerOptions, image: &RunConfig) -> Result<Vec<String>, SpecError> {
    let mut arguments = image.entrypoint.clone().unwrap_or_default();
    if options.command.is_empty() {
        arguments.extend(image.cmd.iter().flatten().cloned());
    } else {
        arguments.extend(options.command.iter().cloned());
    }
    if arguments.is_empty() {
        Err(SpecError::NoCommand)
    } else {
        Ok(arguments)
    }
}

fn working_directory(options: &ContainerOptions, image: &RunConfig) -> Result<String, SpecError> {
    let from_image = image.working_dir.clone().filter(|path| !path.is_empty());
    let path = options
        .process
        .workdir
        .clone()
        .or(from_image)
        .unwrap_or_else(|| "/".into());
    if path.starts_with('/') {
        Ok(path)
    } else {
        Err(SpecError::WorkingDirectory(path))
    }
}

/// Later values win; the order of first mention stays.
pub(super) fn merge_env(lists: &[&[String]]) -> Vec<String> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let mut merged: Vec<String> = Vec::new();
    let mut places = BTreeMap::new();
    for entry in lists.iter().flat_map(|list| list.iter()) {
        match places.get(&name(entry)) {
            Some(&place) => merged[place] = entry.clone(),
            None => {
                places.insert(name(entry), merged.len());
                merged.push(entry.clone());
            }
        }
    }
    merged
}

fn mount(volume: &Volume) -> Result<Value, SpecError> {
    let source = volume.source.canonicalize();
    let source = source.map_err(|error| SpecError::Volume {
        path: volume.source.clone(),
        source: error,
    })?;
    let access = if volume.read_only { "ro" } else { "rw" };
    let options = ["rbind", "rprivate", access];
    Ok(
        json!({"destination": volume.destination, "type": "bind", "source": source, "options": options}),
    )
}

fn append(list: &mut Value, item: Value) {
    list.as_array_mut()
        .expect("the default spec has this list")
        .push(item);
}

fn capabilities(options: &ContainerOptions) -> Result<BTreeSet<String>, SpecError> {
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
const CAPABILITIES: [&str; 41] = [
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
fn capability(name: &str) -> Result<String, SpecError> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let known = CAPABILITIES.contains(&short);
    if known {
        Ok(format!("CAP_{short}"))
    } else {
        Err(SpecError::Capability(name.into()))
    }
}

/// `seccomp.json`: the system calls that docker's default profile allows on x86-64, its conditions on capabilities
/// resolved when a spec is made. Everything else fails with EPERM.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SeccompProfile {
    architectures: Vec<String>,
    allow: Vec<String>,
    /// Allowed with certain arguments.
    rules: Vec<Value>,
    /// For a container without CAP_SYS_ADMIN: no new namespaces by clone, and clone3, whose arguments a filter can't
    /// see, looks as if the kernel did not have it.
    without_sys_admin: Vec<Value>,
    /// Further calls that a capability brings.
    with_capability: BTreeMap<String, Vec<String>>,
}

fn seccomp(capabilities: &BTreeSet<String>) -> Value {
    let profile: SeccompProfile =
        serde_json::from_str(include_str!("seccomp.json")).expect("a file of this source");
    let mut allow: BTreeSet<String> = profile.allow.into_iter().collect();
    for (capability, calls) in profile.with_capability {
        if capabilities.contains(&capability) {
            allow.extend(calls);
        }
    }
    let mut rules = vec![json!({"names": allow, "action": "SCMP_ACT_ALLOW"})];
    rules.extend(profile.rules);
    if !capabilities.contains("CAP_SYS_ADMIN") {
        rules.extend(profile.without_sys_admin);
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": libc::EPERM,
        "architectures": profile.architectures, "syscalls": rules,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use oci_spec::runtime::Spec;
    use std::fs;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: ContainerOptions,
    }

    fn options(words: &[&str]) -> ContainerOptions {
        Line::try_parse_from([&["run"], words].concat())
            .unwrap()
            .options
    }

    fn make(words: &[&str], image: &RunConfig) -> Result<Value, SpecError> {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("etc")).unwrap();
        fs::write(
            directory.path().join("etc/passwd"),
            "root:x:0:0::/root:\nweb:x:33:34::/srv:\n",
        )
        .unwrap();
        let root = Root::open(directory.path()).unwrap();
        super::make(
            &ContainerId::new("c1").unwrap(),
            &options(words),
            image,
            &root,
        )
    }

    fn image() -> RunConfig {
        RunConfig {
            entrypoint: Some(vec!["/entry".into()]),
            cmd: Some(vec!["default".into()]),
            env: Some(vec!["A=image".into(), "PATH=/image".into()]),
            user: "web".into(),
            working_dir: Some("/srv".into()),
        }
    }

    #[test]
    fn the_result_is_a_spec_of_the_oci_crate() {
        let spec = make(
            &[
                "--ulimit",
                "nofile=1:2",
                "--netns",
                "/run/netns/x",
                "--",
                "sh",
            ],
            &RunConfig::default(),
        )
        .unwrap();
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_deref().unwrap(), ["sh"]);
        let limits = process.rlimits().as_ref().unwrap();
        assert_eq!(
            limits
                .iter()
                .filter(|limit| limit.typ().to_string() == "RLIMIT_NOFILE")
                .count(),
            1
        );
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_some());
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert!(
            namespaces
                .iter()
                .any(|namespace| namespace.path().as_deref() == Some("/run/netns/x".as_ref()))
        );
    }

    #[test]
    fn the_image_gives_what_nobody_asked_for() {
        let spec = make(&[], &image()).unwrap();
        let process = &spec["process"];
        assert_eq!(process["args"], json!(["/entry", "default"]));
        assert_eq!(
            (
                &process["cwd"],
                &process["user"]["uid"],
                &process["user"]["gid"]
            ),
            (&json!("/srv"), &json!(33), &json!(34))
        );
        assert_eq!(
            process["env"],
            json!(["PATH=/image", "HOSTNAME=c1", "HOME=/srv", "A=image"])
        );
        // Not root: nothing in effect, but the bounding set stays.
        assert_eq!(process["capabilities"]["effective"], json!([]));
        assert_eq!(
            process["capabilities"]["bounding"]
                .as_array()
                .unwrap()
                .len(),
            DEFAULT_CAPABILITIES.len()
        );
    }

    #[test]
    fn options_win_over_the_image() {
        let words = [
            "--env",
            "A=mine",
            "--user",
            "0:5",
            "--workdir",
            "/w",
            "-t",
            "--hostname",
            "h",
            "--read-only",
            "--",
            "mine",
        ];
        let spec = make(&words, &image()).unwrap();
        let process = &spec["process"];
        assert_eq!(process["args"], json!(["/entry", "mine"]));
        assert_eq!(
            (
                &process["cwd"],
                &process["user"]["gid"],
                &process["terminal"]
            ),
            (&json!("/w"), &json!(5), &json!(true))
        );
        assert_eq!(
            process["env"],
            json!([
                "PATH=/image",
                "HOSTNAME=h",
                "TERM=xterm",
                "HOME=/root",
                "A=mine"
            ])
        );
        assert_eq!(
            (&spec["hostname"], &spec["root"]["readonly"]),
            (&json!("h"), &json!(true))
        );
    }

    #[test]
    fn limits_and_mounts() {
        let volume = tempfile::tempdir().unwrap();
        let bind = format!("{}:/data:ro", volume.path().display());
        let words = [
            "--memory", "64m", "--cpus", "1.5", "--sysctl", "net.a=1", "--volume", &bind, "--", "x",
        ];
        let spec = make(&words, &RunConfig::default()).unwrap();
        assert_eq!(
            spec["linux"]["resources"]["memory"]["limit"],
            json!(64 << 20)
        );
        assert_eq!(
            spec["linux"]["resources"]["cpu"],
            json!({"quota": 150_000, "period": 100_000})
        );
        assert_eq!(spec["linux"]["sysctl"], json!({"net.a": "1"}));
        let mount = spec["mounts"].as_array().unwrap().last().unwrap();
        assert_eq!(
            (&mount["destination"], &mount["options"][2]),
            (&json!("/data"), &json!("ro"))
        );
        let missing = make(
            &["--volume", "/no/such:/x", "--", "x"],
            &RunConfig::default(),
        )
        .unwrap_err();
        assert!(missing.to_string().contains("/no/such"));
    }

    #[test]
    fn what_can_not_be_is_named() {
        let error = |words: &[&str]| make(words, &RunConfig::default()).unwrap_err().to_string();
        assert!(error(&[]).contains("no command"));
        assert!(error(&["--user", "nobody-here", "--", "x"]).contains("nobody-here"));
        assert!(error(&["--workdir", "here", "--", "x"]).contains("here"));
        assert!(error(&["--cap-add", "FLY", "--", "x"]).contains("FLY"));
    }

    #[test]
    fn capabilities_are_added_and_dropped() {
        let set = |words: &[&str]| capabilities(&options(words)).unwrap();
        assert!(set(&["--cap-add", "net_admin"]).contains("CAP_NET_ADMIN"));
        assert!(!set(&["--cap-drop", "CAP_CHOWN"]).contains("CAP_CHOWN"));
        assert_eq!(
            set(&["--cap-drop", "ALL", "--cap-add", "KILL"])
                .into_iter()
                .collect::<Vec<_>>(),
            ["CAP_KILL"]
        );
        assert_eq!(
            set(&["--cap-add", "all", "--cap-drop", "bpf"]).len(),
            CAPABILITIES.len() - 1
        );
    }

    #[test]
    fn the_profile_follows_the_capabilities() {
        let allowed = |capabilities: &[&str]| {
            let profile = seccomp(&capabilities.iter().map(ToString::to_string).collect());
            profile["syscalls"][0]["names"]
                .as_array()
                .unwrap()
                .iter()
                .any(|name| name == "mount")
        };
        assert!(!allowed(&[]) && allowed(&["CAP_SYS_ADMIN"]));
        let _: oci_spec::runtime::LinuxSeccomp =
            serde_json::from_value(seccomp(&BTreeSet::new())).unwrap();
        // Every capability that the profile names exists.
        let profile: SeccompProfile = serde_json::from_str(include_str!("seccomp.json")).unwrap();
        assert!(
            profile
                .with_capability
                .keys()
                .all(|name| capability(name).is_ok())
        );
    }
}
