//! `coffer exec`: a further process in a running container.

use super::client::{Process, Task, TaskError};
use super::default_spec::merge_env;
use super::options::{ExecOptions, ProcessOptions};
use super::session::{Caller, Session};
use super::stdio::Fifos;
use super::{Error, Found, user};
use crate::config::Config;
use crate::image::Root;
use crate::spec::Bundle;
use coffer_proto::ids::ContainerId;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Runs it in the foreground; gives its exit status.
pub(super) async fn exec(config: &Config, options: &ExecOptions) -> Result<u8, Error> {
    let mut caller = Caller::listen()?;
    let found = Found::sandbox(config, &options.target.id)?;
    let (container, record) = found.container()?;
    let block = process_block(
        &record.bundle,
        &container,
        &options.process,
        &options.command,
    )?;
    let process = Process {
        container: container.to_string(),
        exec: format!("exec-{}", random_hex()?),
    };
    let task = Task::connect(&config.root, &found.id)
        .await
        .map_err(|error| found.why_gone(error))?;

    let (interactive, terminal) = (options.process.interactive, options.process.tty);
    let directory = config.root.join(&found.id).join(&process.exec);
    let fifos = Fifos::make(directory, interactive, terminal);
    let fifos = fifos.map_err(|source| Error::Io {
        what: "can't make the fifos of the process".into(),
        source,
    })?;
    let block = serde_json::to_vec(&block).expect("JSON values can always be written");
    let create = async {
        let paths = fifos.paths();
        let created = task.exec(&process, block, &paths).await;
        created.map_err(Error::from)
    };
    caller.unless_interrupted(create).await?;
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
    status.map_err(|error| match error {
        Error::Task(error) => found.why_gone(error),
        error => error,
    })
}

/// The container's own process block, changed as asked.
fn process_block(
    bundle: &Path,
    container: &ContainerId,
    options: &ProcessOptions,
    command: &[String],
) -> Result<Value, Error> {
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
    Ok(process)
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
    use super::*;
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
        let options = |user: Option<&str>| ProcessOptions {
            tty: false,
            interactive: false,
            env: vec!["B=exec".into()],
            workdir: Some("/tmp".into()),
            user: user.map(Into::into),
        };
        let container = ContainerId::new("c").unwrap();
        let block = |user| process_block(bundle.path(), &container, &options(user), &["ls".into()]);
        let plain = block(None).unwrap();
        assert_eq!(
            (&plain["args"], &plain["cwd"], &plain["terminal"]),
            (&json!(["ls"]), &json!("/tmp"), &json!(false))
        );
        assert_eq!(plain["env"], json!(["A=container", "B=exec"]));
        assert_eq!(plain["capabilities"]["effective"], json!(["CAP_KILL"]));
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
