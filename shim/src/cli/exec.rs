//! `coffer exec`: a further process in a running container.

use super::bundle::BundleError;
use super::client::{Process, Task, TaskError};
use super::create::check_options;
use super::default_spec::{capability, merge_env};
use super::lifecycle::Known;
use super::options::ExecOptions;
use super::order::{self, Exec, Network, Order, Places};
use super::session::{Caller, FORWARDED, Session};
use super::stand_in;
use super::stdio::Fifos;
use super::{Error, user};
use crate::config::Config;
use crate::image::Root;
use crate::lease::{Lease, Registration};
use crate::spec::{Bundle, MAX_CONFIG_BYTES};
use coffer_proto::ids::{ContainerId, ExecId};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Runs it; gives its exit status, or 0 when it is detached.
pub(super) async fn exec(config: &Config, options: &ExecOptions) -> Result<u8, Error> {
    let known = Known::look(config, &options.target.id).await?;
    let states: &[&str] = if options.ignore_paused {
        &["created", "running", "paused"]
    } else {
        &["created", "running"]
    };
    let refusal = match known.status {
        "paused" => "cannot exec in a paused container (use --ignore-paused)",
        _ => "cannot exec in a stopped container",
    };
    known.task_in(states, refusal)?;
    let (container, record) = known.found.container()?;
    let block = match &options.block {
        Some(file) => given_block(file, options.process.tty)?,
        None => process_block(&record.bundle, &container, options)?,
    };
    let id = ExecId::new(format!("exec-{}", random_hex()?)).expect("the form of an id");
    if options.detach {
        return detached(config, &known, options, Exec { id, process: block }).await;
    }
    foreground(config, &known, options, Exec { id, process: block }).await
}

/// With a stand-in that stays behind.
async fn detached(
    config: &Config,
    known: &Known,
    options: &ExecOptions,
    exec: Exec,
) -> Result<u8, Error> {
    let terminal = exec.process["terminal"] == json!(true);
    check_options(&options.detached, terminal)?;
    let (container, record) = known.found.container()?;
    let beside = known.found.stand_in();
    let network = beside.map_or(Network::Callers, |stand_in| {
        Network::Path(format!("/proc/{}/ns/net", stand_in.process.pid).into())
    });
    let side = |name: &str| {
        let length = exec.process["consoleSize"][name]
            .as_u64()
            .unwrap_or_default();
        u16::try_from(length).unwrap_or(u16::MAX)
    };
    let order = Order {
        sandbox: known.found.id.clone(),
        container,
        bundle: record.bundle.clone(),
        terminal,
        console_size: Some((side("height"), side("width"))),
        places: Places::absolute(&options.detached)?,
        cgroup: beside.and_then(|stand_in| stand_in.record.cgroup.clone()),
        network,
        record: None,
        view: None,
        exec: Some(exec),
    };
    let mut process = order::start(&config.root, &order).await?;
    process.ready().await?;
    process.go().await?;
    Ok(0)
}

/// In this process, which is its own stand-in.
async fn foreground(
    config: &Config,
    known: &Known,
    options: &ExecOptions,
    exec: Exec,
) -> Result<u8, Error> {
    let mut caller = Caller::listen(&FORWARDED)?;
    let found = &known.found;
    let (container, _) = found.container()?;
    let terminal = exec.process["terminal"] == json!(true);
    let process = Process {
        container: container.to_string(),
        exec: exec.id.to_string(),
    };
    let registration = Registration {
        container,
        exec: Some(exec.id),
        own_network: false,
        record: None,
    };
    let lease = Lease::take(&config.root, &found.id, &registration).await?;
    let task = Task::connect(&config.root, &found.id)
        .await
        .map_err(|error| found.why_gone(error))?;
    let interactive = options.process.interactive || options.block.is_some();
    let directory = config.root.join(&found.id).join(&process.exec);
    let fifos = Fifos::make(directory, interactive, terminal)?;
    let block = serde_json::to_vec(&exec.process).expect("JSON values can always be written");
    let create = async {
        let paths = fifos.paths();
        let created = task.exec(&process, block, &paths).await;
        created.map_err(Error::from)
    };
    caller.unless_interrupted(create).await?;
    if let Some(path) = &options.detached.pid_file {
        stand_in::write_pid(path)?;
    }
    let session = Session {
        task,
        process,
        terminal,
    };
    let status = session.run(fifos, &mut caller).await;
    match session.task.delete(&session.process).await {
        Err(TaskError::Gone) | Ok(()) => {}
        // The container may have ended under it; its status is known.
        Err(error) => tracing::debug!(%error, "exec not deleted"),
    }
    drop(lease);
    match status {
        Ok(status) => found.exec_ended(status),
        Err(Error::Task(error)) => Err(found.why_gone(error)),
        Err(error) => Err(error),
    }
}

/// The block of a file; engines set the terminal in it or by the option.
fn given_block(file: &Path, terminal: bool) -> Result<Value, Error> {
    let read = || {
        let mut text = Vec::new();
        File::open(file)?
            .take(MAX_CONFIG_BYTES)
            .read_to_end(&mut text)?;
        Ok(serde_json::from_slice::<Value>(&text)?)
    };
    let mut block = read().map_err(|source| Error::Io {
        what: format!("can't read the process of {file:?}"),
        source,
    })?;
    if !block.is_object() {
        return Err(Error::Usage(format!("{file:?} holds no OCI process")));
    }
    if terminal {
        block["terminal"] = json!(true);
    }
    Ok(block)
}

