//! Block devices of the host in containers: as a raw device (`volumeDevices`, `--device`), and as a file system that the host mounts.

use coffer_tests::bundle::Bundle;
use coffer_tests::loop_device::{LoopDevice, SIZE};
use coffer_tests::pod::Pod;
use coffer_tests::{Test, host};
use nix::sys::stat::{major, minor, stat};
use serde_json::json;
use std::fs;

/// Where the containers have the device.
const DEVICE: &str = "/dev/xvda";

/// Gives a device to a container as an engine does: a node, and a rule.
fn give(disk: &LoopDevice, bundle: &mut Bundle, path: &str, access: &str) {
    let number = stat(&disk.device).unwrap().st_rdev;
    let (major, minor) = (major(number), minor(number));
    let node = json!({"path": path, "type": "b", "major": major, "minor": minor, "fileMode": 0o640, "uid": 0, "gid": 6});
    let rule =
        json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access});
    bundle.push("/linux/resources/devices", rule);
    let linux = bundle.config["linux"].as_object_mut().unwrap();
    let devices = linux.entry("devices").or_insert(json!([]));
    devices.as_array_mut().unwrap().push(node);
}

#[test]
fn a_container_writes_to_a_block_device_of_the_host() {
    let test = Test::new("blk-write");
    let disk = LoopDevice::new(&test, "disk");
    let script = "stat -c '%F %a %u %g' /dev/xvda; cat /dev/xvda | wc -c; dd if=/dev/xvda bs=1M count=1 2>/dev/null | sha256sum
        echo written by the guest | dd of=/dev/xvda bs=4k seek=512 conv=notrunc,fsync 2>/dev/null; cat /sys/block/vda/ro";
    let mut bundle = Bundle::new(&test, script);
    give(&disk, &mut bundle, DEVICE, "rwm");
    let done = bundle.run(&test);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let lines: Vec<_> = done.text().lines().collect();
    let sum = host(
        "sh",
        &[
            "-c",
            &format!("head -c 1M {} | sha256sum", disk.image.display()),
        ],
    );
    assert_eq!(lines[0], "block special file 640 0 6");
    assert_eq!(lines[1], SIZE.to_string());
    assert_eq!(lines[2], sum.unwrap().trim());
    assert_eq!(lines[3], "0");
    assert_eq!(disk.read(512 * 4096, 21), b"written by the guest\n");
}

#[test]
fn a_device_that_may_only_be_read_is_read_only_in_the_vm() {
    let test = Test::new("blk-ro");
    let disk = LoopDevice::new(&test, "disk");
    let before = disk.read(0, 4096);
    let script = "cat /sys/block/vda/ro; dd if=/dev/xvda bs=1M count=1 2>/dev/null | sha256sum
        echo x 2>/dev/null > /dev/xvda || echo refused";
    let mut bundle = Bundle::new(&test, script);
    give(&disk, &mut bundle, DEVICE, "rm");
    let done = bundle.run(&test);
    let lines: Vec<_> = done.text().lines().collect();
    let sum = host(
        "sh",
        &[
            "-c",
            &format!("head -c 1M {} | sha256sum", disk.image.display()),
        ],
    );
    assert_eq!(
        lines,
        ["1", sum.unwrap().trim(), "refused"],
        "{}",
        done.stderr
    );
    assert_eq!(disk.read(0, 4096), before);
}

#[test]
fn what_a_container_wrote_into_a_file_system_of_its_own_is_on_the_device_after_it() {
    let test = Test::new("blk-fs");
    let disk = LoopDevice::new(&test, "disk");
    host("mkfs.ext4", &["-q", "-F", disk.name()]).unwrap();
    // Neither unmounted nor synced.
    let script = "mkdir -p /mnt; mount -t ext4 /dev/xvda /mnt && echo kept > /mnt/file";
    let mut bundle = Bundle::on(&test, &test.copy_of("busybox"), &["/bin/sh", "-c", script]);
    for set in ["bounding", "effective", "permitted"] {
        bundle.push(
            &format!("/process/capabilities/{set}"),
            json!("CAP_SYS_ADMIN"),
        );
    }
    give(&disk, &mut bundle, DEVICE, "rwm");
    let done = bundle.run(&test);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let point = test.dir().join("point");
    fs::create_dir(&point).unwrap();
    let point = point.to_str().unwrap();
    host("mount", &["-o", "ro", disk.name(), point]).unwrap();
    let kept = fs::read_to_string(format!("{point}/file"));
    host("umount", &[point]).unwrap();
    assert_eq!(kept.unwrap(), "kept\n");
}

