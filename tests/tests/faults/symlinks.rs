//! Images and neighbours whose directories are symlinks.

use coffer_tests::Test;
use coffer_tests::bundle::Bundle;
use coffer_tests::pod::Pod;
use serde_json::json;
use std::fs;
use std::os::unix::fs::symlink;

/// Mount points of every container that the image has as symlinks, out of its root if they were followed on the host or in the guest.
#[test]
fn an_image_whose_mount_points_are_symlinks_is_refused_or_stays_in_its_root() {
    let test = Test::new("linkroot");
    let outside = test.dir().join("outside");
    fs::create_dir(&outside).unwrap();
    for name in ["dev", "proc", "sys", "etc"] {
        for target in ["../../../../../../tmp", outside.to_str().unwrap(), "/usr"] {
            let root = test.copy_of("busybox");
            let path = root.join(name);
            if path.exists() {
                fs::rename(&path, root.join(format!("{name}-real"))).unwrap();
            }
            fs::create_dir_all(root.join("usr")).unwrap();
            symlink(target, &path).unwrap();
            let mut bundle = Bundle::on(&test, &root, &["/bin/sh", "-c", "cat /proc/self/mounts"]);
            let hosts = test.dir().join("hosts");
            fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
            bundle.push(
                "/mounts",
                json!({
                    "destination": "/etc/hosts", "type": "bind", "source": hosts, "options": ["rbind", "ro"],
                }),
            );
            let done = bundle.run(&test);
            assert!(
                done.code == 0 || done.stderr.lines().count() <= 2,
                "{name} -> {target}: {done:?}"
            );
            assert!(!done.stderr.contains("panicked"), "{done:?}");
            assert!(
                fs::read_dir(&outside).unwrap().next().is_none(),
                "{name} -> {target} led out of the root"
            );
            fs::remove_dir_all(root).unwrap();
        }
    }
}

/// One container of a pod changes a shared volume under the feet of another that is being created with mounts, masked and read-only
/// paths in there.
#[test]
fn a_neighbour_that_swaps_symlinks_leads_no_mount_out_of_a_containers_root() {
    const ROUNDS: u32 = 15;
    let test = Test::new("swap");
    let pod = Pod::new(&test);
    let volume = test.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    let shared = json!({
        "destination": "/vol", "type": "bind", "source": volume, "options": ["rbind", "rw"],
    });
    let script = "while :; do for t in /proc/1/root/etc ../../../../../../etc /dev /sys/fs/cgroup; do \
        mkdir /vol/sub; mkdir /vol/sub/deep; rm -r /vol/sub; ln -s $t /vol/sub; rm /vol/sub; done; done 2>/dev/null";
    let mut swapper = pod.bundle(script);
    swapper.push("/mounts", shared.clone());
    pod.start("swapper", &swapper).unwrap();
    let mounts = || {
        let look = pod.bundle("cat /proc/self/mountinfo | cut -d' ' -f4- | sort");
        let (status, text) = pod.run("look", &look);
        assert_eq!(status, 0);
        text
    };
    let before = mounts();

    let mut victim = pod.bundle("cut -d' ' -f5 /proc/self/mountinfo; ls /etc /bin");
    victim.push("/mounts", shared);
    for destination in ["/vol/sub", "/vol/sub/deep"] {
        victim.push(
            "/mounts",
            json!({"destination": destination, "type": "tmpfs", "source": "tmpfs"}),
        );
    }
    victim.push("/linux/maskedPaths", json!("/vol/sub/deep"));
    victim.push("/linux/readonlyPaths", json!("/vol/sub"));
    let (mut made, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        let id = format!("victim{round}");
        match pod.start(&id, &victim) {
            Ok(_) => {
                made += 1;
                pod.end(&id);
            }
            // Created, but the volume changed before the start: it is deleted like any other.
            Err(_) if pod.task.state(&id, "").is_ok() => {
                refused += 1;
                pod.task.delete(&id, "").unwrap();
            }
            Err(_) => refused += 1,
        }
    }
    println!("{made} made, {refused} refused");
    // Nothing was mounted, masked or made read-only anywhere else.
    assert_eq!(mounts(), before);
    assert_eq!(pod.sandbox.sh("ls /etc >/dev/null && echo fine"), "fine");
    pod.kill("swapper");
}
