//! What a kubelet mounts into containers.

use crate::{APP, COFFER};
use coffer_tests::cri::pod::refusal;
use coffer_tests::cri::{Node, Pod};
use coffer_tests::loop_device::LoopDevice;
use coffer_tests::mounted::Mounted;
use coffer_tests::{asset, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

/// The group that the pod's volumes belong to (`fsGroup`).
const FS_GROUP: u32 = 2345;

fn mount(from: &Path, to: &str, read_only: bool) -> Value {
    json!({"host_path": from, "container_path": to, "readonly": read_only})
}

/// Lets `..data` of a configMap volume name another directory, as the kubelet's atomic writer does.
fn publish(volume: &Path, version: &str, content: &str) {
    fs::create_dir(volume.join(version)).unwrap();
    fs::write(volume.join(version).join("key"), content).unwrap();
    symlink(version, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
}

/// Prints the name of what is moved into a directory; busybox has no tool for it, but there is Debian's perl.
const WATCHER: &str = r#"exec chroot /debian perl -e '
    $| = 1; my $fd = syscall(294, 0); my $watched = "/mnt"; syscall(254, $fd, $watched, 0x80) >= 0 or die "add_watch: $!";
    print "watching\n"; open(my $events, "<&=", $fd) or die;
    while (sysread($events, my $event, 4096)) { print unpack("Z*", substr($event, 16)), "\n" }'"#;

pub fn volumes(node: &Node<'_>) {
    let dir = |name: &str| {
        let dir = node.test.dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    };
    let (config_map, disk, memory, tree) = (
        dir("volumes/kubernetes.io~configmap/config"),
        dir("disk"),
        dir("memory"),
        dir("tree"),
    );
    publish(&config_map, "..v1", "one");
    symlink("..data/key", config_map.join("key")).unwrap();
    // As the kubelet does for an fsGroup.
    chown(&disk, None, Some(FS_GROUP)).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o2775)).unwrap();
    let _tmpfs = Mounted::new(&memory, &["-t", "tmpfs", "-o", "size=1m", "tmpfs"]);
    fs::create_dir_all(tree.join("sub/path")).unwrap();
    fs::write(tree.join("sub/path/file"), "below").unwrap();
    let (hosts, termination) = (
        node.test.dir().join("hosts"),
        node.test.dir().join("termination"),
    );
    fs::write(&hosts, "127.0.0.1 localhost\n192.0.2.9 named.test named\n").unwrap();
    fs::write(&termination, "").unwrap();
    let mounts = json!({"mounts": [
        mount(&config_map, "/etc/config", true),
        mount(&disk, "/data", false),
        mount(&memory, "/cache", false),
        mount(&tree, "/tree", false),
        mount(&tree, "/tree-ro", true),
        mount(&tree.join("sub/path"), "/sub", false),
        mount(&tree.join("sub/path/file"), "/etc/one-file", true),
        mount(&hosts, "/etc/hosts", false),
        mount(&termination, "/dev/termination-log", false),
    ]});
    let pod = node.pod(COFFER, "volumes", json!({}));
    let one = pod.sh("one", APP, mounts.clone());
    let user =
        json!({"run_as_user": {"value": "1000"}, "supplemental_groups": [FS_GROUP.to_string()]});
    let mut of_user = mounts;
    of_user["linux"] = json!({"security_context": user});
    let two = pod.sh("two", APP, of_user);
    let watched = json!({"mounts": [
        mount(&asset("debian"), "/debian", true),
        mount(Path::new("/dev"), "/debian/dev", false),
        mount(&config_map, "/debian/mnt", true),
    ]});
    let watcher = pod.sh("watcher", WATCHER, watched);
    wait_for("the watcher", || watcher.logged("stdout") == ["watching"]);

    assert_eq!(
        one.sh("cat /etc/config/key /etc/one-file /sub/file"),
        "onebelowbelow"
    );
    publish(&config_map, "..v2", "two");
    fs::remove_dir_all(config_map.join("..v1")).unwrap();
    wait_for("the update of the configMap", || {
        one.exec("cat /etc/config/key").stdout == "two"
    });
    wait_for("its event", || {
        watcher.logged("stdout").contains(&"..data".to_owned())
    });
    for read_only in ["/etc/config/x", "/tree-ro/x", "/etc/one-file"] {
        let done = one.exec(&format!("echo x > {read_only}"));
        assert!(
            done.code != 0 && done.stderr.contains("Read-only"),
            "{done:?}"
        );
    }

    one.sh("echo from one > /data/file; chown 1000:1000 /data/file; ln /data/file /data/link");
    assert_eq!(
        two.sh("cat /data/link; touch /data/new; stat -c '%u %g' /data/new"),
        format!("from one\n1000 {FS_GROUP}")
    );
    assert_eq!(fs::read_to_string(disk.join("link")).unwrap(), "from one\n");
    one.sh("echo changed >> /tree/sub/path/file");
    assert_eq!(two.sh("cat /sub/file"), "belowchanged");
    fs::write(tree.join("late"), "from the host").unwrap();
    wait_for("a file of the host's", || {
        one.exec("cat /tree/late").stdout == "from the host"
    });

    assert_eq!(one.sh("echo cached > /cache/x; cat /cache/x"), "cached");
    let full = one.exec("dd if=/dev/zero of=/cache/full bs=64k count=32");
    assert!(
        full.code != 0 && full.stderr.contains("No space"),
        "{full:?}"
    );

    assert_eq!(
        one.sh("grep named /etc/hosts; ping -c 1 -w 1 named 2>&1 | head -1"),
        "192.0.2.9 named.test named\nPING named (192.0.2.9): 56 data bytes"
    );
    one.sh("echo the reason > /dev/termination-log");
    assert_eq!(fs::read_to_string(&termination).unwrap(), "the reason\n");
    block_device(&pod);
    drop(pod);
    assert_eq!(
        fs::read_to_string(tree.join("sub/path/file")).unwrap(),
        "belowchanged\n"
    );
}

/// A raw block volume (`volumeDevices`) that comes after the pod's first container, for which QEMU has no place; and a file system on it.
fn block_device(pod: &Pod<'_>) {
    let disk = LoopDevice::new(pod.node.test, "block");
    let devices =
        json!([{"host_path": disk.name(), "container_path": "/dev/data", "permissions": "mrw"}]);
    let capabilities = json!({"add_capabilities": ["SYS_ADMIN"]});
    let security = json!({"security_context": {"capabilities": capabilities}});
    let config = json!({"devices": devices, "linux": security});
    if pod.node.test.hypervisor() != "coffer-vmm" {
        let message = refusal(pod.try_sh("block", APP, config));
        assert!(
            message.contains("/dev/data") && message.contains("QEMU"),
            "{message}"
        );
        return;
    }
    let app = pod.sh("block", APP, config);
    app.sh("echo of the pod | dd of=/dev/data bs=4k seek=5 conv=notrunc,fsync");
    assert_eq!(disk.read(5 * 4096, 11), b"of the pod\n");
    let script = "set -e; mke2fs /dev/data > /dev/null; mkdir /m; mount -t ext4 /dev/data /m; echo kept > /m/file; umount /m
        mount -t ext4 /dev/data /m; cat /m/file; umount /m";
    assert_eq!(app.sh(script), "kept");
    app.remove();
}
