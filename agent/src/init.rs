//! The first steps of PID 1: from a bare initramfs to a system in which containers can be made.

use crate::boot::Phases;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use std::io;
use std::path::{Path, PathBuf};

/// A step that failed. There is no way on: the machine ends.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("can't mount {fstype} at {target}")]
    Mount {
        fstype: &'static str,
        target: &'static str,
        #[source]
        cause: nix::Error,
    },
    #[error("can't leave the initramfs for a tmpfs root")]
    SwitchRoot(#[source] nix::Error),
    #[error("can't write {path}")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("can't make the directory {path}")]
    MakeDirectory {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("can't set the limit {resource:?} to {value}")]
    Limit {
        resource: Resource,
        value: u64,
        #[source]
        cause: nix::Error,
    },
}

/// One early mount.
struct Early {
    fstype: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

/// Where POSIX shared memory is.
pub const SHARED_MEMORY: &str = "/dev/shm";
/// How file systems without programs in them are mounted.
pub const NO_EXEC: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);
const NO_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// In this order; the kernel is ours and has all of them.
const MOUNTS: &[Early] = &[
    Early {
        fstype: "proc",
        target: "/proc",
        flags: NO_EXEC,
        data: "",
    },
    Early {
        fstype: "sysfs",
        target: "/sys",
        flags: NO_EXEC,
        data: "",
    },
    Early {
        fstype: "devtmpfs",
        target: "/dev",
        flags: MsFlags::MS_NOSUID,
        data: "mode=0755",
    },
    Early {
        fstype: "devpts",
        target: "/dev/pts",
        flags: NOEXEC_PTS,
        data: "mode=0620,ptmxmode=0666",
    },
    Early {
        fstype: "tmpfs",
        target: SHARED_MEMORY,
        flags: NO_EXEC,
        data: "mode=1777",
    },
    Early {
        fstype: "mqueue",
        target: "/dev/mqueue",
        flags: NO_EXEC,
        data: "",
    },
    Early {
        fstype: "tmpfs",
        target: "/run",
        flags: NO_DEV,
        data: "mode=0755",
    },
    Early {
        fstype: "tmpfs",
        target: "/tmp",
        flags: NO_DEV,
        data: "mode=1777",
    },
    Early {
        fstype: "cgroup2",
        target: CGROUP_ROOT,
        flags: NO_EXEC,
        data: "nsdelegate,memory_recursiveprot",
    },
];
const NOEXEC_PTS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);

/// Where the cgroup v2 tree is.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The agent's own cgroup: processes in the root would be in nobody's statistics. No container has such a name.
const AGENT_CGROUP: &str = "/sys/fs/cgroup/.agent";

/// Open files of the agent, and of a container whose spec sets no limit: what containerd gives as well. It is the
/// kernel's default for fs.nr_open, above which nobody can go.
const MAX_OPEN_FILES: u64 = 1 << 20;

/// Takes all early steps and notes them in `phases`.
pub fn prepare(phases: &mut Phases) -> Result<(), InitError> {
    leave_initramfs()?;
    for early in MOUNTS {
        mount_early(early)?;
    }
    phases.reach("mounts");
    hasten_rcu()?;
    prepare_cgroups()?;
    phases.reach("cgroups");
    set_limits()?;
    let _ = tracing::subscriber::set_global_default(crate::console::ConsoleSubscriber);
    phases.reach("limits");
    Ok(())
}

/// Moves onto a tmpfs as the root file system. pivot_root(2), by which every container gets its own root, refuses to
/// work where the root is the initramfs. This program stays in the hidden initramfs and is found by /proc/self/exe.
fn leave_initramfs() -> Result<(), InitError> {
    const NEW_ROOT: &str = "/coffer-root";
    make_directory(Path::new(NEW_ROOT))?;
    mount(
        Some("coffer"),
        NEW_ROOT,
        Some("tmpfs"),
        NO_DEV,
        Some("mode=0755"),
    )
    .map_err(InitError::SwitchRoot)?;
    nix::unistd::chdir(NEW_ROOT)
        .and_then(|()| mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>))
        .and_then(|()| nix::unistd::chroot("."))
        .and_then(|()| nix::unistd::chdir("/"))
        .map_err(InitError::SwitchRoot)
}

fn mount_early(early: &Early) -> Result<(), InitError> {
    make_directory(Path::new(early.target))?;
    mount(
        Some(early.fstype),
        early.target,
        Some(early.fstype),
        early.flags,
        Some(early.data),
    )
    .map_err(|cause| InitError::Mount {
        fstype: early.fstype,
        target: early.target,
        cause,
    })
}

/// Lets the kernel's grace periods be short. Moving between cgroups, taking namespaces and mounts down all wait for one, on the
/// way to every container; what an expedited one costs, an interrupt per CPU, is nothing in a machine this small.
fn hasten_rcu() -> Result<(), InitError> {
    write("/sys/kernel/rcu_expedited".into(), "1")
}

/// Puts the agent into its own cgroup and lets the children of the root use every controller.
fn prepare_cgroups() -> Result<(), InitError> {
    make_directory(Path::new(AGENT_CGROUP))?;
    write(Path::new(AGENT_CGROUP).join("cgroup.procs"), "0")?;
    let path = Path::new(CGROUP_ROOT).join("cgroup.controllers");
    let controllers =
        std::fs::read_to_string(&path).map_err(|cause| InitError::Write { path, cause })?;
    let all: String = controllers
        .split_whitespace()
        .map(|name| format!("+{name} "))
        .collect();
    write(
        Path::new(CGROUP_ROOT).join("cgroup.subtree_control"),
        all.trim_end(),
    )
}

/// Limits that children inherit, and the wish of the kernel never to choose the agent when memory is short.
fn set_limits() -> Result<(), InitError> {
    let limit = |resource, value| {
        setrlimit(resource, value, value).map_err(|cause| InitError::Limit {
            resource,
            value,
            cause,
        })
    };
    limit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES)?;
    limit(Resource::RLIMIT_CORE, 0)?;
    write("/proc/self/oom_score_adj".into(), "-1000")?;
    // Warnings and worse reach the console; what the guest's containers do to the kernel log stays in its ring.
    write("/proc/sys/kernel/printk".into(), "5 4 1 7")
}

fn make_directory(path: &Path) -> Result<(), InitError> {
    std::fs::create_dir_all(path).map_err(|cause| InitError::MakeDirectory {
        path: path.to_owned(),
        cause,
    })
}

fn write(path: PathBuf, content: &str) -> Result<(), InitError> {
    std::fs::write(&path, content).map_err(|cause| InitError::Write { path, cause })
}