#[test]
fn a_file_system_on_a_block_volume_is_a_volume() {
    let test = Test::new("blk-mounted");
    let disk = LoopDevice::new(&test, "disk");
    host("mkfs.ext4", &["-q", "-F", disk.name()]).unwrap();
    let point = test.dir().join("point");
    fs::create_dir(&point).unwrap();
    let point = point.to_str().unwrap();
    host("mount", &[disk.name(), point]).unwrap();
    let mut bundle = Bundle::on(
        &test,
        &test.copy_of("busybox"),
        &[
            "/bin/sh",
            "-c",
            "echo guest > /v/file; test -d /v/lost+found && echo ext4",
        ],
    );
    bundle.push(
        "/mounts",
        json!({"destination": "/v", "type": "bind", "source": point, "options": ["rbind", "rw"]}),
    );
    let done = bundle.run(&test);
    let file = fs::read_to_string(format!("{point}/file"));
    host("umount", &[point]).unwrap();
    assert_eq!((done.code, done.text()), (0, "ext4"), "{}", done.stderr);
    assert_eq!(file.unwrap(), "guest\n");
}

#[test]
fn a_device_that_the_host_has_not_is_named() {
    let test = Test::new("blk-none");
    let mut bundle = Bundle::new(&test, "true");
    bundle.config["linux"]["devices"] =
        json!([{"path": DEVICE, "type": "b", "major": 4000, "minor": 3}]);
    let done = bundle.run(&test);
    assert_eq!(done.code, 125);
    let expected = "/dev/xvda: the host has no block device 4000:3";
    assert!(done.stderr.contains(expected), "{}", done.stderr);
}

/// A container of the pod that has the disk.
fn with_disk(pod: &Pod<'_>, script: &str, disk: &LoopDevice) -> Bundle {
    let mut bundle = pod.bundle(script);
    give(disk, &mut bundle, DEVICE, "rwm");
    bundle
}

/// More containers, one after the other, than the VM has places for disks; and two that have the same disk.
#[test]
fn disks_come_and_go_with_the_containers_of_a_pod() {
    let test = Test::new("blk-late");
    let pod = Pod::new(&test);
    let disks: Vec<_> = (0..2)
        .map(|n| LoopDevice::new(&test, &format!("disk{n}")))
        .collect();
    let hold = |n: usize| {
        with_disk(
            &pod,
            "echo $0 | dd of=/dev/xvda conv=notrunc,fsync 2>/dev/null; sleep 600",
            &disks[n],
        )
    };
    if test.hypervisor() != "coffer-vmm" {
        let error = pod.start("late", &hold(0)).unwrap_err().to_string();
        assert!(
            error.contains("/dev/xvda") && error.contains("QEMU"),
            "{error}"
        );
        assert_eq!(pod.sandbox.sh("echo alive"), "alive");
        return;
    }
    pod.start("first", &hold(0)).unwrap();
    for round in 0..6 {
        let offset = 1 + round;
        let script = format!(
            "echo round {round} | dd of=/dev/xvda bs=4k seek={offset} conv=notrunc 2>/dev/null; ls -d /sys/block/vd*"
        );
        let (id, disk) = (format!("round{round}"), &disks[round as usize % 2]);
        let out = pod.start(&id, &with_disk(&pod, &script, disk)).unwrap();
        assert_eq!(pod.end(&id), 0);
        assert_eq!(
            disk.read(offset * 4096, 8),
            format!("round {round}\n").as_bytes()
        );
        // The one that "first" holds, and that of this round where it is the other.
        let seen = fs::read_to_string(out).unwrap();
        assert_eq!(seen.lines().count(), 1 + round as usize % 2, "{seen}");
    }
    assert_eq!(pod.sandbox.sh("ls -d /sys/block/vd*").lines().count(), 1);
    pod.kill("first");
    assert_eq!(
        pod.sandbox.sh("ls -d /sys/block/vd* 2>/dev/null | wc -l"),
        "0"
    );
}

#[test]
fn a_container_without_a_free_place_for_its_disk_is_refused_and_leaves_nothing() {
    let test = Test::new("blk-full");
    let disks: Vec<_> = (0..5)
        .map(|n| LoopDevice::new(&test, &format!("disk{n}")))
        .collect();
    let give_all = |bundle: &mut Bundle| {
        for (n, disk) in disks.iter().enumerate() {
            give(disk, bundle, &format!("/dev/xvd{n}"), "rwm");
        }
    };
    if test.hypervisor() != "coffer-vmm" {
        let mut greedy = Bundle::new(&test, "true");
        give_all(&mut greedy);
        let done = greedy.run(&test);
        assert_eq!(done.code, 125);
        assert!(done.stderr.contains("device slots"), "{}", done.stderr);
        return;
    }
    let pod = Pod::new(&test);
    let mut greedy = pod.bundle("true");
    give_all(&mut greedy);
    let error = pod.start("greedy", &greedy).unwrap_err().to_string();
    assert!(
        error.contains("/dev/xvd4") && error.contains("all are taken"),
        "{error}"
    );
    assert_eq!(
        pod.sandbox.sh("ls -d /sys/block/vd* 2>/dev/null | wc -l"),
        "0"
    );
    let modest = with_disk(&pod, "true", &disks[4]);
    assert_eq!(pod.run("modest", &modest).0, 0);
}
