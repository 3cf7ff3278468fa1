//! The host cgroup that holds every process of a sandbox: the hypervisor process with the guest's memory, and coffer-fsd.
//!
//! On cgroup v2 it is one directory; on v1 and hybrid hosts one in each hierarchy that can limit or stop the sandbox.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";
/// The v1 hierarchies a sandbox joins, where they are mounted.
const V1_CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "freezer"];
/// A cgroup is busy until the kernel has buried its last process.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
const REMOVE_INTERVAL: Duration = Duration::from_millis(10);

/// Why the cgroup could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("the cgroup path {0:?} is not absolute or goes up")]
    Path(String),
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
    /// Makes the cgroup at `path`, which is absolute within each hierarchy, as in the OCI `cgroupsPath`.
    pub fn create(path: &str) -> Result<Self, CgroupError> {
        let cgroup = Self::at(path)?;
        for dir in &cgroup.dirs {
            if let Err(source) = fs::create_dir_all(dir) {
                let error = CgroupError::Create {
                    path: dir.clone(),
                    source,
                };
                // Half a cgroup is of no use; what was made goes again.
                let _ = cgroup.remove();
                return Err(error);
            }
        }
        Ok(cgroup)
    }

    /// Names a cgroup that may or may not exist, for cleaning up.
    pub fn at(path: &str) -> Result<Self, CgroupError> {
        let relative = path
            .strip_prefix('/')
            .ok_or_else(|| CgroupError::Path(path.to_owned()))?;
        let plain = Path::new(relative)
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
        if relative.is_empty() || !plain {
            return Err(CgroupError::Path(path.to_owned()));
        }
        Ok(Self {
            dirs: hierarchies()
                .into_iter()
                .map(|root| root.join(relative))
                .collect(),
        })
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
        }
        Ok(())
    }
}

fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    V1_CONTROLLERS
        .iter()
        .map(|name| root.join(name))
        .filter(|dir| dir.join("cgroup.procs").exists())
        .collect()
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
    use std::process::Command;

    #[test]
    fn paths_that_leave_the_hierarchy_are_refused() {
        for bad in ["", "/", "a", "/../x", "/a/../../b", "/."] {
            assert!(
                matches!(SandboxCgroup::at(bad), Err(CgroupError::Path(_))),
                "{bad:?} was taken"
            );
        }
    }

    #[test]
    fn removing_kills_what_is_left() {
        let path = format!("/coffer-test-{}", std::process::id());
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
