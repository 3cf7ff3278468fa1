//! The binary's own words: `-info`, `start`, and `delete` after a crash.

use coffer_tests::bundle::Bundle;
use coffer_tests::shim::{Shim, call, config, options};
use coffer_tests::task::{Task, code_of};
use coffer_tests::{Test, wait_for};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use serde_json::json;
use std::fs;
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
