//! The host cgroup of a sandbox's processes: the hypervisor process with the guest's memory, coffer-fsd, and the supervisor where its caller
//! has no other place for it (see [`SandboxOptions::joins_cgroup`](crate::machine::SandboxOptions::joins_cgroup)).
//!
//! The supervisor takes the cgroup away at the end, so it goes back to where it was started first.
//!
//! On cgroup v2 it is one directory; on v1 and hybrid hosts one in each hierarchy that can limit or stop the sandbox. Engines name
//! its path. Where nobody does, it is `/coffer/<id>-<supervisor's pid>`, in the hierarchies that put no limit on the
//! supervisor: a sandbox must not be a way out of its caller's limits.

mod hierarchy;
mod path;

pub use path::{CgroupPath, CgroupPathError};

use hierarchy::{Hierarchy, PROCESSES};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A cgroup is busy until the kernel has buried its last process.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
const REMOVE_INTERVAL: Duration = Duration::from_millis(10);

/// Where this process was before it joined a sandbox's cgroup, as its `/proc/self/cgroup` said.
static HOME: OnceLock<String> = OnceLock::new();

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

/// The cgroup of one sandbox: the same path in some hierarchies.
#[derive(Debug, Clone)]
pub struct SandboxCgroup {
    path: CgroupPath,
    hierarchies: Vec<Hierarchy>,
}

impl SandboxCgroup {
    /// Names a cgroup that may or may not exist.
    pub fn at(path: &CgroupPath) -> Self {
        Self {
            path: path.clone(),
            hierarchies: hierarchy::mounted(),
        }
    }

    /// Makes the cgroup in every hierarchy.
    pub fn create(path: &CgroupPath) -> Result<Self, CgroupError> {
        Self::at(path).make()
    }

    /// The same, in the hierarchies only where this process is under no limit. None if there is no such hierarchy.
    pub fn create_unconfined(path: &CgroupPath) -> Result<Option<Self>, CgroupError> {
        let own = own_cgroup();
        let mut cgroup = Self::at(path);
        cgroup
            .hierarchies
            .retain(|hierarchy| !hierarchy.confines(&own));
        if cgroup.hierarchies.is_empty() {
            return Ok(None);
        }
        cgroup.make().map(Some)
    }

    fn make(self) -> Result<Self, CgroupError> {
        for hierarchy in &self.hierarchies {
            if let Err(source) = hierarchy.make(&self.path) {
                let path = hierarchy.directory(&self.path);
                // Half a cgroup is of no use; what was made goes again.
                let _ = self.remove();
                return Err(CgroupError::Create { path, source });
            }
        }
        Ok(self)
    }

    /// Its directories, one in each hierarchy.
    fn dirs(&self) -> impl Iterator<Item = PathBuf> {
        self.hierarchies
            .iter()
            .map(|hierarchy| hierarchy.directory(&self.path))
    }

    /// Moves a process in, with all its threads.
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        for path in self.dirs() {
            fs::write(path.join(PROCESSES), pid.to_string())
                .map_err(|source| CgroupError::Add { pid, path, source })?;
        }
        Ok(())
    }

    /// Moves this process in. It leaves with [`remove`](Self::remove).
    pub fn join(&self) -> Result<(), CgroupError> {
        HOME.get_or_init(own_cgroup);
        self.add(std::process::id().cast_signed())
    }

    /// Moves this process out, so that it does not end with what is killed there.
    fn leave(&self) {
        let own = std::process::id();
        for hierarchy in &self.hierarchies {
            if hierarchy.holds(&self.path, own) {
                send_home(hierarchy, own);
            }
        }
    }

    /// How many processes in it the host's kernel has killed for want of memory, the cgroup's own or the host's.
    pub fn oom_kills(&self) -> u64 {
        let count = |dir: PathBuf| {
            // v2 and v1.
            ["memory.events", "memory.oom_control"]
                .iter()
                .find_map(|file| fs::read_to_string(dir.join(file)).ok())
                .and_then(|text| {
                    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
                    count?.trim().parse::<u64>().ok()
                })
        };
        self.dirs().filter_map(count).sum::<u64>()
    }

    /// Kills what is left in the cgroup and removes it with all in it. A cgroup that is gone is no error. Blocks for some milliseconds.
    /// This process is not killed: it goes home first.
    pub fn remove(&self) -> Result<(), CgroupError> {
        self.leave();
        let deadline = Instant::now() + REMOVE_DEADLINE;
        for hierarchy in &self.hierarchies {
            let path = hierarchy.directory(&self.path);
            loop {
                match remove_tree(&path) {
                    Ok(()) => break,
                    Err(e)
                        if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
                    {
                        std::thread::sleep(REMOVE_INTERVAL);
                    }
                    Err(source) => return Err(CgroupError::Remove { path, source }),
                }
            }
            if let Some(parent) = self.path.own_parent() {
                // While other sandboxes are in there it stays.
                let _ = fs::remove_dir(hierarchy.directory(&parent));
            }
        }
        Ok(())
    }
}

