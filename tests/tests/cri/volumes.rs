//! What a kubelet mounts into containers.

use crate::{APP, COFFER};
use coffer_tests::cri::Node;
use coffer_tests::cri::pod::refusal;
use coffer_tests::loop_device::LoopDevice;
use coffer_tests::{host, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

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

/// A memory-backed emptyDir: a tmpfs of the host.
struct Tmpfs<'p>(&'p Path);

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = host("umount", &[self.0.to_str().unwrap()]);
    }
}

pub fn volumes(node: &Node<'_>) {
    let dir = |name: &str| {
        let dir = node.test.dir().join(name);
        fs::create_dir(&dir).unwrap();
        dir
    };
    let (config_map, disk, memory, tree) = (dir("config"), dir("disk"), dir("memory"), dir("tree"));
    publish(&config_map, "..v1", "one");
    symlink("..data/key", config_map.join("key")).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o777)).unwrap();
    let tmpfs = [
        "-t",
        "tmpfs",
        "-o",
        "size=1m",
        "tmpfs",
        memory.to_str().unwrap(),
    ];
    host("mount", &tmpfs).unwrap();
    let _tmpfs = Tmpfs(&memory);
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
    let two = pod.sh("two", APP, mounts);

    assert_eq!(
        one.sh("cat /etc/config/key /etc/one-file /sub/file"),
        "onebelowbelow"
    );
    publish(&config_map, "..v2", "two");
    fs::remove_dir_all(config_map.join("..v1")).unwrap();
    wait_for("the update of the configMap", || {
        one.exec("cat /etc/config/key").stdout == "two"
    });
    for read_only in ["/etc/config/x", "/tree-ro/x", "/etc/one-file"] {
        let done = one.exec(&format!("echo x > {read_only}"));
        assert!(
            done.code != 0 && done.stderr.contains("Read-only"),
            "{done:?}"
        );
    }

    one.sh("echo from one > /data/file; chown 1000:1000 /data/file; ln /data/file /data/link");
    assert_eq!(two.sh("cat /data/link"), "from one");
    assert_eq!(fs::read_to_string(disk.join("link")).unwrap(), "from one\n");
    two.sh("echo changed >> /tree/sub/path/file");
    assert_eq!(one.sh("cat /sub/file"), "belowchanged");
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
    one.sh("echo shared > /dev/shm/x");
    assert_eq!(two.sh("cat /dev/shm/x"), "shared");
    assert_eq!(two.sh("stat -c %a /dev/shm"), "1777");
    drop(pod);
    assert_eq!(
        fs::read_to_string(tree.join("sub/path/file")).unwrap(),
        "belowchanged\n"
    );
}

/// A raw block volume (`volumeDevices`), which comes after the pod's first container. QEMU has no place for it then.
pub fn block_device(node: &Node<'_>) {
    let disk = LoopDevice::new(node.test, "disk");
    let pod = node.pod(COFFER, "block", json!({}));
    let devices =
        json!([{"host_path": disk.name(), "container_path": "/dev/data", "permissions": "mrw"}]);
    let config = json!({"devices": devices});
    if node.test.hypervisor() != "coffer-vmm" {
        let message = refusal(pod.try_sh("app", APP, config));
        assert!(
            message.contains("/dev/data") && message.contains("QEMU"),
            "{message}"
        );
        return;
    }
    let app = pod.sh("app", APP, config);
    app.sh("echo of the pod | dd of=/dev/data bs=4k seek=5 conv=notrunc,fsync");
    assert_eq!(disk.read(5 * 4096, 11), b"of the pod\n");
    app.remove();
}
