//! The product is replaced on disk while a pod runs.

use coffer_tests::bundle::Bundle;
use coffer_tests::task::Task;
use coffer_tests::{Test, asset, finish, product};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

fn copy_of_the_product(test: &Test) -> PathBuf {
    let dir = test.dir().join("product");
    fs::create_dir(&dir).unwrap();
    for entry in fs::read_dir(product("")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
        }
    }
    dir
}

/// As a package manager does: another file takes the name.
fn replace(path: &Path, content: &[u8]) {
    let new = path.with_extension("new");
    fs::write(&new, content).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(new, path).unwrap();
}

#[test]
fn a_pod_goes_on_when_all_of_the_product_is_replaced() {
    let test = Test::new("upgrade");
    let dir = copy_of_the_product(&test);
    let id = test.id();
    let coffer = |args: &[&str]| {
        let mut command = Command::new(dir.join("coffer"));
        command.arg("--root").arg(test.root()).args(args);
        finish(command)
    };
    let root = asset("busybox");
    let root = root.to_str().unwrap();
    let run = ["run", "-d", "--hypervisor", test.hypervisor(), "--id", &id];
    let done = coffer(&[&run[..], &["--rootfs", root, "--", "sleep", "600"]].concat());
    assert_eq!(done.code, 0, "{}", done.stderr);

    // The new version has a command line like the old one's; all else of it would not work with the pod that runs.
    let kept = fs::read(dir.join("coffer")).unwrap();
    for entry in fs::read_dir(&dir).unwrap() {
        replace(&entry.unwrap().path(), b"#!/bin/sh\nexit 1\n");
    }
    replace(&dir.join("coffer"), &kept);
    let exec = coffer(&["exec", &id, "--", "echo", "still here"]);
    assert_eq!(
        (exec.code, exec.text()),
        (0, "still here"),
        "{}",
        exec.stderr
    );

    let task = Task::connect(&test.root(), &id).unwrap();
    let bundle = Bundle::new(&test, "exit 9").in_sandbox(&id);
    task.create("second", bundle.write(), "").unwrap();
    task.start("second", "").unwrap();
    assert_eq!(task.wait("second", "").unwrap(), 9);
    task.delete("second", "").unwrap();

    let deleted = coffer(&["delete", "--force", &id]);
    assert_eq!(deleted.code, 0, "{}", deleted.stderr);
    // The next one is the new version's.
    let next = coffer(&[
        "run",
        "--hypervisor",
        test.hypervisor(),
        "--rootfs",
        root,
        "--",
        "true",
    ]);
    assert_ne!(next.code, 0);
}
