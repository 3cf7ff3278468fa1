use super::*;
use serde_json::{Value, json};

/// A bundle directory with a rootfs and the config given, on top of the least that is valid.
fn bundle(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("rootfs")).unwrap();
    let mut config = json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}, {"type": "ipc"}], "cgroupsPath": "/a/b"}
    });
    change(&mut config);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn refused(change: impl FnOnce(&mut Value)) -> String {
    let dir = bundle(change);
    let id = ContainerId::new("c").unwrap();
    let error = match Bundle::load(dir.path()) {
        Ok(bundle) => bundle.for_guest(&id).map(|_| ()).unwrap_err(),
        Err(error) => error,
    };
    error.to_string()
}

#[test]
fn the_host_side_is_taken_out() {
    let volume = tempfile::tempdir().unwrap();
    let dir = bundle(|c| {
        c["mounts"] = json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/v", "type": "bind", "source": volume.path(), "options": ["rbind", "rw", "ro"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["bind"]},
        ]);
        c["hooks"] = json!({"prestart": [{"path": "/bin/true"}], "startContainer": [{"path": "/bin/false"}]});
        c["hostname"] = json!("web");
    });
    let id = ContainerId::new("c1").unwrap();
    let mut guest = Bundle::load(dir.path()).unwrap().for_guest(&id).unwrap();
    assert_eq!(
        guest.binds,
        [Bind {
            index: 1,
            source: volume.path().to_owned(),
            read_only: true,
            idmap: None,
            mirrored: false,
        }]
    );
    assert_eq!(
        guest.network_namespace.as_deref(),
        Some(Path::new("/run/netns/x"))
    );
    assert_eq!(guest.cgroup, CgroupPath::parse("/a/b").ok());
    assert_eq!(guest.hostname.as_deref(), Some("web"));
    assert_eq!(guest.host_hooks.prestart.len(), 1);
    let shown = "/run/coffer/share/.volumes/7";
    guest.place_volume(guest.binds[0].index, shown.to_owned());

    let spec: Value = serde_json::from_slice(&guest.to_json()).unwrap();
    assert_eq!(spec["root"]["path"], "/run/coffer/share/c1/rootfs");
    assert_eq!(spec["mounts"][1]["source"], shown);
    assert_eq!(spec["mounts"][2]["source"], "/dev/shm");
    assert_eq!(
        spec["linux"]["namespaces"],
        json!([{"type": "pid"}, {"type": "network"}, {"type": "ipc"}])
    );
    assert_eq!(spec["linux"]["cgroupsPath"], Value::Null);
    assert_eq!(spec["hooks"]["prestart"], Value::Null);
    assert_eq!(spec["hooks"]["startContainer"][0]["path"], "/bin/false");
}

#[test]
fn the_pods_shared_memory_is_the_guests() {
    let host = tempfile::tempdir().unwrap();
    let shm = host.path().join("shm");
    fs::create_dir(&shm).unwrap();
    let dir = bundle(|c| {
        c["mounts"] = json!([{"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind"]}]);
    });
    let bundle = Bundle::load(dir.path()).unwrap();
    let guest = |bundle: &Bundle| bundle.for_guest(&ContainerId::new("c").unwrap()).unwrap();
    assert_eq!(
        guest(&bundle).binds.len(),
        1,
        "a directory of that name is a volume"
    );
    let none = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), &shm, Some("tmpfs"), none, Some("size=3m")).unwrap();
    let mut guest = guest(&bundle);
    nix::mount::umount(&shm).unwrap();
    assert!(guest.binds.is_empty());
    let spec: Value = serde_json::from_slice(&guest.to_json()).unwrap();
    assert_eq!(spec["mounts"][0]["source"], "/dev/shm");
    assert_eq!(guest.shared_memory.unwrap().bytes, 3 << 20);

    guest.keep_shared_memory_apart();
    assert!(guest.shared_memory.is_none());
    let spec: Value = serde_json::from_slice(&guest.to_json()).unwrap();
    let own = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777", "size=3145728"]});
    assert_eq!(spec["mounts"][0], own);
}

