//! What the kubelet mounts into the containers of a pod, as the guest sees it.

use coffer_tests::bundle::Bundle;
use coffer_tests::pod::Pod;
use coffer_tests::{Test, asset, host};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

/// A container of the pod that runs a script with these mounts.
fn bundle(pod: &Pod<'_>, script: &str, mounts: &[Value]) -> Bundle {
    let mut bundle = pod.bundle(script);
    for mount in mounts {
        bundle.push("/mounts", mount.clone());
    }
    bundle
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    let options = [&["rbind", "rprivate"], options].concat();
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

/// Mounts a tmpfs for as long as it lives.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn new(path: &'a Path, size: &str) -> Self {
        fs::create_dir_all(path).unwrap();
        let options = format!("size={size}");
        let path_text = path.to_str().unwrap();
        host(
            "mount",
            &["-t", "tmpfs", "-o", &options, "tmpfs", path_text],
        )
        .unwrap();
        Self(path)
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = host("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

#[test]
fn a_config_map_that_is_swapped_is_seen() {
    let test = Test::new("configmap");
    let pod = Pod::new(&test);
    let volume = test.dir().join("config");
    let version = |name: &str, text: &str| {
        let dir = volume.join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("key"), text).unwrap();
        // As the kubelet does it: a new link, renamed over the old one.
        symlink(name, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    };
    version("..one", "first\n");
    symlink("..data/key", volume.join("key")).unwrap();
    let script = "cat /config/key; until grep -q second /config/key; do sleep 0.1; done; cat /config/key; \
                  touch /config/x";
    let bundle = bundle(&pod, script, &[bind(&volume, "/config", &["ro"])]);
    let out = pod.start("reader", &bundle).unwrap();
    coffer_tests::wait_for("the first version", || {
        fs::read_to_string(&out).unwrap().contains("first")
    });
    version("..two", "second\n");
    fs::remove_dir_all(volume.join("..one")).unwrap();
    assert_ne!(pod.task.wait("reader", "").unwrap(), 0, "it could write");
    assert_eq!(fs::read_to_string(out).unwrap(), "first\nsecond\n");
    pod.task.delete("reader", "").unwrap();
}

#[test]
fn single_files_and_memory_are_volumes() {
    let test = Test::new("kinds");
    let pod = Pod::new(&test);
    let volume = test.dir().join("volume");
    let memory = volume.join("memory");
    fs::create_dir_all(&volume).unwrap();
    let _memory = Tmpfs::new(&memory, "1m");
    fs::write(memory.join("host"), "nested\n").unwrap();
    let log = test.dir().join("termination-log");
    fs::write(&log, "").unwrap();
    fs::create_dir_all(volume.join("sub/path")).unwrap();
    fs::write(volume.join("sub/path/f"), "sub\n").unwrap();
    let script = "cat /v/memory/host; echo guest > /v/memory/guest; cat /direct/guest; cat /sub/f; \
        dd if=/dev/zero of=/direct/big bs=64k count=32 2>/dev/null || echo full; \
        echo why > /dev/termination-log";
    let bundle = bundle(
        &pod,
        script,
        &[
            bind(&volume, "/v", &["rw"]),
            bind(&memory, "/direct", &["rw"]),
            bind(&volume.join("sub/path"), "/sub", &["ro"]),
            bind(&log, "/dev/termination-log", &["rw"]),
        ],
    );
    let (status, output) = pod.run("kinds", &bundle);
    assert_eq!((status, output.as_str()), (0, "nested\nguest\nsub\nfull\n"));
    assert_eq!(fs::read_to_string(log).unwrap(), "why\n");
    assert_eq!(fs::read_to_string(memory.join("guest")).unwrap(), "guest\n");
}

#[test]
fn recursive_read_only_holds_below() {
    let test = Test::new("rro");
    let pod = Pod::new(&test);
    let volume = test.dir().join("volume");
    let below = volume.join("below");
    fs::create_dir_all(&volume).unwrap();
    let _below = Tmpfs::new(&below, "1m");
    let script = "touch /v/a 2>/dev/null || echo no; touch /v/below/a 2>/dev/null || echo no";
    let bundle = bundle(&pod, script, &[bind(&volume, "/v", &["rro"])]);
    assert_eq!(pod.run("rro", &bundle), (0, "no\nno\n".to_owned()));
    assert!(!below.join("a").exists());
}

#[test]
fn shared_memory_is_one_for_the_pod() {
    let test = Test::new("shm");
    let pod = Pod::new(&test);
    let shm = test.dir().join("shm");
    let _shm = Tmpfs::new(&shm, "1m");
    let other = test.dir().join("other/shm");
    let _other = Tmpfs::new(&other, "2m");
    let with = |shm: &Path, script: &str| {
        let mut bundle = bundle(&pod, script, &[bind(shm, "/dev/shm", &["rw"])]);
        let all = bundle.config["mounts"].as_array_mut().unwrap();
        all.retain(|mount| mount["destination"] != "/dev/shm" || mount["type"] == "bind");
        bundle
    };
    pod.start("writer", &with(&shm, "echo shared > /dev/shm/x; sleep 600"))
        .unwrap();
    let size = "df -k /dev/shm | awk 'END {print $2}'";
    let reader = format!(
        "until test -s /dev/shm/x; do sleep 0.1; done; cat /dev/shm/x; df /dev/shm | grep -c virtiofs; {size}"
    );
    let (_, output) = pod.run("reader", &with(&shm, &reader));
    assert_eq!(output, "shared\n0\n1024\n");
    let stranger = format!("ls /dev/shm | wc -l; {size}; stat -c %a /dev/shm");
    let (_, output) = pod.run("stranger", &with(&other, &stranger));
    assert_eq!(output, "0\n2048\n1777\n");
    pod.kill("writer");
    assert_eq!(fs::read_dir(&shm).unwrap().count(), 0);
}

#[test]
fn a_volume_of_two_containers_is_one_file_system() {
    let test = Test::new("together");
    let pod = Pod::new(&test);
    let volume = test.dir().join("volume");
    fs::create_dir_all(&volume).unwrap();
    fs::write(volume.join("open"), "").unwrap();
    // Busybox has no flock(1).
    let on_debian = |script: &str| {
        let mut bundle = bundle(&pod, script, &[bind(&volume, "/mnt", &["rw"])]);
        bundle.config["root"]["path"] = json!(asset("debian"));
        bundle
    };
    let holder = "exec 3< /mnt/open; flock /mnt/lock sh -c 'touch /mnt/locked; sleep 600' & until test -s /mnt/open; do sleep 0.1; done
        cat <&3; touch /mnt/seen; sleep 600";
    let out = pod.start("holder", &on_debian(holder)).unwrap();
    let other =
        "until test -e /mnt/locked; do sleep 0.1; done; flock -n /mnt/lock true || echo locked
        echo written >> /mnt/open; until test -e /mnt/seen; do sleep 0.1; done";
    let (status, output) = pod.run("other", &on_debian(other));
    assert_eq!((status, output.as_str()), (0, "locked\n"));
    assert_eq!(fs::read_to_string(out).unwrap(), "written\n");
    // The one that is left keeps it.
    pod.kill("holder");
    let (_, output) = pod.run("third", &on_debian("cat /mnt/open"));
    assert_eq!(output, "written\n");
}

#[test]
fn a_container_joins_the_processes_of_another_and_restarts_in_place() {
    let test = Test::new("ephemeral");
    let pod = Pod::new(&test);
    let first = pod.task.state(&pod.sandbox.id, "").unwrap().pid;
    for _ in 0..2 {
        let mut debugger = pod.bundle("cat /proc/1/comm; ps | grep -c '[s]leep 600'");
        let namespaces = debugger.config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap();
        for namespace in namespaces {
            if namespace["type"] == "pid" {
                namespace["path"] = json!(format!("/proc/{first}/ns/pid"));
            }
        }
        let (status, output) = pod.run("debugger", &debugger);
        assert_eq!((status, output.as_str()), (0, "sleep\n1\n"));
    }
}

#[test]
fn a_user_namespace_has_id_mapped_volumes() {
    let test = Test::new("userns");
    let pod = Pod::new(&test);
    let volume = test.dir().join("volume");
    fs::create_dir_all(&volume).unwrap();
    fs::write(volume.join("roots"), "").unwrap();
    let rootfs = pod.rootfs.to_str().unwrap();
    host("chown", &["-R", "100000:100000", rootfs]).unwrap();
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let mut mount = bind(&volume, "/v", &["rw"]);
    mount["uidMappings"] = mapping.clone();
    mount["gidMappings"] = mapping.clone();
    let script =
        "cat /proc/self/uid_map | tr -s ' '; stat -c %u /v/roots; touch /v/new; stat -c %u /v/new";
    let mut bundle = bundle(&pod, script, &[mount]);
    bundle.config["linux"]["uidMappings"] = mapping.clone();
    bundle.config["linux"]["gidMappings"] = mapping;
    bundle.push("/linux/namespaces", json!({"type": "user"}));
    let (status, output) = pod.run("mapped", &bundle);
    assert_eq!((status, output.as_str()), (0, " 0 100000 65536\n0\n0\n"));
    assert_eq!(fs::metadata(volume.join("new")).unwrap().uid(), 0);
}

#[test]
fn cpus_come_and_go_with_the_limits() {
    let test = Test::new("cpus");
    let pod = Pod::new(&test);
    let host = std::thread::available_parallelism().unwrap().get();
    assert!(host >= 2, "this test needs a second CPU");
    // A new CPU is a moment later in every cpuset.
    let has = |count: u32| {
        coffer_tests::wait_for(&format!("{count} CPUs"), || {
            pod.sandbox.sh("nproc").trim() == count.to_string()
        });
    };
    has(1);
    let mut bundle = pod.bundle("sleep 600");
    bundle.config["linux"]["resources"]["cpu"] = json!({"quota": 200_000, "period": 100_000});
    pod.start("busy", &bundle).unwrap();
    has(2);
    let less = json!({"cpu": {"quota": 50_000, "period": 100_000}});
    pod.task.update("busy", &less).unwrap();
    has(1);
    let more = json!({"cpu": {"quota": 150_000, "period": 100_000}});
    pod.task.update("busy", &more).unwrap();
    has(2);
    pod.kill("busy");
    has(1);
}
