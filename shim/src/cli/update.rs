//! `coffer update`: other limits for a container that runs.

use super::Error;
use super::lifecycle::{Known, NOT_RUNNING};
use super::options::UpdateOptions;
use crate::config::Config;
use crate::spec::MAX_CONFIG_BYTES;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Applies what was asked for.
pub(super) async fn update(config: &Config, options: &UpdateOptions) -> Result<(), Error> {
    let resources = match &options.resources {
        Some(file) => read(file)?,
        None => of_options(options),
    };
    let known = Known::look(config, &options.target.id).await?;
    let task = known.task_in(&["created", "running", "paused"], NOT_RUNNING)?;
    let json = resources.to_string().into_bytes();
    known.told(task.update(&known.process.container, json).await)
}

/// OCI resources of a file, or of standard input for `-`.
fn read(file: &Path) -> Result<Value, Error> {
    let read = || {
        let mut text = Vec::new();
        let source: Box<dyn Read> = if file == Path::new("-") {
            Box::new(io::stdin())
        } else {
            Box::new(File::open(file)?)
        };
        source.take(MAX_CONFIG_BYTES).read_to_end(&mut text)?;
        Ok(serde_json::from_slice::<Value>(&text)?)
    };
    let value = read().map_err(|source| Error::Io {
        what: format!("can't read the resources of {file:?}"),
        source,
    })?;
    let parsed: Result<oci_spec::runtime::LinuxResources, _> =
        serde_json::from_value(value.clone());
    match parsed {
        // A list would be taken for the fields in their order.
        Ok(_) if value.is_object() => Ok(value),
        Ok(_) => Err(Error::Usage(format!("{file:?} holds no OCI resources"))),
        Err(error) => Err(Error::Usage(format!(
            "{file:?} holds no OCI resources: {error}"
        ))),
    }
}

/// Only what was given: the rest stays as it is.
fn of_options(options: &UpdateOptions) -> Value {
    let mut resources = json!({});
    let fields = [
        ("blockIO", "weight", options.blkio_weight.map(Value::from)),
        ("cpu", "period", options.cpu_period.map(Value::from)),
        ("cpu", "quota", options.cpu_quota.map(Value::from)),
        ("cpu", "burst", options.cpu_burst.map(Value::from)),
        ("cpu", "shares", options.cpu_share.map(Value::from)),
        ("cpu", "cpus", options.cpuset_cpus.clone().map(Value::from)),
        ("cpu", "mems", options.cpuset_mems.clone().map(Value::from)),
        (
            "memory",
            "limit",
            options.memory.map(|limit| limit.0.into()),
        ),
        (
            "memory",
            "reservation",
            options.memory_reservation.map(|limit| limit.0.into()),
        ),
        (
            "memory",
            "swap",
            options.memory_swap.map(|limit| limit.0.into()),
        ),
        ("pids", "limit", options.pids_limit.map(Value::from)),
    ];
    for (group, name, value) in fields {
        if let Some(value) = value {
            resources[group][name] = value;
        }
    }
    resources
}

#[cfg(test)]
mod tests {
    use super::super::options::{Command, CommandLine};
    use super::*;
    use clap::Parser;

    #[test]
    fn only_what_was_asked_for_is_changed() {
        let of = |words: &[&str]| {
            let words = [&["coffer", "update"], words, &["c"]].concat();
            match CommandLine::try_parse_from(words).unwrap().command {
                Command::Update(options) => of_options(&options),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(of(&[]), json!({}));
        assert_eq!(
            of(&["--memory", "64m", "--cpu-quota", "-1", "--pids-limit=7"]),
            json!({"memory": {"limit": 64 << 20}, "cpu": {"quota": -1}, "pids": {"limit": 7}})
        );
    }

    #[test]
    fn a_file_without_resources_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resources");
        for text in ["", "[]", r#"{"memory": {"limit": "much"}}"#] {
            std::fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("resources"), "{error}");
        }
    }
}
