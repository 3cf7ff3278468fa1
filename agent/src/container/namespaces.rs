//! Which namespaces a container has of its own, which it shares with its pod, and what is written about them.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::Pid;
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType, Spec};

use super::failure::{Failure, at};
use super::wire::{FdName, Fds};

/// Namespaces that the containers of the pod have in common.
#[derive(Debug, Default)]
pub struct SharedNamespaces {
    /// `None` is the agent's own, here and in the next two.
    pub ipc: Option<OwnedFd>,
    pub uts: Option<OwnedFd>,
    pub net: Option<OwnedFd>,
    /// A PID namespace, or a process that is in it. `None` gives every container one of its own.
    pub pid: Option<OwnedFd>,
}

impl SharedNamespaces {
    /// The same, with the PID namespace of a process.
    pub fn with_pid_of(&self, process: BorrowedFd<'_>) -> io::Result<Self> {
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self {
            ipc: copy(&self.ipc)?,
            uts: copy(&self.uts)?,
            net: copy(&self.net)?,
            pid: Some(process.try_clone_to_owned()?),
        })
    }
}

/// What kind of namespaces a container gets.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Not where the pod shares one: the stage has joined that, and the clone is born into it.
    pub own_pid: bool,
    /// Only where the container's host name is not the pod's.
    pub own_uts: bool,
    pub user: bool,
    pub cgroup: bool,
    pub time: bool,
}

impl Plan {
    /// Decides, in the stage, which has joined the pod's namespaces.
    pub fn of(spec: &Spec, shares_pid: bool) -> Result<Self, Failure> {
        let linux = spec.linux().as_ref();
        let has = |kind: LinuxNamespaceType| {
            let all = linux.and_then(|linux| linux.namespaces().as_ref());
            all.is_some_and(|all| all.iter().any(|namespace| namespace.typ() == kind))
        };
        let pod = nix::sys::utsname::uname().map_err(at("uname"))?;
        let differs = |name: &Option<String>, pods: &std::ffi::OsStr| {
            name.as_deref()
                .is_some_and(|name| !name.is_empty() && pods != name)
        };
        Ok(Self {
            own_pid: !shares_pid,
            own_uts: differs(spec.hostname(), pod.nodename())
                || differs(spec.domainname(), pod.domainname()),
            user: has(LinuxNamespaceType::User),
            cgroup: has(LinuxNamespaceType::Cgroup),
            time: has(LinuxNamespaceType::Time),
        })
    }

    /// For the clone of the container's init. The cgroup namespace comes later, in the container's cgroup.
    pub fn clone_flags(self) -> libc::c_int {
        let flag = |wanted: bool, flag: libc::c_int| if wanted { flag } else { 0 };
        libc::CLONE_NEWNS
            | flag(self.own_pid, libc::CLONE_NEWPID)
            | flag(self.own_uts, libc::CLONE_NEWUTS)
            | flag(self.user, libc::CLONE_NEWUSER)
    }

    /// What a further process joins by the pidfd of init, besides the PID namespace.
    pub fn join_flags(self) -> libc::c_int {
        let flag = |wanted: bool, flag: libc::c_int| if wanted { flag } else { 0 };
        libc::CLONE_NEWNS
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWNET
            | flag(self.user, libc::CLONE_NEWUSER)
            | flag(self.cgroup, libc::CLONE_NEWCGROUP)
            | flag(self.time, libc::CLONE_NEWTIME)
    }
}

/// Takes the calling process into the namespaces that the pod shares.
pub fn join_pod(fds: &Fds) -> Result<(), Failure> {
    for (name, flag) in [
        (FdName::Ipc, CloneFlags::CLONE_NEWIPC),
        (FdName::Uts, CloneFlags::CLONE_NEWUTS),
        (FdName::Net, CloneFlags::CLONE_NEWNET),
        (FdName::Pid, CloneFlags::CLONE_NEWPID),
    ] {
        if let Some(fd) = fds.get(&name) {
            setns(fd.as_fd(), flag).map_err(|errno| match errno {
                // A process instead of its namespace.
                Errno::ESRCH => Failure::new(
                    format!("join the {name:?} namespace of another container"),
                    "that container has ended",
                ),
                errno => at(format!("join the pod's {name:?} namespace"))(errno),
            })?;
        }
    }
    Ok(())
}

/// Makes a time namespace, with its offsets, that the calling process's children are born into.
pub fn unshare_time(linux: &Linux) -> Result<(), Failure> {
    unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))
        .map_err(at("unshare the time namespace"))?;
    let lines: String = linux
        .time_offsets()
        .iter()
        .flatten()
        .map(|(clock, offset)| {
            let (secs, nanos) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
            format!("{clock} {secs} {nanos}\n")
        })
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    fs::write("/proc/self/timens_offsets", lines).map_err(at("write linux.timeOffsets"))
}

/// Writes the mappings of a user namespace that `pid` is alone in.
pub fn write_id_maps(pid: Pid, linux: &Linux) -> Result<(), Failure> {
    for (file, mappings) in [
        ("uid_map", linux.uid_mappings()),
        ("gid_map", linux.gid_mappings()),
    ] {
        let text: String = mappings.iter().flatten().map(line).collect();
        fs::write(format!("/proc/{pid}/{file}"), text).map_err(at(format!("write {file}")))?;
    }
    Ok(())
}

fn line(mapping: &LinuxIdMapping) -> String {
    format!(
        "{} {} {}\n",
        mapping.container_id(),
        mapping.host_id(),
        mapping.size()
    )
}

/// Writes sysctls of the pod's namespaces, which the calling process has joined.
pub fn write_sysctls(linux: &Linux) -> Result<(), Failure> {
    for (key, value) in linux.sysctl().iter().flatten() {
        // As sysctl(8): with a slash in the key the dots are part of names, as in "net/ipv4/conf/eth0.1/mtu".
        let file = if key.contains('/') {
            key.clone()
        } else {
            key.replace('.', "/")
        };
        fs::write(format!("/proc/sys/{file}"), value)
            .map_err(at(format!("linux.sysctl.{key} = {value:?}")))?;
    }
    Ok(())
}

/// Gives the calling process's own UTS namespace the container's names.
pub fn set_host_names(spec: &Spec) -> Result<(), Failure> {
    if let Some(name) = spec.hostname().as_deref().filter(|name| !name.is_empty()) {
        nix::unistd::sethostname(name).map_err(at(format!("set hostname {name:?}")))?;
    }
    if let Some(name) = spec.domainname().as_deref().filter(|name| !name.is_empty()) {
        set_domain_name(name).map_err(at(format!("set domainname {name:?}")))?;
    }
    Ok(())
}

#[allow(unsafe_code, reason = "nix has no setdomainname")]
fn set_domain_name(name: &str) -> nix::Result<()> {
    // SAFETY: a pointer and the length of what it points to.
    let result = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    Errno::result(result).map(|_| ())
}