/// The container's own process block, changed as asked.
fn process_block(
    bundle: &Path,
    container: &ContainerId,
    options: &ExecOptions,
) -> Result<Value, Error> {
    let (more, command) = (options, &options.command);
    let options = &options.process;
    let bundle = Bundle::load(bundle)?;
    let mut process = serde_json::to_value(bundle.spec().process())
        .expect("a spec that was parsed can be written");
    process["args"] = json!(command);
    process["terminal"] = json!(options.tty);
    if let Some(fields) = process.as_object_mut() {
        fields.remove("commandLine");
        fields.remove("consoleSize");
    }
    if let Some(directory) = &options.workdir {
        process["cwd"] = json!(directory);
    }
    if let Some(wanted) = &options.user {
        let rootfs = bundle.for_guest(container)?.rootfs;
        let root = Root::open(&rootfs).map_err(|source| Error::Io {
            what: format!("can't open {rootfs:?}"),
            source,
        })?;
        let user = user::resolve(&root, wanted)?;
        process["user"] =
            json!({"uid": user.uid, "gid": user.gid, "additionalGids": user.additional_gids});
        // Root has what its container may have, others have nothing in effect.
        let bounding = process["capabilities"]["bounding"].clone();
        let effective = if user.uid == 0 && bounding.is_array() {
            bounding
        } else {
            json!([])
        };
        if process["capabilities"].is_object() {
            process["capabilities"]["effective"] = effective.clone();
            process["capabilities"]["permitted"] = effective;
            process["capabilities"]["ambient"] = json!([]);
            process["capabilities"]["inheritable"] = json!([]);
        }
    }
    let own: Vec<String> = serde_json::from_value(process["env"].take()).unwrap_or_default();
    let terminal = if options.tty {
        vec!["TERM=xterm".to_owned()]
    } else {
        Vec::new()
    };
    process["env"] = json!(merge_env(&[&terminal, &own, &options.env]));
    add_privileges(&mut process, more)?;
    Ok(process)
}

fn add_privileges(process: &mut Value, options: &ExecOptions) -> Result<(), Error> {
    if options.no_new_privs {
        process["noNewPrivileges"] = json!(true);
    }
    for gid in &options.additional_gids {
        append(&mut process["user"]["additionalGids"], json!(gid));
    }
    for name in &options.caps {
        let capability = capability(name).map_err(BundleError::from)?;
        for set in ["bounding", "effective", "permitted", "inheritable"] {
            append(&mut process["capabilities"][set], json!(capability));
        }
    }
    Ok(())
}

/// Adds to a list that may not be there yet, if it is not in it already.
fn append(list: &mut Value, value: Value) {
    if !list.is_array() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut().filter(|list| !list.contains(&value)) {
        list.push(value);
    }
}

fn random_hex() -> Result<String, Error> {
    let mut bytes = [0; 4];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|source| Error::Io {
        what: "can't read /dev/urandom".into(),
        source,
    })?;
    Ok(crate::image::hex(&bytes))
}

#[cfg(test)]
mod tests {
    use super::super::options::{Command, CommandLine};
    use super::*;
    use clap::Parser;
    use std::fs;

    #[test]
    fn the_block_is_the_containers_with_changes() {
        let bundle = tempfile::tempdir().unwrap();
        fs::create_dir_all(bundle.path().join("rootfs/etc")).unwrap();
        fs::write(bundle.path().join("rootfs/etc/passwd"), "web:x:33:34::/:\n").unwrap();
        let capabilities =
            json!({"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]});
        let config = json!({
            "ociVersion": "1.0.2", "root": {"path": "rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["init"], "cwd": "/", "terminal": true,
                        "env": ["A=container", "B=container"], "capabilities": capabilities}
        });
        fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
        let options = |user: Option<&str>| {
            let mut words = vec!["coffer", "exec", "--env", "B=exec", "--cwd=/tmp"];
            words.extend(user.into_iter().flat_map(|user| ["--user", user]));
            if user.is_none() {
                words.extend(["--cap", "net_raw", "-g", "7"]);
            }
            words.extend(["c", "ls"]);
            match CommandLine::try_parse_from(words).unwrap().command {
                Command::Exec(options) => options,
                other => panic!("{other:?}"),
            }
        };
        let container = ContainerId::new("c").unwrap();
        let block = |user| process_block(bundle.path(), &container, &options(user));
        let plain = block(None).unwrap();
        assert_eq!(plain["user"]["additionalGids"], json!([7]));
        assert_eq!(
            (&plain["args"], &plain["cwd"], &plain["terminal"]),
            (&json!(["ls"]), &json!("/tmp"), &json!(false))
        );
        assert_eq!(plain["env"], json!(["A=container", "B=exec"]));
        assert_eq!(
            plain["capabilities"]["effective"],
            json!(["CAP_KILL", "CAP_NET_RAW"])
        );
        let web = block(Some("web")).unwrap();
        assert_eq!(
            (&web["user"]["uid"], &web["user"]["gid"]),
            (&json!(33), &json!(34))
        );
        assert_eq!(
            (
                &web["capabilities"]["effective"],
                &web["capabilities"]["bounding"]
            ),
            (&json!([]), &json!(["CAP_KILL"]))
        );
        assert_eq!(
            block(Some("0")).unwrap()["capabilities"]["effective"],
            json!(["CAP_KILL"])
        );
        assert!(block(Some("nobody-here")).is_err());
    }
}
