//! What Coffer does with an OCI spec, as the runtime-spec's features structure ("features.md").
//!
//! `containerd-shim-coffer-v2 -info` and `coffer features` print it, and callers decide by it what to put into a spec: containerd offers
//! recursive read-only mounts and user namespaces by it, CRI-O decides about ID-mapped mounts. So a word is in here only if the
//! guest's agent honours it; the agent's `container/options.rs`, `container/seccomp.rs` and `container/validate.rs` say so.

use serde_json::{Value, json};

/// Those of the container's namespaces run in the guest, the others on the host.
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// Options of bind mounts and file systems that are flags for the kernel.
const MOUNT_OPTIONS: &[&str] = &[
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "exec",
    "idmap",
    "loud",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "tmpcopyup",
    "unbindable",
];

const NAMESPACES: [&str; 8] = [
    "cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts",
];

/// capabilities(7), as of the guest's kernel.
const CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// Without SCMP_ACT_NOTIFY: no listener can be reached from the guest.
const SECCOMP_ACTIONS: [&str; 8] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];

const SECCOMP_OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];

/// What a process of the guest can be. Profiles may name other architectures, to no effect.
const SECCOMP_ARCHITECTURES: [&str; 3] = ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"];

const SECCOMP_FLAGS: [&str; 3] = [
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC",
];

/// About a listener's answers, which never come: taken and without effect.
const SECCOMP_FLAG_WITHOUT_EFFECT: &str = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// The features structure.
pub fn features() -> Value {
    let known_flags: Vec<&str> = SECCOMP_FLAGS
        .iter()
        .copied()
        .chain([SECCOMP_FLAG_WITHOUT_EFFECT])
        .collect();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": HOOKS,
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": CAPABILITIES,
            // The guest has only version 2, whichever the host has.
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": SECCOMP_ACTIONS,
                "operators": SECCOMP_OPERATORS,
                "archs": SECCOMP_ARCHITECTURES,
                "knownFlags": known_flags,
                "supportedFlags": SECCOMP_FLAGS,
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            // Made by the host, on the mounts that the guest sees.
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": false},
        },
        "annotations": {"io.coffer.version": coffer_proto::VERSION},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Features;

    /// The parsed structure has every field of the specification's schema, with its enumerations, and nothing else.
    #[test]
    fn the_structure_is_the_one_of_the_specification() {
        let features = features();
        let parsed: Features = serde_json::from_value(features.clone()).unwrap();
        let again = without_nulls(serde_json::to_value(&parsed).unwrap());
        // It writes lists as they were, so what is missing here was not understood.
        assert_eq!(again, features);
    }

    fn without_nulls(value: Value) -> Value {
        match value {
            Value::Object(map) => map
                .into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key, without_nulls(value)))
                .collect(),
            other => other,
        }
    }

    #[test]
    fn words_are_of_the_form_that_the_schema_demands() {
        let features = features();
        let words = |pointer: &str| -> Vec<String> {
            serde_json::from_value(features.pointer(pointer).unwrap().clone()).unwrap()
        };
        for (pointer, prefix) in [
            ("/linux/capabilities", "CAP_"),
            ("/linux/seccomp/actions", "SCMP_ACT_"),
            ("/linux/seccomp/operators", "SCMP_CMP_"),
            ("/linux/seccomp/archs", "SCMP_ARCH_"),
            ("/linux/seccomp/knownFlags", "SECCOMP_FILTER_FLAG_"),
        ] {
            for word in words(pointer) {
                assert!(word.starts_with(prefix), "{pointer}: {word}");
                let allowed = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
                assert!(word.chars().all(allowed), "{pointer}: {word}");
            }
        }
        for pointer in [
            "/mountOptions",
            "/linux/capabilities",
            "/linux/seccomp/actions",
        ] {
            let sorted: std::collections::BTreeSet<_> = words(pointer).into_iter().collect();
            assert_eq!(
                sorted.into_iter().collect::<Vec<_>>(),
                words(pointer),
                "{pointer}"
            );
        }
    }
}
