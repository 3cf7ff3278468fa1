//! Bad input: one clear line, an exit status, and nothing left behind (the harness looks).

use coffer_tests::bundle::Bundle;
use coffer_tests::{Finished, Test, asset, finish, host, product};
use serde_json::json;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Checks for one line on stderr, besides the warning about emulation, that has these words.
fn refused(done: &Finished, words: &[&str]) {
    assert_ne!(done.code, 0);
    let lines: Vec<_> = done
        .stderr
        .lines()
        .filter(|l| !l.is_empty() && !l.contains("software emulation"))
        .collect();
    assert_eq!(lines.len(), 1, "not one line: {}", done.stderr);
    for word in words {
        assert!(lines[0].contains(word), "{word:?} is not in: {}", lines[0]);
    }
}

#[test]
fn bundles_that_can_not_be() {
    let test = Test::new("badbundle");
    let run = |args: &[&str]| finish(test.run_command(args));
    let empty = test.dir().join("empty");
    fs::create_dir(&empty).unwrap();
    refused(
        &run(&["--bundle", empty.to_str().unwrap()]),
        &["config.json"],
    );
    refused(&run(&["--bundle", "/no/such/bundle"]), &["/no/such/bundle"]);

    let mut bundle = Bundle::new(&test, "true");
    bundle.config["process"]["user"]["uid"] = json!("root");
    refused(&bundle.run(&test), &["process.user.uid"]);
    let mut bundle = Bundle::new(&test, "true");
    bundle.config["root"]["path"] = json!("/etc/passwd");
    refused(&bundle.run(&test), &["root.path", "/etc/passwd"]);
    let link = test.dir().join("link");
    symlink(asset("busybox"), &link).unwrap();
    bundle.config["root"]["path"] = json!(link);
    refused(&bundle.run(&test), &["root.path", "symlink"]);
    fs::write(bundle.dir.join("config.json"), "{\"ociVersion\": ").unwrap();
    refused(
        &run(&["--bundle", bundle.dir.to_str().unwrap()]),
        &["config.json"],
    );
}

#[test]
fn options_that_can_not_be() {
    let test = Test::new("badoption");
    let rootfs = asset("busybox");
    let cases: [(&[&str], &str); 6] = [
        (&["--memory", "lots"], "lots"),
        (&["--memory", "1m"], "1m"),
        (&["--volume", "/no/such:/x"], "/no/such"),
        (&["--volume", "relative"], "relative"),
        (&["--id", "../x"], "../x"),
        (&["--user", "nobody-here"], "nobody-here"),
    ];
    for (options, word) in cases {
        let done = finish(
            test.run_command(
                &[
                    options,
                    &["--rootfs", rootfs.to_str().unwrap(), "--", "true"],
                ]
                .concat(),
            ),
        );
        assert!(
            done.code != 0 && done.stderr.contains(word),
            "{options:?}: {}",
            done.stderr
        );
    }
    refused(&test.call(&["state", "nothing-here"]), &["nothing-here"]);
    refused(
        &test.call(&["exec", "nothing-here", "--", "true"]),
        &["nothing-here"],
    );
}

#[test]
fn layouts_that_can_not_be() {
    let test = Test::new("badlayout");
    let layout = test.copy_of("busybox-layout");
    let run = |path: &Path| finish(test.run_command(&[path.to_str().unwrap(), "--", "true"]));
    // A layer whose bytes are not those of its digest, then one that is gone.
    let blobs = fs::read_dir(layout.join("blobs/sha256"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let layer = blobs
        .max_by_key(|path| path.metadata().unwrap().len())
        .unwrap();
    let digest = layer.file_name().unwrap().to_str().unwrap();
    let mut bytes = fs::read(&layer).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&layer, bytes).unwrap();
    refused(&run(&layout), &[digest]);
    fs::remove_file(&layer).unwrap();
    refused(&run(&layout), &[digest]);
    fs::write(layout.join("index.json"), "[]").unwrap();
    refused(&run(&layout), &["index.json"]);
    refused(&run(&test.dir().join("no-layout")), &["no-layout"]);
}

/// A copy of the product directory in which one file is replaced or missing.
fn product_with(test: &Test, name: &str, content: Option<&[u8]>) -> PathBuf {
    let dir = test.dir().join(format!("product-{}", test.id()));
    fs::create_dir(&dir).unwrap();
    for entry in fs::read_dir(product("")).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap();
        if file != name && path.is_file() {
            fs::copy(&path, dir.join(file)).unwrap();
        }
    }
    if let Some(content) = content {
        fs::write(dir.join(name), content).unwrap();
    }
    dir
}

#[test]
fn a_broken_guest_image_is_named() {
    let test = Test::new("badimage");
    let kernel = fs::read(product("vmlinux")).unwrap();
    let truncated = &kernel[..kernel.len() / 3];
    let cases = [
        ("vmlinux", Some(truncated)),
        ("vmlinux", None),
        ("initrd", Some(&b""[..])),
        ("initrd", None),
    ];
    for (name, content) in cases {
        let dir = product_with(&test, name, content);
        let mut command = Command::new(dir.join("coffer"));
        command.arg("--root").arg(test.root()).args([
            "run",
            "--hypervisor",
            test.hypervisor(),
            "--rootfs",
        ]);
        command.arg(asset("busybox")).args(["--", "true"]);
        refused(&finish(command), &[name]);
        fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn a_full_state_directory_is_told() {
    let test = Test::new("full");
    let small = test.dir().join("small");
    fs::create_dir(&small).unwrap();
    host(
        "mount",
        &[
            "-t",
            "tmpfs",
            "-o",
            "size=8k",
            "tmpfs",
            small.to_str().unwrap(),
        ],
    )
    .unwrap();
    fs::create_dir(small.join("state")).unwrap();
    let fill = fs::write(small.join("fill"), vec![0; 64 << 10]);
    let mut command = Command::new(product("coffer"));
    command.arg("--root").arg(small.join("state")).args([
        "run",
        "--hypervisor",
        test.hypervisor(),
        "--rootfs",
    ]);
    command.arg(asset("busybox")).args(["--", "true"]);
    let done = finish(command);
    let left = fs::read_dir(small.join("state")).unwrap().count();
    host("umount", &[small.to_str().unwrap()]).unwrap();
    assert!(fill.is_err(), "the file system was not full");
    refused(&done, &["No space left"]);
    assert_eq!(left, 0, "something was left in the state directory");
}
