//! `containerd-shim-coffer-v2` against the contract of containerd's runtime v2, with the test in containerd's place.

use coffer_tests::bundle::Bundle;
use coffer_tests::shim::{Shim, call, config, options};
use coffer_tests::task::{Task, code_of};
use coffer_tests::{Test, asset, host, wait_for};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use ttrpc::Code;

#[test]
fn info_tells_what_the_runtime_can_do() {
    let test = Test::new("info");
    let done = call(test.dir(), &["-info"], "", Vec::new());
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
    let info = RuntimeInfo::parse_from_bytes(&done.stdout).unwrap();
    let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
    assert_eq!(info.name, "io.containerd.coffer.v2");
    assert_eq!(features["linux"]["seccomp"]["enabled"], json!(true));
    let version = call(test.dir(), &["-v"], "", Vec::new());
    assert!(version.text().contains("containerd-shim-coffer-v2"));
}

/// A message of `start`, which must be one line.
fn refused_start(test: &Test, stdin: &Any) -> String {
    let bundle = Bundle::new(test, "true");
    let args = ["-namespace", "n", "-id", "i", "start"];
    bundle.write();
    let done = call(&bundle.dir, &args, "", stdin.write_to_bytes().unwrap());
    assert_ne!(done.code, 0);
    assert!(done.stdout.is_empty(), "{done:?}");
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    done.stderr
}

#[test]
fn what_is_wrong_with_a_handlers_options_is_said_in_one_line() {
    let test = Test::new("badoptions");
    let other = Any {
        type_url: "windows.options.v1.Options".into(),
        ..Default::default()
    };
    assert!(refused_start(&test, &other).contains("windows.options.v1.Options"));
    assert!(refused_start(&test, &options("vcpus = \"two\"")).contains("vcpus"));
    assert!(refused_start(&test, &options("[runtime]\nx = 1")).contains("runtime"));
    let path = Any {
        value: b"\x12\x12/no/such/file.toml".to_vec(),
        ..options("")
    };
    assert!(refused_start(&test, &path).contains("/no/such/file.toml"));
}

#[test]
fn a_missing_guest_image_is_named_by_create_and_leaves_nothing() {
    let test = Test::new("noimage");
    let bundle = Bundle::new(&test, "true");
    bundle.write();
    let stdin = options(&format!("{}kernel = \"/no/such/vmlinux\"\n", config(&test)));
    let namespace = test.id();
    let args = ["-namespace", &namespace, "-id", "c", "start"];
    let done = call(&bundle.dir, &args, "", stdin.write_to_bytes().unwrap());
    assert_eq!(done.code, 0, "{}", done.stderr);
    let task = Task::at(done.text()).unwrap();
    let error = task.create("c", bundle.dir.to_str().unwrap(), "");
    assert!(error.unwrap_err().to_string().contains("/no/such/vmlinux"));
    task.shutdown("c").unwrap();
    wait_for("the sandbox to go", || {
        fs::remove_dir(test.root().join(&namespace)).is_ok()
    });
}

fn process(id: &str, exec: &str) -> (String, String) {
    (id.to_owned(), exec.to_owned())
}

fn exec_request(id: &str, exec: &str, command: &[&str], stdin: &str) -> api::ExecProcessRequest {
    let spec =
        json!({"args": command, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]});
    let any = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: spec.to_string().into_bytes(),
        ..Default::default()
    };
    let (id, exec_id) = process(id, exec);
    api::ExecProcessRequest {
        id,
        exec_id,
        stdin: stdin.into(),
        spec: MessageField::some(any),
        ..Default::default()
    }
}

fn metrics(task: &Task, id: &str) -> ttrpc::Result<Metrics> {
    let request = api::StatsRequest {
        id: id.into(),
        ..Default::default()
    };
    let stats = task.client().stats(Task::context(), &request)?.stats;
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    Ok(Metrics::parse_from_bytes(&stats.value).unwrap())
}

