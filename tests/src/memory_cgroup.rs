//! Memory cgroups of the host, version 1 or 2.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup in which memory is limited.
#[derive(Debug)]
pub struct MemoryCgroup(PathBuf);

impl MemoryCgroup {
    /// The one of this path, as `/proc/PID/cgroup` has it.
    pub fn at(path: &str) -> Self {
        let root = Path::new(ROOT);
        let hierarchy = if is_v2() {
            root.to_owned()
        } else {
            root.join("memory")
        };
        Self(hierarchy.join(path.trim_start_matches('/')))
    }

    /// The first below it whose name begins so.
    pub fn child(&self, prefix: &str) -> Self {
        let entries = fs::read_dir(&self.0).expect("the cgroup is there");
        let paths = entries.flatten().map(|entry| entry.path());
        let mut named = paths.filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(prefix))
        });
        Self(named.next().expect("the sandbox has a cgroup"))
    }

    /// Limits it to what is used now and so many bytes more.
    pub fn leave(&self, bytes: u64) {
        let (limit, usage) = if is_v2() {
            ("memory.max", "memory.current")
        } else {
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
        };
        let used = fs::read_to_string(self.0.join(usage)).expect("memory is counted");
        let used: u64 = used.trim().parse().expect("a number");
        fs::write(self.0.join(limit), (used + bytes).to_string()).expect("root may limit it");
    }
}

fn is_v2() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}
