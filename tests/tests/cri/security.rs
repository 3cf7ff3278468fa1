//! The security context of pods and containers, as the processes see it.

use crate::{APP, COFFER};
use coffer_tests::cri::Node;
use serde_json::{Value, json};

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
    assert_eq!(
        user.sh("id -u; id -g; id -G"),
        "1000\n1234\n1234 10 2000 3000 4000"
    );
    assert_eq!(user.sh(&field("CapEff")), "0000000000000000");
    assert_eq!(user.sh(&field("NoNewPrivs")), "1");
    assert_eq!(user.sh(&field("Seccomp")), "2");
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
    assert!(plain.exec("echo x > /proc/sysrq-trigger").code != 0);
    assert!(plain.exec("mount -t tmpfs t /tmp").code != 0);
    assert!(
        plain.exec("unshare -U true").code != 0,
        "RuntimeDefault forbids it"
    );

    let custom = node.test.dir().join("profile.json");
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    });
    std::fs::write(&custom, profile.to_string()).unwrap();
    let seccomp = json!({"profile_type": "Localhost", "localhost_ref": custom});
    let filtered = pod.sh("filtered", APP, context(&json!({"seccomp": seccomp})));
    assert!(
        filtered
            .exec("mkdir /tmp/d")
            .stderr
            .contains("not permitted")
    );
    filtered.sh("touch /tmp/f");

    let privileged = node.pod(COFFER, "privileged", context(&json!({"privileged": true})));
    let root = privileged.sh(
        "root",
        APP,
        context(&json!({
            "privileged": true, "masked_paths": [], "readonly_paths": [],
            "seccomp": {"profile_type": "Unconfined"},
        })),
    );
    assert_eq!(root.sh(&field("Seccomp")), "0");
    root.sh("mkdir /tmp/m && mount -t tmpfs t /tmp/m && umount /tmp/m");
    root.sh("echo 1 > /proc/sys/vm/overcommit_memory");
    assert!(
        !root.sh("ls /dev").contains("kvm"),
        "devices of the host are in the VM"
    );
}