#[test]
fn every_method_of_the_task_service_keeps_the_contract() {
    let test = Test::new("contract");
    let bundle = Bundle::new(&test, "while :; do sleep 1; done");
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    let task = shim.task();
    assert!(task.create("c", &dir, "").unwrap() > 0);
    assert_eq!(
        code_of(&task.create("c", &dir, "").unwrap_err()),
        Some(Code::ALREADY_EXISTS)
    );
    task.start("c", "").unwrap();

    let fifo = test.dir().join("stdin");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let exec = exec_request("c", "e", &["cat"], fifo.to_str().unwrap());
    task.client().exec(Task::context(), &exec).unwrap();
    task.start("c", "e").unwrap();
    pids_are_real(&task);
    // CloseIO may come before anybody wrote, and again.
    for _ in 0..2 {
        let (id, exec_id) = process("c", "e");
        let close = api::CloseIORequest {
            id,
            exec_id,
            stdin: true,
            ..Default::default()
        };
        task.client().close_io(Task::context(), &close).unwrap();
    }
    assert_eq!(
        task.wait("c", "e").unwrap(),
        0,
        "cat saw the end of its input"
    );
    kill_tells_who_is_there(&task);
    assert_eq!(task.delete("c", "e").unwrap(), 0);
    let connect = api::ConnectRequest {
        id: "c".into(),
        ..Default::default()
    };
    let connected = task.client().connect(Task::context(), &connect).unwrap();
    assert_eq!(connected.shim_pid, shim.pid());
    assert!(connected.task_pid > 0);
    assert!(metrics(&task, "c").unwrap().cpu.usage_usec > 0);
    let checkpoint = api::CheckpointTaskRequest {
        id: "c".into(),
        ..Default::default()
    };
    let refused = task.client().checkpoint(Task::context(), &checkpoint);
    assert_eq!(code_of(&refused.unwrap_err()), Some(Code::UNIMPLEMENTED));

    task.shutdown("c").unwrap();
    assert_eq!(
        code_of(&task.delete("c", "").unwrap_err()),
        Some(Code::FAILED_PRECONDITION),
        "a shutdown with a container does nothing, and one that runs is not deleted"
    );
    task.kill("c", 9).unwrap();
    assert_eq!(task.wait("c", "").unwrap(), 137);
    assert_eq!(metrics(&task, "c").unwrap().memory_events.oom_kill, 0);
    assert_eq!(task.delete("c", "").unwrap(), 137);
    assert_eq!(
        code_of(&task.state("c", "").unwrap_err()),
        Some(Code::NOT_FOUND)
    );
    task.shutdown("c").unwrap();
    let expected = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "delete",
        "exit",
        "delete",
    ];
    assert_eq!(
        shim.topics(),
        expected.map(|topic| format!("/tasks/{topic}"))
    );
}

/// Processes of the container, the exec by its name.
fn pids_are_real(task: &Task) {
    let request = api::PidsRequest {
        id: "c".into(),
        ..Default::default()
    };
    let pids = task.client().pids(Task::context(), &request).unwrap();
    assert!(pids.processes.len() >= 2, "{pids:?}");
    let named: Vec<_> = pids
        .processes
        .iter()
        .filter_map(|process| process.info.as_ref())
        .collect();
    assert_eq!(named.len(), 1);
    assert_eq!(named[0].type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(named[0].value, b"\x0a\x01e");
}

fn kill_tells_who_is_there(task: &Task) {
    let kill = |id: &str, exec: &str, signal: u32, all: bool| {
        let (id, exec_id) = process(id, exec);
        let request = api::KillRequest {
            id,
            exec_id,
            signal,
            all,
            ..Default::default()
        };
        let killed = task.client().kill(Task::context(), &request);
        killed.err().and_then(|error| code_of(&error))
    };
    assert_eq!(
        kill("c", "", 0, false),
        None,
        "signal 0 asks whether it lives"
    );
    assert_eq!(kill("c", "", 0, true), None);
    assert_eq!(
        kill("c", "e", 15, false),
        Some(Code::NOT_FOUND),
        "it has ended"
    );
    assert_eq!(kill("c", "f", 15, false), Some(Code::NOT_FOUND));
    assert_eq!(kill("d", "", 0, false), Some(Code::NOT_FOUND));
    assert_eq!(kill("c", "", 65, false), Some(Code::INVALID_ARGUMENT));
}

#[test]
fn an_end_for_want_of_memory_is_told_by_event_and_metrics_until_delete() {
    let test = Test::new("shimoom");
    let mut bundle = Bundle::new(&test, "tail /dev/zero");
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 16 << 20});
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    let task = shim.task();
    task.create("c", &dir, "").unwrap();
    task.start("c", "").unwrap();
    assert_eq!(task.wait("c", "").unwrap(), 137);
    assert!(metrics(&task, "c").unwrap().memory_events.oom_kill > 0);
    task.delete("c", "").unwrap();
    wait_for("the last event", || {
        shim.topics()
            .last()
            .is_some_and(|topic| topic == "/tasks/delete")
    });
    let topics = ["create", "start", "oom", "exit", "delete"];
    assert_eq!(shim.topics(), topics.map(|topic| format!("/tasks/{topic}")));
}

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
        let mut bundle = Bundle::new(&test, "echo out; echo err >&2; exit 4");
        bundle.config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "pod"});
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