#[test]
fn files_of_the_pod_are_the_guests_where_nobody_mounts_others() {
    let hosts = tempfile::NamedTempFile::new().unwrap();
    let dir = bundle(|c| {
        c["root"]["readonly"] = json!(true);
        c["mounts"] = json!([
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "mode=1777", "size=65536k"]},
            {"destination": "/etc/hosts", "type": "bind", "source": hosts.path(), "options": ["bind"]},
        ]);
    });
    let id = ContainerId::new("c").unwrap();
    let mut guest = Bundle::load(dir.path()).unwrap().for_guest(&id).unwrap();
    assert_eq!(guest.take_pods_files(), 64 << 20);
    let spec: Value = serde_json::from_slice(&guest.to_json()).unwrap();
    let shared = json!({"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["nosuid", "bind"]});
    assert_eq!(spec["mounts"][0], shared);
    assert_eq!(spec["mounts"][1]["destination"], "/etc/hosts");
    for (i, name) in [(2, "/etc/hostname"), (3, "/etc/resolv.conf")] {
        let own =
            json!({"destination": name, "type": "bind", "source": name, "options": ["bind", "ro"]});
        assert_eq!(spec["mounts"][i], own);
        assert!(guest.mount_points[i].file);
    }
}

#[test]
fn id_mappings_of_mounts_are_the_hosts_to_make() {
    let volume = tempfile::tempdir().unwrap();
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let dir = bundle(|c| {
        c["linux"]["uidMappings"] = mapping.clone();
        c["linux"]["gidMappings"] = mapping.clone();
        c["mounts"] = json!([
            {"destination": "/a", "type": "bind", "source": volume.path(), "options": ["bind"],
             "uidMappings": mapping, "gidMappings": mapping},
            {"destination": "/b", "type": "bind", "source": volume.path(), "options": ["rbind", "ridmap"]},
            {"destination": "/c", "type": "bind", "source": volume.path(), "options": ["bind"]},
        ]);
    });
    let id = ContainerId::new("c").unwrap();
    let guest = Bundle::load(dir.path()).unwrap().for_guest(&id).unwrap();
    let maps: Vec<_> = guest.binds.iter().map(|bind| bind.idmap.as_ref()).collect();
    let [Some(named), Some(option), None] = maps[..] else {
        panic!("{maps:?}");
    };
    assert_eq!((&named.uids, &named.gids), (&option.uids, &option.gids));
    assert_eq!(named.uids[0].host_id(), 100_000);
    assert!(option.recursive && !named.recursive);
    let spec: Value = serde_json::from_slice(&guest.to_json()).unwrap();
    assert_eq!(spec["mounts"][0]["uidMappings"], Value::Null);
    assert_eq!(spec["mounts"][1]["options"], json!(["rbind"]));
    assert_eq!(spec["linux"]["uidMappings"], mapping);
}

#[test]
fn another_containers_pid_namespace_is_found_by_its_path() {
    let dir = bundle(|c| {
        c["linux"]["namespaces"][0]["path"] = json!("/proc/7/ns/pid");
    });
    let id = ContainerId::new("c").unwrap();
    let guest = Bundle::load(dir.path()).unwrap().for_guest(&id).unwrap();
    assert_eq!(
        guest.pid_namespace.as_deref(),
        Some(Path::new("/proc/7/ns/pid"))
    );
    let spec: Value = serde_json::from_slice(&guest.to_json()).unwrap();
    let left = spec["linux"]["namespaces"].as_array().unwrap();
    assert!(left.iter().all(|namespace| namespace["type"] != "pid"));
}

#[test]
fn devices_of_the_host_are_refused_or_left_out_of_a_privileged_container() {
    let devices = json!([
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
        {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
        {"path": "/dev/nvram", "type": "c", "major": 10, "minor": 144},
    ]);
    let error = refused(|c| c["linux"]["devices"] = devices.clone());
    assert!(
        error.contains("linux.devices[2].path") && error.contains("/dev/nvram"),
        "{error}"
    );
    let dir = bundle(|c| {
        c["linux"]["devices"] = devices.clone();
        c["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
    });
    let id = ContainerId::new("c").unwrap();
    let guest = Bundle::load(dir.path()).unwrap().for_guest(&id).unwrap();
    let spec: Value = serde_json::from_slice(&guest.to_json()).unwrap();
    let left = spec["linux"]["devices"].as_array().unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0]["path"], "/dev/fuse");
    assert!(guest.block_devices.is_empty());
}

#[test]
fn block_devices_are_as_writable_as_the_last_rule_says_and_get_the_guests_numbers() {
    let device =
        |path: &str, minor: u32| json!({"path": path, "type": "b", "major": 8, "minor": minor});
    let rule = |allow: bool, minor: i64, access: &str| json!({"allow": allow, "type": "b", "major": 8, "minor": minor, "access": access});
    let dir = bundle(|c| {
        c["linux"]["devices"] = json!([
            device("/dev/a", 0),
            device("/dev/b", 16),
            device("/dev/c", 32),
            device("/dev/d", 48)
        ]);
        c["linux"]["resources"] = json!({"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "access": "m"},
            rule(true, 0, "rwm"), rule(true, 16, "rm"), rule(true, 32, "rwm"), rule(false, 32, "w"),
            {"allow": true, "type": "c", "major": 8, "minor": 0, "access": "rw"},
        ]});
    });
    let id = ContainerId::new("c").unwrap();
    let mut guest = Bundle::load(dir.path()).unwrap().for_guest(&id).unwrap();
    let found: Vec<_> = guest
        .block_devices
        .iter()
        .map(|d| (d.number.minor, d.read_only))
        .collect();
    assert_eq!(found, [(0, false), (16, true), (32, true), (48, true)]);

    // Numbers of the host and the guest may be the same, for other devices.
    let number = |major, minor| DeviceNumber { major, minor };
    guest.renumber_block_devices(&[
        (number(8, 0), number(8, 16)),
        (number(8, 16), number(254, 0)),
    ]);
    let spec: Value = serde_json::from_slice(&guest.to_json()).unwrap();
    let numbers = |list: &Value| -> Vec<(i64, i64)> {
        let number = |entry: &Value| {
            (
                entry["major"].as_i64().unwrap_or(-1),
                entry["minor"].as_i64().unwrap_or(-1),
            )
        };
        list.as_array().unwrap().iter().map(number).collect()
    };
    assert_eq!(
        numbers(&spec["linux"]["devices"]),
        [(8, 16), (254, 0), (8, 32), (8, 48)]
    );
    let rules = numbers(&spec["linux"]["resources"]["devices"]);
    assert_eq!(rules[2..], [(8, 16), (254, 0), (8, 32), (8, 32), (8, 0)]);
}

