//! Labels of the host's security modules.
//!
//! On a host with AppArmor or SELinux, engines name a profile or label in every spec. The guest's kernel has neither
//! module, and what they keep a container from on a shared kernel, the VM's wall keeps it from here. So they are left out.

use oci_spec::runtime::{Process, Spec};
use serde_json::Value;

/// Keys of an OCI process.
const PROCESS_LABELS: [&str; 2] = ["apparmorProfile", "selinuxLabel"];
/// Mount options by which SELinux labels a file system (mount(8)).
const CONTEXT_OPTIONS: [&str; 4] = ["context=", "fscontext=", "defcontext=", "rootcontext="];

/// Takes the labels out of a spec; gives the fields that had one.
pub fn strip(spec: &mut Spec) -> Vec<&'static str> {
    let mut found = Vec::new();
    let mut note = |field, label: Option<&String>| {
        if label.is_some_and(|label| !label.is_empty()) {
            found.push(field);
        }
    };
    if let Some(process) = spec.process_mut() {
        note(
            "process.apparmorProfile",
            process.apparmor_profile().as_ref(),
        );
        note("process.selinuxLabel", process.selinux_label().as_ref());
        unlabel(process);
    }
    if let Some(linux) = spec.linux_mut() {
        note("linux.mountLabel", linux.mount_label().as_ref());
        linux.set_mount_label(None);
    }
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let mut options = mount.options().clone().unwrap_or_default();
        let is_context = |option: &String| CONTEXT_OPTIONS.iter().any(|c| option.starts_with(c));
        note("mounts[].options", options.iter().find(|o| is_context(o)));
        options.retain(|option| !is_context(option));
        if mount.options().is_some() {
            mount.set_options(Some(options));
        }
    }
    found
}

fn unlabel(process: &mut Process) {
    process.set_apparmor_profile(None).set_selinux_label(None);
}

/// Takes the labels out of the JSON of an exec's process.
pub fn strip_process(process: &mut Value) {
    if let Some(process) = process.as_object_mut() {
        for label in PROCESS_LABELS {
            process.remove(label);
        }
    }
}
