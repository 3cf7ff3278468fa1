//! The security context of pods and containers, as the processes see it.

use crate::{APP, COFFER};
use coffer_tests::cri::{Node, pod};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;

fn context(context: &Value) -> Value {
    json!({"linux": {"security_context": context}})
}

pub fn security_contexts(node: &Node<'_>) {
    let sysctls =
        json!({"net.ipv4.ip_unprivileged_port_start": "81", "kernel.shm_rmid_forced": "1"});
    let pod = node.pod(COFFER, "secure", json!({"linux": {"sysctls": sysctls}}));
    let field = |name: &str| format!("sed -n 's/^{name}:\\t//p' /proc/self/status");

    // The image's /etc/group has the user in 10 and 2000.
    let user = pod.sh(
        "user",
        APP,
        context(&json!({
            "run_as_user": {"value": "1000"}, "run_as_group": {"value": "1234"},
            "supplemental_groups": ["3000", "4000"],
            "readonly_rootfs": true, "no_new_privs": true,
            "capabilities": {"drop_capabilities": ["ALL"]},
        })),
    );
    let own = ["CapEff", "NoNewPrivs", "Seccomp"].map(field).join("; ");
    assert_eq!(
        user.sh(&format!("id -u; id -g; id -G; {own}")),
        "1000\n1234\n1234 10 2000 3000 4000\n0000000000000000\n1\n2"
    );
    let write = user.exec("echo x > /tmp/x");
    assert!(write.stderr.contains("Read-only file system"), "{write:?}");
    assert_eq!(
        user.sh(
            "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced"
        ),
        "81\n1"
    );
    let port = user.exec("timeout 2 nc -l -p 80");
    assert!(port.code != 0 && port.stderr.contains("denied"), "{port:?}");
    assert_eq!(
        user.exec("timeout 2 nc -l -p 81").code,
        143,
        "81 may be bound"
    );

    let plain = pod.sh(
        "plain",
        APP,
        context(&json!({"capabilities": {"add_capabilities": ["SYS_TIME"], "drop_capabilities": ["CHOWN"]}})),
    );
    // containerd's default set, without CAP_CHOWN, with CAP_SYS_TIME.
    assert_eq!(plain.sh(&field("CapEff")), "00000000aa0425fa");
    assert_eq!(plain.sh("wc -c < /proc/keys"), "0");
    for forbidden in [
        "echo x > /proc/sysrq-trigger",
        "mount -t tmpfs t /tmp",
        // By RuntimeDefault.
        "unshare -U true",
    ] {
        assert_ne!(plain.exec(forbidden).code, 0, "{forbidden}");
    }
    let device =
        json!({"host_path": "/dev/kvm", "container_path": "/dev/kvm", "permissions": "rw"});
    let refused = pod::refusal(pod.try_sh("device", APP, json!({"devices": [device]})));
    assert!(refused.contains("/dev/kvm"), "{refused}");

    let custom = node.test.dir().join("profile.json");
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    });
    fs::write(&custom, profile.to_string()).unwrap();
    let seccomp = json!({"profile_type": "Localhost", "localhost_ref": custom});
    let filtered = pod.sh("filtered", APP, context(&json!({"seccomp": seccomp})));
    let refused = filtered.exec("touch /tmp/f && mkdir /tmp/d");
    assert!(refused.stderr.contains("not permitted"), "{refused:?}");

    let privileged = node.pod(COFFER, "privileged", context(&json!({"privileged": true})));
    let root = privileged.sh(
        "root",
        APP,
        context(&json!({
            "privileged": true, "masked_paths": [], "readonly_paths": [],
            "seccomp": {"profile_type": "Unconfined"},
        })),
    );
    let all = "mkdir /tmp/m && mount -t tmpfs t /tmp/m && umount /tmp/m && echo 1 > /proc/sys/vm/overcommit_memory && ls /dev";
    let seen = root.sh(&format!("{}; {all}", field("Seccomp")));
    assert!(seen.starts_with("0\n"), "{seen}");
    assert!(!seen.contains("kvm"), "devices of the host are in the VM");
}

/// `hostUsers: false`, and `supplementalGroupsPolicy: Strict`. containerd has both from version 2 on.
pub fn users_of_the_pod(node: &Node<'_>) {
    let mapping = json!([{"host_id": 100_000, "container_id": 0, "length": 65_536}]);
    let users = json!({"mode": "POD", "uids": mapping, "gids": mapping});
    let mapped = context(&json!({"namespace_options": {"userns_options": users}}));
    let volume = node.test.dir().join("mapped");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("roots"), "").unwrap();
    let mut config = mapped.clone();
    config["mounts"] = json!([{
        "host_path": volume, "container_path": "/v", "uidMappings": mapping, "gidMappings": mapping,
    }]);
    let pod = node.pod(COFFER, "users", mapped.clone());
    let app = pod.sh("app", APP, config);
    let script = "tr -s ' ' < /proc/self/uid_map; touch /v/new /new; stat -c %u /v/roots /v/new /new /etc/passwd; cat /etc/resolv.conf > /dev/null";
    assert_eq!(app.sh(script), " 0 100000 65536\n0\n0\n0\n0");
    assert_eq!(fs::metadata(volume.join("new")).unwrap().uid(), 0);

    let mut config = mapped;
    pod::merge(
        &mut config,
        context(&json!({
            "run_as_user": {"value": "1000"}, "run_as_group": {"value": "1234"},
            "supplemental_groups": ["3000"], "supplemental_groups_policy": "Strict",
        })),
    );
    let strict = pod.sh("strict", APP, config);
    assert_eq!(strict.sh("id -G"), "1234 3000");
}
