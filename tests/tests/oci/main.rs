//! The OCI command line: the specification's states and their transitions, and what engines read, write and look for.
//!
//! Every test runs with runc first. What runc does is what podman, CRI-O, buildah and containerd know.

mod exec;
mod failures;
mod process;
mod states;
mod verbs;

/// Ends by itself on SIGTERM, with a code of its own.
const PATIENT: &str =
    "trap 'echo term; exit 3' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.1; done";
