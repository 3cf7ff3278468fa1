//! The host cgroup that holds every process of a sandbox: the hypervisor process with the guest's memory, and coffer-fsd.
//!
//! On cgroup v2 it is one directory; on v1 and hybrid hosts one in each hierarchy that can limit or stop the sandbox. Engines name
//! its path. Where nobody does, it is `/coffer/<id>-<supervisor's pid>`, in the hierarchies that put no limit on the
//! supervisor: a sandbox must not be a way out of its caller's limits.

mod path;

pub use path::{CgroupPath, CgroupPathError};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";
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
/// A cgroup is busy until the kernel has buried its last process.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
const REMOVE_INTERVAL: Duration = Duration::from_millis(10);

/// Why the cgroup could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("can't create the cgroup {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("can't move process {pid} into the cgroup {path}")]
    Add {
        pid: i32,
        path: PathBuf,
        source: io::Error,
    },
    #[error("can't remove the cgroup {path}")]
    Remove { path: PathBuf, source: io::Error },
}

/// The cgroup of one sandbox.
#[derive(Debug, Clone)]
pub struct SandboxCgroup {
    dirs: Vec<PathBuf>,
}

impl SandboxCgroup {
    /// Makes the cgroup in every hierarchy.
    pub fn create(path: &CgroupPath) -> Result<Self, CgroupError> {
        Self::at(path).make()
    }

    /// The same, in the hierarchies only where this process is under no limit. None if there is no such hierarchy.
    pub fn create_unconfined(path: &CgroupPath) -> Result<Option<Self>, CgroupError> {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mut cgroup = Self::at(path);
        let confined: Vec<PathBuf> = hierarchies()
            .into_iter()
            .filter(|hierarchy| hierarchy.confines(&own))
            .map(|hierarchy| hierarchy.root)
            .collect();
        cgroup
            .dirs
            .retain(|dir| !confined.iter().any(|root| dir.starts_with(root)));
        if cgroup.dirs.is_empty() {
            return Ok(None);
        }
        cgroup.make().map(Some)
    }

    fn make(self) -> Result<Self, CgroupError> {
        for dir in &self.dirs {
            if let Err(source) = make_dir(dir) {
                let error = CgroupError::Create {
                    path: dir.clone(),
                    source,
                };
                // Half a cgroup is of no use; what was made goes again.
                let _ = self.remove();
                return Err(error);
            }
        }
        Ok(self)
    }

    /// Names a cgroup that may or may not exist.
    pub fn at(path: &CgroupPath) -> Self {
        let below = |hierarchy: Hierarchy| path.below(&hierarchy.root);
        Self {
            dirs: hierarchies().into_iter().map(below).collect(),
        }
    }

    /// Moves a process in, with all its threads.
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        for dir in &self.dirs {
            fs::write(dir.join("cgroup.procs"), pid.to_string()).map_err(|source| {
                CgroupError::Add {
                    pid,
                    path: dir.clone(),
                    source,
                }
            })?;
        }
        Ok(())
    }

    /// How many processes in it the host's kernel has killed for want of memory, the cgroup's own or the host's.
    pub fn oom_kills(&self) -> u64 {
        let count = |dir: &PathBuf| {
            // v2 and v1.
            ["memory.events", "memory.oom_control"]
                .iter()
                .find_map(|file| fs::read_to_string(dir.join(file)).ok())
                .and_then(|text| {
                    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
                    count?.trim().parse::<u64>().ok()
                })
        };
        self.dirs.iter().filter_map(count).sum::<u64>()
    }

    /// Kills what is left in the cgroup and removes it. A cgroup that is gone is no error. Blocks for some milliseconds.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + REMOVE_DEADLINE;
        for dir in &self.dirs {
            loop {
                kill_all(dir);
                match fs::remove_dir(dir) {
                    Ok(()) => break,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                    Err(e)
                        if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
                    {
                        std::thread::sleep(REMOVE_INTERVAL);
                    }
                    Err(source) => {
                        return Err(CgroupError::Remove {
                            path: dir.clone(),
                            source,
                        });
                    }
                }
            }
            if let Some(parent) = dir.parent().filter(|parent| is_own_parent(parent)) {
                // While other sandboxes are in there it stays.
                let _ = fs::remove_dir(parent);
            }
        }
        Ok(())
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    let mut made = fs::create_dir_all(dir);
    for _ in 1..CREATE_ATTEMPTS {
        match &made {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                made = fs::create_dir_all(dir);
            }
            _ => break,
        }
    }
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        enable_controllers(dir);
    }
    made
}

/// cgroup v2 gives a cgroup only the controllers that every one above it passes on. What the host does not have, or a cgroup with
/// processes of its own can't pass on, is left out.
fn enable_controllers(dir: &Path) {
    let above = dir.ancestors().skip(1);
    let above: Vec<_> = above.take_while(|dir| dir.starts_with(ROOT)).collect();
    for cgroup in above.iter().rev() {
        for controller in V2_CONTROLLERS {
            let _ = fs::write(
                cgroup.join("cgroup.subtree_control"),
                format!("+{controller}"),
            );
        }
    }
}

fn is_own_parent(dir: &Path) -> bool {
    hierarchies()
        .iter()
        .any(|hierarchy| hierarchy.root.join(path::OWN_PARENT) == dir)
}

/// A mounted tree of cgroups.
#[derive(Debug)]
struct Hierarchy {
    root: PathBuf,
    /// The v1 controller; None for v2.
    controller: Option<&'static str>,
    /// Files that hold a limit.
    limits: &'static [&'static str],
}

fn hierarchies() -> Vec<Hierarchy> {
    let root = Path::new(ROOT);
    if root.join("cgroup.controllers").exists() {
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
        .filter(|hierarchy| hierarchy.root.join("cgroup.procs").exists())
        .collect()
}

impl Hierarchy {
    /// Whether a process with this `/proc/<pid>/cgroup` has a limit here, set on its cgroup or on one above.
    fn confines(&self, proc_cgroup: &str) -> bool {
        // "4:cpu,cpuacct:/path", in v2 "0::/path"; a path above the root of a cgroup namespace begins with "/..".
        let path = proc_cgroup.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let here = match self.controller {
                None => controllers.is_empty(),
                Some(name) => controllers.split(',').any(|other| other == name),
            };
            here.then_some(path)
        });
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

fn kill_all(dir: &Path) {
    if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in procs.lines().filter_map(|line| line.parse().ok()) {
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => tracing::warn!(pid, %error, "can't kill a process of the sandbox"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_proto::ids::SandboxId;
    use std::process::Command;

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

    #[test]
    fn the_common_parent_goes_with_the_last() {
        let names = ["a", "b"].map(|name| SandboxId::new(format!("{name}-test")).unwrap());
        let [first, second] = names.map(|id| SandboxCgroup::create(&CgroupPath::own(&id)).unwrap());
        first.remove().unwrap();
        assert!(second.dirs.iter().all(|dir| dir.is_dir()));
        second.remove().unwrap();
        assert!(second.dirs.iter().all(|dir| !dir.exists()));
    }

    #[test]
    fn removing_kills_what_is_left() {
        let path = format!("/coffer-test-{}", std::process::id());
        let path = CgroupPath::parse(&path).unwrap();
        let cgroup = SandboxCgroup::create(&path).unwrap();
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        cgroup.add(child.id().try_into().unwrap()).unwrap();
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        cgroup.remove().unwrap();
        assert!(!reaper.join().unwrap().success());
        cgroup.remove().unwrap();
        assert!(cgroup.dirs.iter().all(|dir| !dir.exists()) && !cgroup.dirs.is_empty());
    }
}
