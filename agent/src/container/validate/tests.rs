use super::*;
use serde_json::{Value, json};

fn minimal() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "/run/coffer/share/web/rootfs"},
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    })
}

/// Sets what `path` names, in the pointer syntax of JSON.
fn with(path: &str, value: Value) -> Value {
    let mut spec = minimal();
    // Indexing makes the objects that are missing.
    *path
        .split('/')
        .skip(1)
        .fold(&mut spec, |place, name| &mut place[name]) = value;
    spec
}

fn check(value: &Value) -> Result {
    let parsed: Spec = parse(value.to_string().as_bytes())?;
    spec("web", &parsed, &SharedNamespaces::default())
}

/// The field that was refused.
fn refused(path: &str, value: Value) -> String {
    match check(&with(path, value)) {
        Err(Error::Refused { field, .. }) => field,
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn a_minimal_spec_is_taken() {
    check(&minimal()).unwrap();
}

#[test]
fn fields_that_cannot_be_honoured_are_refused_by_name() {
    for (path, value) in [
        ("/linux/intelRdt", json!({"closID": "x"})),
        (
            "/linux/mountLabel",
            json!("system_u:object_r:container_file_t:s0"),
        ),
        (
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0"}),
        ),
        ("/linux/netDevices", json!({"eth1": {}})),
        ("/linux/personality/flags", json!(["ADDR_NO_RANDOMIZE"])),
        ("/linux/rootfsPropagation", json!("sideways")),
        ("/linux/cgroupsPath", json!("/other")),
        (
            "/linux/uidMappings",
            json!([{"containerID": 0, "hostID": 1000, "size": 1}]),
        ),
        ("/linux/seccomp/listenerPath", json!("/run/listener.sock")),
        ("/linux/resources/memory/swappiness", json!(60)),
        ("/linux/resources/memory/kernel", json!(1048576)),
        ("/linux/resources/memory/disableOOMKiller", json!(true)),
        ("/linux/resources/cpu/realtimeRuntime", json!(1000)),
        ("/linux/resources/blockIO/leafWeight", json!(10)),
        ("/linux/resources/network", json!({"classID": 1})),
        (
            "/linux/resources/rdma",
            json!({"mlx5_1": {"hcaHandles": 3}}),
        ),
        (
            "/process/apparmorProfile",
            json!("cri-containerd.apparmor.d"),
        ),
        (
            "/process/selinuxLabel",
            json!("system_u:system_r:container_t:s0"),
        ),
        ("/process/oomScoreAdj", json!(1001)),
        ("/process/cwd", json!("relative")),
        ("/process/args", json!([])),
        ("/windows", json!({"layerFolders": ["x"]})),
    ] {
        // Of an object the field in it is named, or the object.
        let name = path[1..].replace('/', ".");
        let field = if path.ends_with("seccomp/listenerPath") {
            let filter = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": value});
            refused("/linux/seccomp", filter)
        } else if path.ends_with("personality/flags") {
            refused(
                "/linux/personality",
                json!({"domain": "LINUX", "flags": value}),
            )
        } else {
            refused(path, value)
        };
        assert_eq!(field, name);
    }
}

#[test]
fn keys_nobody_knows_are_refused_with_their_path() {
    assert_eq!(
        refused("/linux/resources/quantum", json!(1)),
        "linux.resources.quantum"
    );
    assert_eq!(
        refused("/process/user/shoe", json!(42)),
        "process.user.shoe"
    );
    let mounts = json!([{"destination": "/a", "type": "tmpfs", "extra": true}]);
    assert_eq!(refused("/mounts", mounts), "mounts[0].extra");
    check(&with("/linux/resources/quantum", Value::Null)).unwrap();
}

#[test]
fn values_nobody_knows_are_refused_with_their_path() {
    assert_eq!(
        refused("/linux/personality", json!({"domain": "PDP11"})),
        "linux.personality.domain"
    );
    assert_eq!(
        refused(
            "/process/rlimits",
            json!([{"type": "RLIMIT_X", "hard": 1, "soft": 1}])
        ),
        "process.rlimits[0].type"
    );
    let filter = json!({"defaultAction": "SCMP_ACT_WHATEVER"});
    assert_eq!(
        refused("/linux/seccomp", filter),
        "linux.seccomp.defaultAction"
    );
}

#[test]
fn sysctls_of_the_whole_guest_are_refused() {
    for key in [
        "kernel.core_pattern",
        "vm.swappiness",
        "fs.file-max",
        "net..x",
        "kernel/../x",
        "net/../kernel/x",
    ] {
        assert_eq!(
            refused("/linux/sysctl", json!({key: "1"})),
            format!("linux.sysctl.{key}")
        );
    }
    check(&with(
        "/linux/sysctl",
        json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "4096"}),
    ))
    .unwrap();
}