#[test]
fn labels_of_the_host_do_not_reach_the_guest() {
    let dir = bundle(|config| {
        config["process"]["apparmorProfile"] = json!("cri-containerd.apparmor.d");
        config["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0:c1,c2");
        config["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0:c1,c2");
        config["mounts"] = json!([{"destination": "/t", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "context=\"system_u:object_r:container_file_t:s0\"", "size=1m"]}]);
    });
    let guest = Bundle::load(dir.path())
        .and_then(|bundle| bundle.for_guest(&ContainerId::new("c").unwrap()))
        .unwrap();
    let json = String::from_utf8(guest.to_json()).unwrap();
    assert!(
        !json.contains("system_u") && !json.contains("apparmor"),
        "{json}"
    );
    assert!(json.contains("nosuid") && json.contains("size=1m"));
    let mut exec = json!({"args": ["a"], "apparmorProfile": "x", "selinuxLabel": "y"});
    strip_process(&mut exec);
    assert_eq!(exec, json!({"args": ["a"]}));
}

#[test]
fn errors_name_field_and_value() {
    type Case = (fn(&mut Value), &'static str, &'static str);
    let cases: [Case; 9] = [
        (|c| c["ociVersion"] = json!("2.0.0"), "ociVersion", "2.0.0"),
        (|c| c["process"]["cwd"] = json!("tmp"), "process.cwd", "tmp"),
        (
            |c| c["process"]["args"] = json!([]),
            "process.args",
            "missing",
        ),
        (
            |c| c["process"]["env"] = json!(["A=1", "B"]),
            "process.env[1]",
            "B",
        ),
        (
            |c| c["root"]["path"] = json!("nowhere"),
            "root.path",
            "nowhere",
        ),
        (
            |c| c["root"]["path"] = json!("config.json"),
            "root.path",
            "config.json",
        ),
        (
            |c| c["mounts"] = json!([{"destination": "v", "type": "tmpfs"}]),
            "mounts[0].destination",
            "v",
        ),
        (
            |c| c["mounts"] = json!([{"destination": "/v", "type": "bind", "source": "/nowhere"}]),
            "mounts[0].source",
            "/nowhere",
        ),
        (
            |c| c["mounts"] = json!([{"destination": "/v", "type": "bind", "source": "/dev/null"}]),
            "mounts[0].source",
            "device",
        ),
    ];
    for (change, name, value) in cases {
        let error = refused(change);
        assert!(error.contains(name) && error.contains(value), "{error}");
    }
}

