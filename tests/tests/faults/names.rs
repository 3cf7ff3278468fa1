//! Names that can be none, and names that are only odd.

use crate::created;
use coffer_tests::bundle::Bundle;
use coffer_tests::shim::{config, options};
use coffer_tests::task::code_of;
use coffer_tests::{Test, asset, finish, finish_with_input};
use containerd_shim_protos::protobuf::Message;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use ttrpc::Code;

fn impossible() -> [String; 5] {
    [
        "new\nline".to_owned(),
        "n".repeat(4096),
        "../up".to_owned(),
        "a/b".to_owned(),
        "nul\0".to_owned(),
    ]
}

#[test]
fn ids_that_can_not_be_are_refused_in_one_line_and_nothing_is_made() {
    let test = Test::new("oddids");
    let (shim, task, dir) = created(&test, "sleep 600");
    task.start("c", "").unwrap();
    for id in impossible() {
        let refusals = [
            task.create(&id, &dir, "").map(drop).unwrap_err(),
            task.exec("c", &id, &["true"], false).unwrap_err(),
            task.state(&id, "").map(drop).unwrap_err(),
        ];
        for error in refusals {
            assert_eq!(code_of(&error), Some(Code::INVALID_ARGUMENT), "{id:?}");
            let message = error.to_string();
            assert!(
                message.lines().count() == 1 && message.len() < 1024,
                "{message}"
            );
        }
    }
    task.kill("c", 9).unwrap();
    task.wait("c", "").unwrap();
    task.delete("c", "").unwrap();
    drop((task, shim));

    // And where the sandbox itself would have such a name: a start, and a run.
    let bundle = Bundle::new(&test, "true");
    bundle.write();
    let stdin = options(&config(&test)).write_to_bytes().unwrap();
    for id in &impossible()[..4] {
        let args = ["-namespace", "n", "-id", id, "start"];
        let done = coffer_tests::shim::call(&bundle.dir, &args, "", stdin.clone());
        assert!(done.code != 0 && done.stdout.is_empty(), "{done:?}");
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
        let run = ["--id", id, "--bundle", bundle.dir.to_str().unwrap()];
        let done = finish(test.run_command(&run));
        assert_ne!(done.code, 0, "{id:?}");
    }
    // No text at all.
    let mut command = test.run_command(&["--rootfs", asset("busybox").to_str().unwrap(), "--id"]);
    command.arg(OsStr::from_bytes(b"\xff\xfe")).arg("true");
    let done = finish_with_input(command, Vec::new());
    assert!(
        done.code != 0 && !done.stderr.contains("panicked"),
        "{done:?}"
    );
    assert!(
        fs::read_dir(test.root()).unwrap().next().is_none(),
        "something was made"
    );
}

/// A path is no name: whatever Linux allows works.
#[test]
fn a_bundle_and_a_volume_with_odd_paths_work() {
    let test = Test::new("oddpaths");
    let volume = test.dir().join("a volume\nwith \"all\" of it, \u{1f4e6}");
    fs::create_dir(&volume).unwrap();
    let mut bundle = Bundle::new(&test, "cat '/odd\nplace/file'");
    bundle.push(
        "/mounts",
        serde_json::json!({
            "destination": "/odd\nplace", "type": "bind", "source": volume, "options": ["rbind"],
        }),
    );
    bundle.config["root"]["path"] = serde_json::json!(test.copy_of("busybox"));
    fs::write(volume.join("file"), "found\n").unwrap();
    let odd = test.dir().join(format!("bundle\n{}", "n".repeat(200)));
    bundle.write();
    fs::rename(&bundle.dir, &odd).unwrap();
    bundle.dir = odd;
    let done = bundle.run(&test);
    assert_eq!((done.code, done.text()), (0, "found"), "{}", done.stderr);
}
