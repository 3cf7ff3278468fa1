//! `seccomp.json`: the system calls that docker's default profile allows on x86-64, its conditions on capabilities
//! resolved when a spec is made. Everything else fails with EPERM.

use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SeccompProfile {
    architectures: Vec<String>,
    allow: Vec<String>,
    /// Allowed with certain arguments.
    rules: Vec<Value>,
    /// For a container without CAP_SYS_ADMIN: no new namespaces by clone, and clone3, whose arguments a filter can't
    /// see, looks as if the kernel did not have it.
    without_sys_admin: Vec<Value>,
    /// Further calls that a capability brings.
    pub(super) with_capability: BTreeMap<String, Vec<String>>,
}

/// The `linux.seccomp` of a container with these capabilities.
pub(super) fn profile(capabilities: &BTreeSet<String>) -> Value {
    let profile: SeccompProfile =
        serde_json::from_str(include_str!("../seccomp.json")).expect("a file of this source");
    let mut allow: BTreeSet<String> = profile.allow.into_iter().collect();
    for (capability, calls) in profile.with_capability {
        if capabilities.contains(&capability) {
            allow.extend(calls);
        }
    }
    let mut rules = vec![json!({"names": allow, "action": "SCMP_ACT_ALLOW"})];
    rules.extend(profile.rules);
    if !capabilities.contains("CAP_SYS_ADMIN") {
        rules.extend(profile.without_sys_admin);
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": libc::EPERM,
        "architectures": profile.architectures, "syscalls": rules,
    })
}
