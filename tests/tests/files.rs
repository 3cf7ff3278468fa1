//! Root file systems and volumes through virtio-fs.

use coffer_tests::bundle::Bundle;
use coffer_tests::{Background, Test, asset, finish, host, noise, sha256_of};
use serde_json::json;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::Path;

/// A scratch directory to be mounted as a volume.
fn volume(test: &Test) -> std::path::PathBuf {
    let volume = test.dir().join("v");
    fs::create_dir(&volume).unwrap();
    volume
}

/// Gives root in the container a capability that containers usually lack.
fn add_capability(bundle: &mut Bundle, name: &str) {
    for set in ["bounding", "effective", "permitted"] {
        bundle.push(&format!("/process/capabilities/{set}"), json!(name));
    }
}

#[test]
fn a_volume_is_seen_from_both_sides() {
    let test = Test::new("volume");
    let volume = volume(&test);
    fs::write(volume.join("from-host"), "hello guest").unwrap();
    let bind = format!("{}:/vol", volume.display());
    let rootfs = test.copy_of("busybox");
    let sandbox = test.background_on(
        &["--rootfs", rootfs.to_str().unwrap()],
        &["--volume", &bind],
        &["sleep", "600"],
    );
    assert_eq!(sandbox.sh("cat /vol/from-host"), "hello guest");
    sandbox.sh("cd /vol; echo hello host > from-guest; chown 12:34 from-guest; chmod 640 from-guest; ln -s from-guest link");
    assert_eq!(
        fs::read_to_string(volume.join("from-guest")).unwrap(),
        "hello host\n"
    );
    let meta = fs::metadata(volume.join("from-guest")).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o777),
        (12, 34, 0o640)
    );
    assert_eq!(
        fs::read_link(volume.join("link")).unwrap().to_str(),
        Some("from-guest")
    );
    fs::write(volume.join("later"), "new").unwrap();
    assert_eq!(sandbox.sh("cat /vol/later"), "new");
}

#[test]
fn a_read_only_volume_and_root_stay_as_they_are() {
    let test = Test::new("readonly");
    let volume = volume(&test);
    fs::write(volume.join("f"), "kept").unwrap();
    let rootfs = test.copy_of("busybox");
    // With CAP_SYS_ADMIN, so that nothing but the host stops the guest's root.
    let script = "echo x > /vol/f; rm -f /vol/f; mount -o remount,rw /vol; mount -o remount,bind,rw /vol; echo x > /vol/f; touch /vol/g; \
                  mount -o remount,rw /; touch /made; echo x >> /etc/passwd; true";
    let mut bundle = Bundle::on(&test, &rootfs, &["/bin/sh", "-c", script]);
    bundle.config["root"]["readonly"] = json!(true);
    bundle.push("/mounts", json!({"destination": "/vol", "type": "bind", "source": volume, "options": ["rbind", "ro"]}));
    add_capability(&mut bundle, "CAP_SYS_ADMIN");
    let before = fs::read_to_string(rootfs.join("etc/passwd")).unwrap();
    let done = bundle.run(&test);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.stderr.contains("Read-only file system"),
        "{}",
        done.stderr
    );
    assert_eq!(fs::read_to_string(volume.join("f")).unwrap(), "kept");
    assert!(!volume.join("g").exists() && !rootfs.join("made").exists());
    assert_eq!(
        fs::read_to_string(rootfs.join("etc/passwd")).unwrap(),
        before
    );
}

#[test]
fn large_and_sparse_files_are_equal_by_checksum() {
    let test = Test::new("bulk");
    let volume = volume(&test);
    let sparse = File::create(volume.join("sparse")).unwrap();
    sparse.set_len(4 << 30).unwrap();
    for (offset, seed) in [(0, 1), (3 << 30, 2), ((4 << 30) - 4096, 3)] {
        sparse.write_all_at(&noise(4096, seed), offset).unwrap();
    }
    fs::write(volume.join("large"), noise(32 << 20, 9)).unwrap();
    let bind = format!("{}:/tmp", volume.display());
    let sandbox = test.background(&["--volume", &bind, "--memory", "512m"], &["sleep", "600"]);
    same_on_both_sides(&sandbox, &volume, "sha256sum < /tmp/large");
    // Reading 4 GiB of zeroes takes emulation minutes; the islands and pieces of what is between tell as much.
    let islands = "for o in 0 786432 1048575 500000; do dd if=/tmp/sparse bs=4096 skip=$o count=1 2>/dev/null; done | sha256sum; stat -c '%s %b' /tmp/sparse";
    same_on_both_sides(&sandbox, &volume, islands);
    // And the other way: written in the guest, read on the host.
    sandbox.sh("cp /tmp/large /tmp/back; dd if=/dev/urandom of=/tmp/hole bs=4096 seek=1000000 count=1 2>/dev/null");
    let sum = |name: &str| sha256_of(&volume.join(name)).unwrap();
    assert_eq!(sum("back"), sum("large"));
    let hole = fs::metadata(volume.join("hole")).unwrap();
    assert!(
        hole.len() == 1_000_001 * 4096 && hole.blocks() * 512 < 1 << 20,
        "{hole:?}"
    );
}

