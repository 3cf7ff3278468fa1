//! The commands that look: ps, state, stats, logs, console.

use super::Error;
use super::client::{ProcessState, Task};
use super::find::Found;
use super::options::{LogsOptions, StatsOptions};
use super::run::OUTPUT_FILE;
use super::supervisor::LOG_FILE;
use super::time::rfc3339;
use crate::config::Config;
use crate::machine::open_console;
use crate::state::{ContainerRecord, State, sandboxes};
use coffer_proto::ids::{ContainerId, SandboxId};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A supervisor that does not answer this fast is shown as it is on disk.
const ANSWER: Duration = Duration::from_secs(2);
/// The OCI runtime specification whose state is printed.
pub(super) const OCI_VERSION: &str = "1.2.0";
/// Annotation that tells why a container ended, where its process was not the cause.
const REASON: &str = "io.coffer.reason";

/// One row of `ps`.
struct Row {
    sandbox: SandboxId,
    container: Option<ContainerId>,
    status: String,
    state: State,
}

/// `coffer ps`: every sandbox below the root with its containers.
pub(super) async fn list(config: &Config, as_json: bool) -> Result<(), Error> {
    let rows = rows(config).await?;
    if as_json {
        let rows: Vec<_> = rows.iter().map(row_json).collect();
        println!("{}", json!(rows));
        return Ok(());
    }
    println!(
        "{:<20} {:<20} {:<9} {:>8} {:>6} {:>10}  AGE",
        "SANDBOX", "CONTAINER", "STATUS", "PID", "VCPUS", "MEMORY"
    );
    for row in rows {
        let age = row.state.created.elapsed().unwrap_or_default();
        let container = row.container.as_ref().map_or("-", ContainerId::as_str);
        let (pid, options) = (row.state.supervisor.pid, &row.state.options);
        let memory = format!("{} MiB", options.memory_mib);
        let (sandbox, status) = (row.sandbox.as_str(), row.status);
        println!(
            "{sandbox:<20} {container:<20} {status:<9} {pid:>8} {:>6} {memory:>10}  {}",
            options.vcpus,
            duration(age)
        );
    }
    Ok(())
}

async fn rows(config: &Config) -> Result<Vec<Row>, Error> {
    let mut rows = Vec::new();
    for id in sandboxes(&config.root)? {
        // It may have ended since the directory was read.
        let Ok(Some(state)) = State::load(&config.root, &id) else {
            continue;
        };
        let found = Found {
            id: id.clone(),
            state: state.clone(),
            root: config.root.clone(),
            wanted: ContainerId::new(id.as_str()).expect("both kinds of id have the same form"),
        };
        let row = |container: Option<&ContainerId>, status: &str| Row {
            sandbox: id.clone(),
            container: container.cloned(),
            status: if found.alive() { status } else { "dead" }.to_owned(),
            state: state.clone(),
        };
        if state.containers.is_empty() {
            rows.push(row(None, "creating"));
        }
        for (container, record) in &state.containers {
            let live = live_state(&found, container, record).await;
            rows.push(row(Some(container), live.status));
        }
    }
    Ok(rows)
}

fn row_json(row: &Row) -> Value {
    let created = row
        .state
        .created
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    json!({
        "sandbox": row.sandbox, "container": row.container, "status": row.status,
        "supervisor_pid": row.state.supervisor.pid, "hypervisor": row.state.options.hypervisor,
        "vcpus": row.state.options.vcpus, "memory_mib": row.state.options.memory_mib,
        "guest_kernel": row.state.guest_kernel, "created_unix": created.as_secs(),
    })
}

