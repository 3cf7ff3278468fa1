//! `coffer list` and `coffer ps ID`: containers and their processes of the host, as an OCI runtime shows them.

use super::Error;
use super::find::Found;
use super::inspect::{OCI_VERSION, live_state, rootfs};
use super::options::{ListFormat, ListOptions};
use super::time::rfc3339;
use crate::config::Config;
use crate::state::{State, sandboxes};
use coffer_proto::ids::SandboxId;
use serde_json::{Value, json};

/// Every container below the root.
pub(super) async fn list(config: &Config, options: &ListOptions) -> Result<(), Error> {
    let mut containers = Vec::new();
    for id in sandboxes(&config.root)? {
        // It may have ended since the directory was read.
        let Ok(Some(state)) = State::load(&config.root, &id) else {
            continue;
        };
        for container in state.containers.keys() {
            let found = Found {
                id: id.clone(),
                root: config.root.clone(),
                state: state.clone(),
                wanted: container.clone(),
            };
            containers.push(describe(&found).await?);
        }
    }
    if options.quiet {
        for container in &containers {
            println!("{}", text(&container["id"]));
        }
    } else if options.format == ListFormat::Json {
        println!("{}", Value::Array(containers));
    } else {
        println!(
            "{:<20} {:>8} {:<9} {:<40} CREATED",
            "ID", "PID", "STATUS", "BUNDLE"
        );
        for of in &containers {
            let [id, status, bundle, created] =
                ["id", "status", "bundle", "created"].map(|name| text(&of[name]));
            println!(
                "{id:<20} {:>8} {status:<9} {bundle:<40} {created}",
                of["pid"]
            );
        }
    }
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

async fn describe(found: &Found) -> Result<Value, Error> {
    let (container, record) = found.container()?;
    let live = live_state(found, &container, record).await;
    Ok(json!({
        "ociVersion": OCI_VERSION, "id": container, "status": live.status, "pid": found.pid(&live),
        "bundle": record.bundle, "rootfs": rootfs(&record.bundle), "created": rfc3339(record.created), "owner": "root",
    }))
}

/// The processes that stand for a container's init and its execs; those of the guest have no pid here.
pub(super) fn processes(config: &Config, id: &SandboxId, format: ListFormat) -> Result<(), Error> {
    let found = Found::by_id(config, id)?;
    let (container, _) = found.container()?;
    let known = found.state.stand_ins.iter();
    let alive: Vec<_> = known
        .filter(|known| known.container == container && known.process.is_alive())
        .collect();
    if format == ListFormat::Json {
        let pids: Vec<i32> = alive.iter().map(|known| known.process.pid).collect();
        println!("{}", json!(pids));
        return Ok(());
    }
    println!("{:>8} PROCESS", "PID");
    for known in alive {
        let name = known.exec.as_ref().map_or("init", |exec| exec.as_str());
        println!("{:>8} {name}", known.process.pid);
    }
    Ok(())
}