/// Runs a script on /tmp in the guest and on the volume here, and wants the same output.
fn same_on_both_sides(sandbox: &Background<'_>, volume: &Path, script: &str) {
    let here = script.replace("/tmp", volume.to_str().unwrap());
    assert_eq!(
        sandbox.sh(script),
        host("sh", &["-c", &here]).unwrap().trim_end(),
        "{script}"
    );
}

fn small_files(name: &str, count: usize) {
    let test = Test::new(name);
    let volume = volume(&test);
    for i in 0..count {
        let dir = volume.join("many").join((i / 100).to_string());
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(i.to_string()), format!("file {i}")).unwrap();
    }
    let bind = format!("{}:/tmp", volume.display());
    let sandbox = test.background(&["--volume", &bind, "--memory", "512m"], &["sleep", "3600"]);
    // A thousand at a time: in an emulated node every file takes its while.
    for first in (0..count / 100).step_by(10) {
        let dirs = format!("$(seq {first} {})", first + 9);
        let sums = format!("cd /tmp/many && find {dirs} -type f | sort | xargs cat | sha256sum");
        same_on_both_sides(&sandbox, &volume, &sums);
    }
    same_on_both_sides(&sandbox, &volume, "find /tmp/many -type f | wc -l");
    sandbox.sh("cp -r /tmp/many/3 /tmp/three");
    assert_eq!(fs::read_dir(volume.join("three")).unwrap().count(), 100);
}

#[test]
fn a_thousand_small_files_are_equal_by_checksum() {
    small_files("thousand", 1_000);
}

/// Every file is some round trips; in the emulated node they take minutes, so there this one runs with `--heavy` only.
#[test]
fn ten_thousand_small_files_are_equal_by_checksum() {
    small_files("tenthousand", 10_000);
}

#[test]
fn a_guest_makes_no_device_that_the_host_would_open() {
    let test = Test::new("mknod");
    let volume = volume(&test);
    let script =
        "mknod /tmp/disk b 8 0; mknod /tmp/zero c 1 5; head -c 1 /tmp/zero; touch /tmp/ran";
    let mut bundle = Bundle::new(&test, script);
    bundle.push("/mounts", json!({"destination": "/tmp", "type": "bind", "source": volume, "options": ["rbind", "rw"]}));
    add_capability(&mut bundle, "CAP_MKNOD");
    bundle.run(&test);
    assert!(volume.join("ran").exists());
    for name in ["disk", "zero"] {
        let kind = fs::symlink_metadata(volume.join(name)).map(|meta| meta.file_type());
        assert!(
            !kind.is_ok_and(|t| t.is_block_device() || t.is_char_device()),
            "{name} is a device on the host"
        );
    }
}

#[test]
fn symlinks_in_a_volume_lead_nowhere_on_the_host() {
    let test = Test::new("links");
    let (volume, secret) = (volume(&test), test.dir().join("secret"));
    fs::write(&secret, "of the host").unwrap();
    symlink(&secret, volume.join("absolute")).unwrap();
    symlink("../secret", volume.join("relative")).unwrap();
    let bind = format!("{}:/tmp", volume.display());
    let script = "cat /tmp/absolute; cat /tmp/relative; echo mine > /tmp/relative; echo end";
    // The relative link names a file in the root, which is written.
    let root = test.copy_of("busybox");
    let options = ["--volume", &bind, "--rootfs", root.to_str().unwrap(), "--"];
    let command = ["/bin/sh", "-c", script];
    let done = finish(test.run_command(&[&options[..], &command].concat()));
    assert!(
        done.text().ends_with("end") && !done.text().contains("of the host"),
        "{}",
        done.text()
    );
    assert_eq!(fs::read_to_string(&secret).unwrap(), "of the host");
}

#[test]
fn locks_renames_links_and_times_work() {
    let test = Test::new("posix");
    let bind = format!("{}:/mnt", volume(&test).display());
    let script = r#"
        set -e; cd /mnt
        perl -e 'use Fcntl ":flock"; open F, ">l"; flock(F, LOCK_EX|LOCK_NB) or die; open G, "l"; flock(G, LOCK_EX|LOCK_NB) and die "two locks"'
        echo a > a; mv a b; ln b c; test "$(stat -c %h b)" = 2; rm c
        perl -e 'open F, ">gone"; print F "x"; unlink "gone"; print F "still open" or die; close F or die'
        truncate -s 12345 b; test "$(stat -c %s b)" = 12345; mkfifo fifo; test -p fifo
        touch -d 2001-02-03 b; stat -c %y b"#;
    let rootfs = asset("debian");
    let options = [
        "--volume",
        &bind,
        "--rootfs",
        rootfs.to_str().unwrap(),
        "--",
        "/bin/bash",
        "-c",
        script,
    ];
    let done = finish(test.run_command(&options));
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(done.text().starts_with("2001-02-03"), "{}", done.text());
}