#[test]
fn a_root_is_mounted_as_the_snapshotter_says() {
    let test = Test::new("rootfsmounts");
    let mut bundle = Bundle::new(&test, "touch /written && cat /marker");
    bundle.config["root"]["path"] = json!("rootfs");
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    let task = shim.task();
    let create = |mount: api::Mount| {
        let request = api::CreateTaskRequest {
            id: "c".into(),
            bundle: dir.clone(),
            rootfs: vec![mount],
            stdout: test.dir().join("out").display().to_string(),
            ..Default::default()
        };
        task.client().create(Task::context(), &request)
    };
    let unknown = api::Mount {
        type_: "format/erofs".into(),
        ..Default::default()
    };
    let error = create(unknown).unwrap_err();
    assert_eq!(code_of(&error), Some(Code::INVALID_ARGUMENT));
    assert!(error.to_string().contains("format/erofs"), "{error}");
    drop(shim);

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
    let request = api::CreateTaskRequest {
        id: "c".into(),
        bundle: dir.clone(),
        rootfs: vec![overlay],
        stdout: test.dir().join("out").display().to_string(),
        ..Default::default()
    };
    task.client().create(Task::context(), &request).unwrap();
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

#[test]
fn a_shim_that_was_killed_is_cleaned_up_by_delete_and_can_be_started_again() {
    let test = Test::new("shimcrash");
    let bundle = Bundle::new(&test, "sleep 600");
    let dir = bundle.write().to_owned();
    let shim = Shim::start(&test, &bundle.dir, "c");
    shim.task().create("c", &dir, "").unwrap();
    shim.task().start("c", "").unwrap();
    kill(shim.pid());
    let done = shim.delete();
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
    let response = api::DeleteResponse::parse_from_bytes(&done.stdout).unwrap();
    assert_eq!(response.exit_status, 137);
    assert!(response.pid > 0 && response.exited_at.seconds > 0);
    assert_eq!(shim.delete().code, 0, "it can be repeated");
    drop(shim);

    // And where nobody called delete, a start of the same name does its work.
    let shim = Shim::start(&test, &bundle.dir, "c");
    shim.task().create("c", &dir, "").unwrap();
    kill(shim.pid());
    let again = Shim::start_in(&test, Path::new(&dir), "c", &shim.namespace);
    again.task().create("c", &dir, "").unwrap();
    again.task().start("c", "").unwrap();
    again.task().kill("c", 9).unwrap();
    assert_eq!(again.task().wait("c", "").unwrap(), 137);
    again.task().delete("c", "").unwrap();
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// CRI-O takes no events, gives no options to `start`, and names a configuration with Create.
#[test]
fn cri_o_names_the_configuration_with_the_first_container() {
    let test = Test::new("crio");
    let bundle = Bundle::new(&test, "true");
    let dir = bundle.write().to_owned();
    let namespace = test.id();
    let args = [
        "-namespace",
        &namespace,
        "-address",
        "",
        "-publish-binary",
        "/usr/bin/crio",
        "-id",
        "c",
        "start",
    ];
    let done = call(&bundle.dir, &args, "", Vec::new());
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
    assert_eq!(
        fs::read_to_string(bundle.dir.join("address")).unwrap(),
        done.text()
    );
    let task = Task::at(done.text()).unwrap();
    let file = test.dir().join("coffer.toml");
    fs::write(
        &file,
        format!(
            "hypervisor = {:?}\nkernel_params = [\"crio=here\"]\n",
            test.hypervisor()
        ),
    )
    .unwrap();
    let create = |path: &str| {
        let mut value = vec![0x12, u8::try_from(path.len()).unwrap()];
        value.extend(path.as_bytes());
        let request = api::CreateTaskRequest {
            id: "c".into(),
            bundle: dir.clone(),
            options: MessageField::some(Any {
                value,
                ..options("")
            }),
            ..Default::default()
        };
        task.client().create(Task::context(), &request)
    };
    let missing = create("/no/such/coffer.toml").unwrap_err();
    assert_eq!(code_of(&missing), Some(Code::INVALID_ARGUMENT));
    assert!(missing.to_string().contains("/no/such/coffer.toml"));
    create(file.to_str().unwrap()).unwrap();
    let root = Path::new("/run/coffer").join(&namespace);
    let state = fs::read_to_string(root.join("c/state.json")).unwrap();
    assert!(state.contains("crio=here"), "{state}");
    task.start("c", "").unwrap();
    assert_eq!(task.wait("c", "").unwrap(), 0);
    task.delete("c", "").unwrap();
    task.shutdown("c").unwrap();
    wait_for("the sandbox to go", || fs::remove_dir(&root).is_ok());
}
