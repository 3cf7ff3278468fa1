//! The OCI spec of a container for which nobody wrote one: podman's defaults, changed by options and image.
//!
//! What comes out is the text of a `config.json`. The supervisor parses and checks it like one that came from elsewhere.

mod capabilities;
mod seccomp;

pub(super) use capabilities::capability;

use super::options::ContainerOptions;
use super::unicode;
use super::user::{self, UserError};
use super::values::Volume;
use crate::image::{Root, RunConfig};
use coffer_proto::ids::ContainerId;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

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
    let capabilities = capabilities::of(options)?;
    spec["linux"]["seccomp"] = seccomp::profile(&capabilities);
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

/// A spec to begin with: a shell with a terminal in `rootfs` beside it.
pub(super) fn example() -> Value {
    let mut spec: Value =
        serde_json::from_str(include_str!("default_spec.json")).expect("a file of this source");
    spec["root"]["path"] = json!("rootfs");
    spec["hostname"] = json!("coffer");
    let capabilities = capabilities::DEFAULT_CAPABILITIES.map(str::to_owned);
    spec["linux"]["seccomp"] = seccomp::profile(&capabilities.clone().into());
    let process = &mut spec["process"];
    process["args"] = json!(["sh"]);
    process["cwd"] = json!("/");
    process["env"] = json!([DEFAULT_PATH, "TERM=xterm"]);
    process["terminal"] = json!(true);
    for set in ["bounding", "effective", "permitted"] {
        process["capabilities"][set] = json!(capabilities);
    }
    spec
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
    let source = volume.source.canonicalize().and_then(unicode::path);
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

#[cfg(test)]
mod tests;