#[test]
fn a_value_of_the_wrong_type_is_named_by_its_path() {
    let error = refused(|c| c["process"]["user"]["uid"] = json!("root"));
    assert!(error.contains("process.user.uid"), "{error}");
    let error = refused(|c| c["linux"]["namespaces"][0]["type"] = json!("galaxy"));
    assert!(error.contains("linux.namespaces[0].type"), "{error}");
}

#[test]
fn a_namespace_of_the_host_is_refused_by_kubernetes_name() {
    for (index, name) in [(0, "hostPID"), (1, "hostNetwork"), (2, "hostIPC")] {
        let error = refused(|c| {
            let namespaces = c["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.remove(index);
        });
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_rootfs_that_is_a_symlink_is_refused() {
    let dir = bundle(|_| {});
    fs::rename(dir.path().join("rootfs"), dir.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", dir.path().join("rootfs")).unwrap();
    let error = Bundle::load(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("root.path") && error.contains("symlink"),
        "{error}"
    );
}

#[test]
fn a_directory_without_config_is_no_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let error = Bundle::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
}

/// Every value of a config, replaced by ones that may have any type and size: a bundle or an error of one line, never a panic.
#[test]
fn any_value_in_any_place_is_taken_or_refused_in_one_line() {
    let whole = |c: &mut Value| {
        c["hostname"] = json!("web");
        c["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "c"});
        c["hooks"] = json!({"poststop": [{"path": "/bin/true", "timeout": 1}]});
        c["mounts"] =
            json!([{"destination": "/v", "type": "bind", "source": "/tmp", "options": ["rbind"]}]);
        c["linux"]["resources"] =
            json!({"memory": {"limit": 1 << 24}, "cpu": {"quota": 1, "period": 2}});
        c["linux"]["maskedPaths"] = json!(["/proc/acpi"]);
    };
    let mut pointers = Vec::new();
    let dir = bundle(whole);
    let text = fs::read_to_string(dir.path().join("config.json")).unwrap();
    places(&serde_json::from_str(&text).unwrap(), "", &mut pointers);
    assert!(pointers.len() > 30, "{pointers:?}");
    let values = [
        Value::Null,
        json!(true),
        json!(-1),
        json!(1e300),
        json!(""),
        json!("a\nb\u{0}"),
        json!("n".repeat(4096)),
        json!([]),
        json!([[[]]]),
        json!({}),
        json!({"unknown": {}}),
    ];
    let id = ContainerId::new("c").unwrap();
    for pointer in &pointers {
        for value in &values {
            let dir = bundle(|c| {
                whole(c);
                *c.pointer_mut(pointer).unwrap() = value.clone();
            });
            let done = Bundle::load(dir.path()).and_then(|bundle| bundle.for_guest(&id).map(drop));
            if let Err(error) = done {
                let line = coffer_proto::error_chain::chain(&error);
                assert!(!line.contains('\n'), "{pointer} = {value}: {line}");
            }
        }
    }
}

/// Pointers to a value and to all in it.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    let inside: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, v)| (key.clone(), v)).collect(),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .map(|(i, v)| (i.to_string(), v))
            .collect(),
        _ => Vec::new(),
    };
    for (key, value) in inside {
        let key = key.replace('~', "~0").replace('/', "~1");
        let pointer = format!("{at}/{key}");
        places(value, &pointer, found);
        found.push(pointer);
    }
}
