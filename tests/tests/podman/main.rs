//! podman runs containers and pods through Coffer as through any OCI runtime.
//!
//! Each test is a scenario that runs with runc or crun first and then with Coffer; its rows are the cases
//! (`coffer_tests::podman`). Where Coffer differs, [`DIFFERENCES`] says so.

mod lifecycle;
mod network;
mod options;
mod pods;
mod run;
mod systemd;
mod units;

use coffer_tests::podman::Difference;
use std::fs;
use std::path::Path;

/// Known differences, each also in `docs/limitations.md`.
const DIFFERENCES: &[Difference] = &[
    Difference {
        row: "network of the host",
        coffer: "126",
        reason: "the guest has another kernel with a network of its own",
    },
    Difference {
        row: "top",
        coffer: "",
        reason: "podman reads the /proc of the process that stands for the container, which sees no other processes",
    },
];

/// Prints a container's memory limit from one of two files: cgroup v2's, or v1's.
const MEMORY_LIMIT: &str =
    "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| e.to_string())
}
