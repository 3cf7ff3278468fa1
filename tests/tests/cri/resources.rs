//! Limits, their change in place, and what happens when they are reached.

use crate::{APP, COFFER};
use coffer_tests::Test;
use coffer_tests::cri::{Node, pod};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn memory(bytes: u64) -> Value {
    json!({"linux": {"resources": {"memory_limit_in_bytes": bytes.to_string()}}})
}

pub fn limits_and_their_change(node: &Node<'_>) {
    let pod = node.pod(COFFER, "limits", json!({}));
    let hungry = pod.sh("hungry", "tail /dev/zero", memory(24 * MIB));
    assert_eq!(hungry.wait(), (137, "OOMKilled".into()));
    // The same inside the container: the shell lives, its child is killed.
    let child = pod.sh("child", "tail /dev/zero; echo $?", memory(24 * MIB));
    child.wait();
    assert_eq!(child.logged("stdout"), ["137"]);

    let app = pod.sh("app", APP, memory(64 * MIB));
    let files = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight";
    assert_eq!(app.sh(files), format!("{}\nmax 100000\n100", 64 * MIB));
    app.update(&json!({
        "memory_limit_in_bytes": (96 * MIB).to_string(),
        "cpu_period": "100000", "cpu_quota": "50000", "cpu_shares": "512",
    }));
    assert_eq!(app.sh(files), format!("{}\n50000 100000\n20", 96 * MIB));
    assert_eq!(app.status()["state"], "CONTAINER_RUNNING");
}

/// Handlers with a configuration that is wrong, and the word of it that an error must name.
const WRONG: [(&str, &str, &str); 3] = [
    ("wrong-type", "vcpus = \"many\"", "vcpus"),
    ("unknown-key", "vpcus = 2", "vpcus"),
    (
        "no-image",
        "initrd = \"/nowhere/initrd\"",
        "/nowhere/initrd",
    ),
];

#[test]
fn a_wrong_configuration_is_named() {
    let test = Test::new("criwrong");
    let node = Node::with_handlers(&test, &WRONG.map(|(name, config, _)| (name, config)));
    for (handler, _, named) in WRONG {
        let message = pod::refusal(node.try_pod(handler, "wrong", json!({})));
        assert!(message.contains(named), "{message}");
    }
    let annotated = json!({"annotations": {"io.coffer.no-such-thing": "1"}});
    let message = pod::refusal(node.try_pod(COFFER, "wrong", annotated));
    assert!(message.contains("io.coffer.no-such-thing"), "{message}");
}