/// Moves a child of this process to where this one was before it joined a sandbox's cgroup: it is not the sandbox's, and may outlive it.
pub fn let_out(pid: u32) {
    if HOME.get().is_some() {
        for hierarchy in hierarchy::mounted() {
            send_home(&hierarchy, pid);
        }
    }
}

fn send_home(hierarchy: &Hierarchy, pid: u32) {
    let home = HOME.get().map_or("", String::as_str);
    if let Err(error) = hierarchy.send(pid, home) {
        tracing::warn!(pid, %error, "a process stays in the sandbox's cgroup");
    }
}

/// This process's `/proc/self/cgroup`.
pub(crate) fn own_cgroup() -> String {
    fs::read_to_string("/proc/self/cgroup").unwrap_or_default()
}

/// The unit of systemd's that a process with this `/proc/<pid>/cgroup` is in: in cgroup v1 systemd has a hierarchy of its own.
pub(crate) fn unit_of(proc_cgroup: &str) -> Option<&str> {
    let mut memberships = hierarchy::memberships(proc_cgroup);
    let (_, path) = memberships.find(|(of, _)| of.is_empty() || *of == "name=systemd")?;
    let is_unit = |part: &&str| part.ends_with(".service") || part.ends_with(".scope");
    path.rsplit('/').find(is_unit)
}

/// Tries to remove a cgroup that may be gone, and those in it.
fn remove_tree(dir: &Path) -> io::Result<()> {
    kill_all(dir);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn kill_all(dir: &Path) {
    if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    let procs = fs::read_to_string(dir.join(PROCESSES)).unwrap_or_default();
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
    fn the_common_parent_goes_with_the_last() {
        let names = ["a", "b"].map(|name| SandboxId::new(format!("{name}-test")).unwrap());
        let [first, second] = names.map(|id| SandboxCgroup::create(&CgroupPath::own(&id)).unwrap());
        first.remove().unwrap();
        assert!(second.dirs().all(|dir| dir.is_dir()));
        second.remove().unwrap();
        assert!(second.dirs().all(|dir| !dir.exists()));
    }

    #[test]
    fn who_joined_goes_home_with_the_cgroup_and_so_does_a_child_that_is_let_out() {
        let path = CgroupPath::parse(&format!("/coffer-test-join-{}", std::process::id()));
        let cgroup = SandboxCgroup::create(&path.unwrap()).unwrap();
        let home = own_cgroup();
        cgroup.join().unwrap();
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let within = |pid: u32| {
            let mut hierarchies = cgroup.hierarchies.iter();
            hierarchies.all(|hierarchy| hierarchy.holds(&cgroup.path, pid))
        };
        assert!(within(std::process::id()) && within(child.id()));
        let_out(child.id());
        cgroup.remove().unwrap();
        assert_eq!(own_cgroup(), home);
        assert!(child.try_wait().unwrap().is_none(), "the child was killed");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(cgroup.dirs().all(|dir| !dir.exists()));
    }

    #[test]
    fn the_callers_unit_is_the_last_in_its_path() {
        let v1 = "3:cpu:/\n1:name=systemd:/machine.slice/libpod-conmon-1.scope\n0::/x.service\n";
        assert_eq!(unit_of(v1), Some("libpod-conmon-1.scope"));
        assert_eq!(
            unit_of("0::/system.slice/web.service/runtime\n"),
            Some("web.service")
        );
        assert_eq!(unit_of("0::/\n"), None);
        assert_eq!(unit_of(""), None);
    }

    #[test]
    fn removing_kills_what_is_left() {
        let path = format!("/coffer-test-{}", std::process::id());
        let path = CgroupPath::parse(&path).unwrap();
        let cgroup = SandboxCgroup::create(&path).unwrap();
        let inner = SandboxCgroup::create(&path.child("inner")).unwrap();
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        inner.add(child.id().try_into().unwrap()).unwrap();
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        cgroup.remove().unwrap();
        assert!(!reaper.join().unwrap().success());
        cgroup.remove().unwrap();
        assert!(cgroup.dirs().all(|dir| !dir.exists()) && cgroup.dirs().next().is_some());
    }
}
