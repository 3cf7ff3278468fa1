//! What Create is given: places for the output, mounts of the root, and a network that comes after it.

use coffer_tests::bundle::Bundle;
use coffer_tests::shim::Shim;
use coffer_tests::task::{Task, code_of};
use coffer_tests::{Test, asset, host, wait_for};
use containerd_shim_protos::api;
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use ttrpc::Code;

#[test]
fn output_goes_to_files_and_to_loggers() {
    let test = Test::new("loggers");
    let file = test.dir().join("made/for/it/log file");
    let mut uri = format!("file://{}", file.display());
    uri = uri.replace(' ', "%20");
    let bundle = Bundle::new(&test, "echo to file; echo and err >&2");
    bundle.write();
    let shim = Shim::start(&test, &bundle.dir, "pod");
    let task = shim.task();
    let run = |id: &str, stdout: &str| {
        let bundle = Bundle::new(&test, "echo out; echo err >&2; exit 4").in_sandbox("pod");
        task.create(id, bundle.write(), stdout).unwrap();
        task.start(id, "").unwrap();
        assert_eq!(task.wait(id, "").unwrap(), 4);
        task.delete(id, "").unwrap();
    };
    task.create("pod", bundle.dir.to_str().unwrap(), "")
        .unwrap();
    run("tofile", &uri);
    assert_eq!(fs::read_to_string(&file).unwrap(), "out\n");

    let (logger, log) = (test.dir().join("logger"), test.dir().join("log"));
    let script = "#!/bin/sh\nexec 5>&-\nout=$(cat <&3)\nerr=$(cat <&4)\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $out $err $*\" > $2\n";
    fs::write(&logger, script).unwrap();
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).unwrap();
    run(
        "tologger",
        &format!("binary://{}?log={}", logger.display(), log.display()),
    );
    let expected = format!(
        "{} tologger out err log {}\n",
        shim.namespace,
        log.display()
    );
    wait_for("the logger to write", || log.exists());
    wait_for("the logger's line", || {
        fs::read_to_string(&log).is_ok_and(|text| text == expected)
    });
    let refused = task.create("x", bundle.dir.to_str().unwrap(), "gopher://x/y");
    assert_eq!(code_of(&refused.unwrap_err()), Some(Code::INVALID_ARGUMENT));
    task.delete("pod", "").unwrap();
}

/// Create with a mount for the root; output goes to the file `out`.
fn create(task: &Task, test: &Test, bundle: &str, root: api::Mount) -> ttrpc::Result<()> {
    let request = api::CreateTaskRequest {
        id: "c".into(),
        bundle: bundle.into(),
        rootfs: vec![root],
        stdout: test.dir().join("out").display().to_string(),
        ..Default::default()
    };
    let created = task.client().create(Task::context(), &request);
    created.map(drop)
}

#[test]
fn a_mount_of_an_unknown_type_is_refused_by_name() {
    let test = Test::new("rootfstype");
    let bundle = Bundle::new(&test, "true");
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    let unknown = api::Mount {
        type_: "format/erofs".into(),
        ..Default::default()
    };
    let error = create(&shim.task(), &test, &dir, unknown).unwrap_err();
    assert_eq!(code_of(&error), Some(Code::INVALID_ARGUMENT));
    assert!(error.to_string().contains("format/erofs"), "{error}");
}

#[test]
fn a_root_is_mounted_as_the_snapshotter_says() {
    let test = Test::new("rootfsmounts");
    let mut bundle = Bundle::new(&test, "touch /written && cat /marker");
    bundle.config["root"]["path"] = json!("rootfs");
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    let task = shim.task();
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| test.dir().join(name));
    for path in [&lower, &upper, &work] {
        fs::create_dir(path).unwrap();
    }
    fs::write(lower.join("marker"), "lower layer\n").unwrap();
    let overlay = api::Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options: vec![
            format!(
                "lowerdir={}:{}",
                lower.display(),
                asset("busybox").display()
            ),
            format!("upperdir={}", upper.display()),
            format!("workdir={}", work.display()),
        ],
        ..Default::default()
    };
    create(&task, &test, &dir, overlay).unwrap();
    task.start("c", "").unwrap();
    assert_eq!(task.wait("c", "").unwrap(), 0);
    task.delete("c", "").unwrap();
    assert_eq!(
        fs::read_to_string(test.dir().join("out")).unwrap(),
        "lower layer\n"
    );
    assert!(upper.join("written").exists());
    assert!(
        fs::read_dir(bundle.dir.join("rootfs"))
            .unwrap()
            .next()
            .is_none(),
        "the root is left mounted"
    );
}

/// docker and `ctr run --cni` do it like this, with the pid that Create answered.
#[test]
fn a_network_that_is_wired_after_create_is_in_the_guest_at_start() {
    let test = Test::new("latewire");
    let bundle = Bundle::new(&test, "ip -4 addr show eth0; ip route");
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    let task = shim.task();
    let out = test.dir().join("out");
    let pid = task.create("c", &dir, out.to_str().unwrap()).unwrap();
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(namespace(&pid.to_string()), namespace("self"));
    // The other end goes with this one.
    let (pid, end) = (pid.to_string(), format!("cof{pid}"));
    host(
        "ip",
        &[
            "link", "add", &end, "type", "veth", "peer", "name", "eth0", "netns", &pid,
        ],
    )
    .unwrap();
    for command in [
        &["addr", "add", "10.77.0.2/24", "dev", "eth0"][..],
        &["link", "set", "eth0", "up"],
        &["route", "add", "default", "via", "10.77.0.1"],
    ] {
        host("nsenter", &[&["-t", &pid, "-n", "ip"], command].concat()).unwrap();
    }
    task.start("c", "").unwrap();
    assert_eq!(task.wait("c", "").unwrap(), 0);
    let text = fs::read_to_string(&out).unwrap();
    assert!(
        text.contains("inet 10.77.0.2/24") && text.contains("default via 10.77.0.1"),
        "{text}"
    );
    task.delete("c", "").unwrap();
}