fn duration(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m", seconds / 60),
        seconds @ 3600..86_400 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// From the supervisor if it answers, else from what it wrote.
pub(super) async fn live_state(
    found: &Found,
    container: &ContainerId,
    record: &ContainerRecord,
) -> ProcessState {
    let exit_status = record.exit.as_ref().map_or(0, |exit| exit.status);
    if found.alive()
        && let Ok(task) = Task::connect(&found.root, &found.id).await
        && let Ok(state) = task.state(container.as_str(), ANSWER).await
    {
        return state;
    }
    let stopped = !found.alive() || record.exit.is_some() || found.state.stopped().is_some();
    ProcessState {
        status: if stopped { "stopped" } else { "running" },
        pid: 0,
        exit_status,
    }
}

/// `coffer state`: as the OCI runtime specification has it.
pub(super) async fn state(config: &Config, id: &SandboxId) -> Result<(), Error> {
    let found = Found::by_id(config, id)?;
    let (container, record) = found.container()?;
    let live = live_state(&found, &container, record).await;
    // The supervisor may have learnt of the end meanwhile.
    let found = Found::by_id(config, id)?;
    let (_, record) = found.container()?;
    let mut annotations = match found.stand_in() {
        Some(stand_in) => json!(stand_in.record.annotations),
        None => bundle_annotations(&record.bundle),
    };
    if live.status == "stopped" {
        if let Some(reason) = found.reason(record) {
            annotations[REASON] = json!(reason);
        }
        annotations["io.coffer.exit-status"] = json!(live.exit_status.to_string());
    }
    let pid = found.pid(&live);
    let state = json!({
        "ociVersion": OCI_VERSION, "id": container, "status": live.status, "pid": pid, "bundle": record.bundle,
        "rootfs": rootfs(&record.bundle), "created": rfc3339(record.created), "owner": "root",
        "annotations": annotations,
    });
    println!(
        "{}",
        serde_json::to_string_pretty(&state).expect("JSON values can always be written")
    );
    Ok(())
}

/// What a hook gets on its standard input.
pub(super) fn hook_state(
    id: &ContainerId,
    status: &str,
    pid: u32,
    bundle: &Path,
    annotations: Option<&HashMap<String, String>>,
) -> Value {
    json!({
        "ociVersion": OCI_VERSION, "id": id, "status": status, "pid": pid, "bundle": bundle,
        "annotations": annotations.cloned().unwrap_or_default(),
    })
}

pub(super) fn rootfs(bundle: &Path) -> PathBuf {
    let spec = crate::spec::Bundle::load(bundle).ok();
    let root = spec.and_then(|bundle| Some(bundle.spec().root().as_ref()?.path().clone()));
    bundle.join(root.unwrap_or_default())
}

fn bundle_annotations(bundle: &Path) -> Value {
    let spec = crate::spec::Bundle::load(bundle).ok();
    let annotations = spec.and_then(|bundle| bundle.spec().annotations().clone());
    annotations.map_or_else(|| json!({}), |annotations| json!(annotations))
}

/// `coffer stats`
pub(super) async fn stats(config: &Config, options: &StatsOptions) -> Result<(), Error> {
    let found = Found::by_id(config, &options.target.id)?;
    let (container, _) = found.container()?;
    let task = Task::connect(&config.root, &found.id)
        .await
        .map_err(|error| found.why_gone(error))?;
    let stats = task
        .stats(container.as_str())
        .await
        .map_err(|error| found.why_gone(error))?;
    let (cpu, memory, pids) = (&stats.cpu, &stats.memory, &stats.pids);
    let values = [
        ("cpu_usage_us", cpu.usage_usec),
        ("cpu_user_us", cpu.user_usec),
        ("cpu_system_us", cpu.system_usec),
        ("cpu_nr_periods", cpu.nr_periods),
        ("cpu_nr_throttled", cpu.nr_throttled),
        ("cpu_throttled_us", cpu.throttled_usec),
        ("memory_current", memory.usage),
        ("memory_limit", memory.usage_limit),
        ("memory_anon", memory.anon),
        ("memory_file", memory.file),
        ("swap_current", memory.swap_usage),
        ("oom_kills", stats.memory_events.oom_kill),
        ("pids_current", pids.current),
        ("pids_limit", pids.limit),
    ];
    if options.json.json {
        let object: serde_json::Map<_, _> = values
            .iter()
            .map(|(name, value)| ((*name).into(), json!(value)))
            .collect();
        println!(
            "{}",
            json!({"id": container, "time_unix_ms": unix_ms(), "stats": object})
        );
        return Ok(());
    }
    for (name, value) in values {
        // cgroup v2 has "max" for no limit.
        let value = if value == u64::MAX {
            "none".to_owned()
        } else {
            value.to_string()
        };
        println!("{name:<18} {value:>20}");
    }
    Ok(())
}

fn unix_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// `coffer logs`
pub(super) fn logs(config: &Config, options: &LogsOptions) -> Result<(), Error> {
    let id = &options.target.id;
    let directory = Found::directory(config, id)?;
    let path = directory.join(if options.supervisor {
        LOG_FILE
    } else {
        OUTPUT_FILE
    });
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !options.supervisor => {
            return Err(Error::NotDetached { id: id.clone() });
        }
        Err(source) => {
            return Err(Error::Io {
                what: format!("can't open {path:?}"),
                source,
            });
        }
    };
    match io::copy(&mut file, &mut io::stdout()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Io {
            what: format!("can't print {path:?}"),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// `coffer console`: the ring that the hypervisor process fills, also after its death.
pub(super) fn console(config: &Config, id: &SandboxId) -> Result<(), Error> {
    Found::directory(config, id)?;
    let read =
        open_console(&config.root, id).and_then(|file| coffer_proto::vmm::console::read(&file));
    let bytes = read.map_err(|source| Error::Io {
        what: format!("can't read the console of sandbox {id}"),
        source,
    })?;
    // The guest wrote it: nothing in it may act on the terminal.
    let text = String::from_utf8_lossy(&bytes);
    let harmless = text
        .chars()
        .filter(|c| !c.is_control() || matches!(c, '\n' | '\t'))
        .collect::<String>();
    print!("{harmless}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        let shown: Vec<_> = [5, 65, 7200, 180_000]
            .map(|seconds| duration(Duration::from_secs(seconds)))
            .into();
        assert_eq!(shown, ["5s", "1m", "2h", "2d"]);
    }
}
