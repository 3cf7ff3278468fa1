//! A mounted tree of cgroups: cgroup v2's, or one of cgroup v1's, which has a controller.

use super::CgroupPath;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";
/// Lists a cgroup's processes; a pid written to it moves that process in, with all its threads.
pub(super) const PROCESSES: &str = "cgroup.procs";
/// The v1 hierarchies a sandbox joins, where they are mounted, and the file of each that limits.
const V1_CONTROLLERS: [(&str, &[&str]); 4] = [
    ("cpu", &["cpu.cfs_quota_us"]),
    ("memory", &["memory.limit_in_bytes"]),
    ("pids", &["pids.max"]),
    ("freezer", &[]),
];
/// Files of cgroup v2 that limit what a VM uses up.
const V2_LIMITS: &[&str] = &["memory.max", "memory.high", "cpu.max"];
/// Controllers of cgroup v2 that a sandbox's cgroup is to have.
const V2_CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];
/// A v1 memory limit from here on is none: the kernel's own is the largest number of whole pages.
const V1_NO_LIMIT: u64 = 1 << 62;
/// How often the parent may vanish while a child is made in it: each time another sandbox has ended.
const CREATE_ATTEMPTS: usize = 10;

/// A mounted tree of cgroups.
#[derive(Debug, Clone)]
pub(super) struct Hierarchy {
    root: PathBuf,
    /// The v1 controller; None for v2.
    controller: Option<&'static str>,
    /// Files that hold a limit.
    limits: &'static [&'static str],
}

/// Whether the host has one hierarchy for all controllers.
pub(super) fn is_v2() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// The hierarchies of this host: the one of v2, or those of v1 that a sandbox joins.
pub(super) fn mounted() -> Vec<Hierarchy> {
    let root = Path::new(ROOT);
    if is_v2() {
        return vec![Hierarchy {
            root: root.to_owned(),
            controller: None,
            limits: V2_LIMITS,
        }];
    }
    V1_CONTROLLERS
        .iter()
        .map(|(name, limits)| Hierarchy {
            root: root.join(name),
            controller: Some(name),
            limits,
        })
        .filter(|hierarchy| hierarchy.root.join(PROCESSES).exists())
        .collect()
}

/// The lines of a `/proc/<pid>/cgroup`, each the controllers of a hierarchy and the process's path in it: "4:cpu,cpuacct:/path", in v2
/// "0::/path". A path above the root of a cgroup namespace begins with "/..".
pub(super) fn memberships(proc_cgroup: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = proc_cgroup.lines();
    lines.filter_map(|line| line.split_once(':')?.1.split_once(':'))
}

impl Hierarchy {
    /// The cgroup's directory.
    pub(super) fn directory(&self, cgroup: &CgroupPath) -> PathBuf {
        cgroup.below(&self.root)
    }

    /// Makes the cgroup with all above it.
    pub(super) fn make(&self, cgroup: &CgroupPath) -> io::Result<()> {
        let directory = self.directory(cgroup);
        let mut made = fs::create_dir_all(&directory);
        for _ in 1..CREATE_ATTEMPTS {
            match &made {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    made = fs::create_dir_all(&directory);
                }
                _ => break,
            }
        }
        made?;
        if self.controller.is_none() {
            self.enable_controllers(&directory);
        }
        Ok(())
    }

    /// cgroup v2 gives a cgroup only the controllers that every one above it passes on. What the host does not have, or a cgroup
    /// with processes of its own can't pass on, is left out.
    fn enable_controllers(&self, directory: &Path) {
        let above = directory.ancestors().skip(1);
        let above: Vec<_> = above
            .take_while(|dir| dir.starts_with(&self.root))
            .collect();
        for cgroup in above.iter().rev() {
            for controller in V2_CONTROLLERS {
                let file = cgroup.join("cgroup.subtree_control");
                let _ = fs::write(file, format!("+{controller}"));
            }
        }
    }

    /// Where a process with this `/proc/<pid>/cgroup` is.
    fn path_in<'a>(&self, proc_cgroup: &'a str) -> Option<&'a str> {
        let mut memberships = memberships(proc_cgroup);
        let here = memberships.find(|(controllers, _)| match self.controller {
            None => controllers.is_empty(),
            Some(name) => controllers.split(',').any(|other| other == name),
        });
        here.map(|(_, path)| path)
    }

    /// Moves a process to where one with this `/proc/<pid>/cgroup` is, or to the root where that is gone.
    pub(super) fn send(&self, pid: u32, proc_cgroup: &str) -> io::Result<()> {
        let path = self.path_in(proc_cgroup).unwrap_or("/");
        let cgroup = self.root.join(path.trim_start_matches('/'));
        let pid = pid.to_string();
        fs::write(cgroup.join(PROCESSES), &pid)
            .or_else(|_| fs::write(self.root.join(PROCESSES), &pid))
    }

    /// Whether a process is in this cgroup, and not in one below it.
    pub(super) fn holds(&self, cgroup: &CgroupPath, pid: u32) -> bool {
        let pids = fs::read_to_string(self.directory(cgroup).join(PROCESSES)).unwrap_or_default();
        pids.lines().any(|line| line.parse() == Ok(pid))
    }

    /// Whether a process with this `/proc/<pid>/cgroup` has a limit here, set on its cgroup or on one above.
    pub(super) fn confines(&self, proc_cgroup: &str) -> bool {
        let path = self.path_in(proc_cgroup);
        let Some(path) = path.and_then(|path| path.strip_prefix('/')) else {
            return false;
        };
        let Ok(cgroup) = Path::new(path)
            .components()
            .map(|part| match part {
                Component::Normal(name) => Ok(name),
                _ => Err(()),
            })
            .collect::<Result<PathBuf, ()>>()
        else {
            return true;
        };
        cgroup.ancestors().any(|cgroup| {
            let has_limit = |file: &&str| {
                let text = fs::read_to_string(self.root.join(cgroup).join(file));
                text.is_ok_and(|text| is_limit(&text))
            };
            self.limits.iter().any(has_limit)
        })
    }
}

/// "max", "max 100000", "-1" and the largest number of bytes are none.
fn is_limit(text: &str) -> bool {
    let value = text.split_whitespace().next().unwrap_or("max");
    value.parse::<u64>().is_ok_and(|value| value < V1_NO_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_on_or_above_the_own_cgroup_confines() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = root.path().join("a/b");
        fs::create_dir_all(&cgroup).unwrap();
        let hierarchy = Hierarchy {
            root: root.path().to_owned(),
            controller: Some("memory"),
            limits: &["limit"],
        };
        let limit = |text: &str| fs::write(root.path().join("a/limit"), text).unwrap();
        for none in ["max\n", "max 100000\n", "-1\n", "9223372036854771712\n"] {
            limit(none);
            assert!(!hierarchy.confines("9:memory,x:/a/b\n0::/c\n"), "{none}");
        }
        limit("1048576\n");
        assert!(hierarchy.confines("9:memory,x:/a/b\n0::/c\n"));
        assert!(!hierarchy.confines("9:memory,x:/\n"));
        assert!(!hierarchy.confines("9:cpu:/a/b\n0::/a/b\n"));
        // Out of the cgroup namespace: nobody knows what is set there.
        assert!(hierarchy.confines("9:memory:/../a\n"));
        let v2 = Hierarchy {
            controller: None,
            ..hierarchy
        };
        assert!(v2.confines("0::/a/b\n"));
    }
}