#[test]
fn paths_of_others_and_paths_with_tricks_are_refused() {
    let mount = |destination: &str, source: &str| json!([{"destination": destination, "source": source, "type": "bind", "options": ["rbind"]}]);
    let own = "/run/coffer/share/web/mounts/0";
    for (destination, source, field) in [
        ("/a", "/run/coffer/share/db/rootfs", "source"),
        ("/a", "/run/coffer/share/web/../db/rootfs", "source"),
        ("/a", "/init", "source"),
        ("/a/../../b", own, "destination"),
        ("a", own, "destination"),
        ("/", own, "destination"),
        ("/proc", own, "destination"),
        ("/proc/sys", own, "destination"),
    ] {
        assert_eq!(
            refused("/mounts", mount(destination, source)),
            format!("mounts[0].{field}")
        );
    }
    check(&with("/mounts", mount("/proc/cpuinfo", own))).unwrap();
    check(&with(
        "/mounts",
        json!([{"destination": "/proc", "type": "proc", "source": "proc"}]),
    ))
    .unwrap();
    assert_eq!(
        refused("/root/path", json!("/run/coffer/share/db/rootfs")),
        "root.path"
    );
}

#[test]
fn mounts_that_cannot_be_made_are_refused() {
    let mount = |kind: &str, option: &str| json!([{"destination": "/a", "type": kind, "options": [option]}]);
    assert_eq!(refused("/mounts", mount("nfs", "ro")), "mounts[0].type");
    assert_eq!(
        refused("/mounts", mount("tmpfs", "idmap")),
        "mounts[0].options"
    );
    assert_eq!(
        refused("/mounts", mount("tmpfs", "bind")),
        "mounts[0].source"
    );
    assert_eq!(
        refused("/mounts", mount("proc", "tmpcopyup")),
        "mounts[0].options"
    );
}

#[test]
fn namespaces_of_others_are_refused() {
    let list = |entry: Value| json!([{"type": "pid"}, {"type": "mount"}, entry]);
    let named = json!({"type": "network", "path": "/proc/1/ns/net"});
    assert_eq!(
        refused("/linux/namespaces", list(named)),
        "linux.namespaces[net].path"
    );
    assert_eq!(
        refused("/linux/namespaces", list(json!({"type": "pid"}))),
        "linux.namespaces[pid]"
    );
    assert_eq!(
        refused("/linux/namespaces", json!([{"type": "mount"}])),
        "linux.namespaces"
    );
    assert_eq!(
        refused("/linux/namespaces", list(json!({"type": "user"}))),
        "linux.uidMappings"
    );
}

#[test]
fn hooks_of_the_host_are_refused() {
    let hook = json!([{"path": "/bin/true"}]);
    assert_eq!(refused("/hooks/poststop", hook.clone()), "hooks.poststop");
    check(&with("/hooks/startContainer", hook)).unwrap();
    let hook = json!([{"path": "/bin/true", "timeout": 0}]);
    assert_eq!(
        refused("/hooks/createContainer", hook),
        "hooks.createContainer[0].timeout"
    );
}

#[test]
fn unified_takes_files_of_controllers_only() {
    for key in [
        "cgroup.procs",
        "memory",
        "../x",
        "memory.max/..",
        ".max",
        "memory.",
    ] {
        let field = refused("/linux/resources/unified", json!({key: "1"}));
        assert_eq!(field, format!("linux.resources.unified.{key}"));
    }
    check(&with(
        "/linux/resources/unified",
        json!({"memory.high": "1048576"}),
    ))
    .unwrap();
}
