//! What the host kernel and the installation have to offer, apart from KVM and the guest image.

use super::{Finding, NeededBy};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, Uid, access};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The emulator that coffer-qemu drives.
pub(super) const QEMU: &str = "qemu-system-x86_64";
/// The first QEMU with every property that coffer-qemu sets.
const MIN_QEMU: (u32, u32) = (7, 2);
/// Paths of unix sockets end at 107 bytes; after the root comes an id, as `coffer run` makes them, and the socket's name.
const MAX_ROOT_LENGTH: usize = 107 - "/0123456789ab/task.sock".len();

/// A test and its remedy; Ok and Err are what is shown.
type Probe = (
    &'static str,
    NeededBy,
    fn() -> Result<String, String>,
    &'static str,
);

const PROBES: [Probe; 9] = [
    ("root", NeededBy::Everything, root, "run coffer as root"),
    (
        "namespaces",
        NeededBy::Everything,
        namespaces,
        "run outside of containers, or in a privileged one",
    ),
    (
        "memfd",
        NeededBy::Everything,
        memfd,
        "use Linux 5.10 or newer",
    ),
    (
        "openat2",
        NeededBy::Everything,
        resolve_in_root,
        "use Linux 5.10 or newer",
    ),
    (
        "seccomp",
        NeededBy::Everything,
        seccomp,
        "use a kernel with CONFIG_SECCOMP_FILTER",
    ),
    (
        "cgroup",
        NeededBy::Optional,
        cgroup,
        "mount cgroup2 on /sys/fs/cgroup; without it a sandbox has no host limits",
    ),
    (
        "landlock",
        NeededBy::Optional,
        landlock,
        "add landlock to the kernel's lsm= list for one more wall around coffer-vmm",
    ),
    (
        "tun device",
        NeededBy::Optional,
        tun,
        "load the module tun; without it VMs have no network",
    ),
    (
        "port-forward",
        NeededBy::Optional,
        port_forward,
        "use Linux 5.9 or newer with CONFIG_BPF_SYSCALL and CONFIG_INET; without it port-forward does not reach a VM",
    ),
];

/// Everything but KVM and the guest image.
pub(super) fn findings(root: &Path, libexec: &Path) -> Vec<Finding> {
    let mut findings: Vec<_> = PROBES
        .iter()
        .map(|(name, needed_by, probe, remedy)| Finding::of(name, *needed_by, probe(), remedy))
        .collect();
    let remedy = "choose another directory with --root, COFFER_ROOT or the key root";
    findings.push(Finding::of(
        "state root",
        NeededBy::Everything,
        state_root(root),
        remedy,
    ));
    let remedy = "run cargo xtask build, or reinstall Coffer";
    for (name, needed_by) in [
        ("coffer-fsd", NeededBy::Everything),
        ("coffer-vmm", NeededBy::CofferVmm),
        ("coffer-qemu", NeededBy::Qemu),
    ] {
        let path = libexec.join(name);
        let found = if is_program(&path) {
            Ok(path.display().to_string())
        } else {
            Err(format!("no program {}", path.display()))
        };
        findings.push(Finding::of(name, needed_by, found, remedy));
    }
    findings.push(Finding::of(
        "QEMU",
        NeededBy::Qemu,
        qemu(),
        "install qemu-system-x86 (7.2 or newer)",
    ));
    findings
}

pub(super) fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, AccessFlags::X_OK).is_ok()
}

pub(super) fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|path| is_program(path))
}

/// Who wants a VM is not root of the host.
#[derive(Debug, thiserror::Error)]
#[error(
    "Coffer needs root of the host, for a VM's network, mounts and user id, and {0}; rootless engines are not supported"
)]
pub struct NotRoot(String);

/// Refuses a caller who could not make a VM, before anything is made.
pub fn need_root() -> Result<(), NotRoot> {
    root().map(drop).map_err(NotRoot)
}

fn root() -> Result<String, String> {
    let uid = Uid::effective();
    if !uid.is_root() {
        return Err(format!("this is user {uid}"));
    }
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    match root_outside(&map) {
        Some(uid) if uid != 0 => Err(format!(
            "this is root in a user namespace only, and user {uid} outside of it"
        )),
        _ => Ok("effective user id 0".into()),
    }
}

/// The id outside that is 0 in the user namespace of this `uid_map` (user_namespaces(7)). None where the kernel has none.
fn root_outside(uid_map: &str) -> Option<u32> {
    uid_map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace();
        let (inside, outside) = (numbers.next()?, numbers.next()?);
        (inside == "0").then(|| outside.parse().ok())?
    })
}

/// Makes them in a thread that then ends, and with it they do.
fn namespaces() -> Result<String, String> {
    let make = || {
        for (name, flag) in [
            ("mount", CloneFlags::CLONE_NEWNS),
            ("network", CloneFlags::CLONE_NEWNET),
            ("IPC", CloneFlags::CLONE_NEWIPC),
            ("UTS", CloneFlags::CLONE_NEWUTS),
            ("PID", CloneFlags::CLONE_NEWPID),
        ] {
            unshare(flag).map_err(|error| format!("a new {name} namespace: {}", error.desc()))?;
        }
        Ok("mount, network, IPC, UTS and PID can be made".into())
    };
    std::thread::spawn(make)
        .join()
        .unwrap_or_else(|_| Err("the test broke off".into()))
}

fn memfd() -> Result<String, String> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    memfd_create(c"coffer-check", flags)
        .map(|_| "with seals".into())
        .map_err(|error| error.desc().into())
}

fn resolve_in_root() -> Result<String, String> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let here = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|error| error.desc().to_owned())?;
    openat2(&here, "..", how)
        .map(|_| "with RESOLVE_IN_ROOT".into())
        .map_err(|error| error.desc().into())
}

fn seccomp() -> Result<String, String> {
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    if actions
        .split_whitespace()
        .any(|action| action == "kill_process")
    {
        return Ok("filters can kill a process".into());
    }
    Err("filters are not available".into())
}

fn cgroup() -> Result<String, String> {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Ok("version 2".into());
    }
    let v1 = ["memory", "cpu", "pids"]
        .iter()
        .all(|name| Path::new("/sys/fs/cgroup").join(name).is_dir());
    if v1 {
        Ok("version 1".into())
    } else {
        Err("not mounted".into())
    }
}

#[allow(unsafe_code)]
fn landlock() -> Result<String, String> {
    const CREATE_RULESET_VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes no pointer and only gives the version of the interface.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    if version > 0 {
        Ok(format!("interface version {version}"))
    } else {
        Err("not in this kernel or switched off".into())
    }
}

fn tun() -> Result<String, String> {
    let opened = open(
        "/dev/net/tun",
        OFlag::O_RDWR | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    opened
        .map(|_| "/dev/net/tun".into())
        .map_err(|error| format!("/dev/net/tun: {}", error.desc()))
}

fn port_forward() -> Result<String, String> {
    crate::network::probe_port_forward().map(|()| "by BPF socket lookup".into())
}

/// The directory is made when the first sandbox is, so here its nearest existing parent counts.
fn state_root(root: &Path) -> Result<String, String> {
    let shown = root.display();
    if !root.is_absolute() {
        return Err(format!("{shown} is not an absolute path"));
    }
    if root.as_os_str().len() > MAX_ROOT_LENGTH {
        return Err(format!(
            "{shown} is longer than {MAX_ROOT_LENGTH} characters, too long for sockets in it"
        ));
    }
    let existing = root
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    if !existing.is_dir() {
        return Err(format!("{} is no directory", existing.display()));
    }
    access(existing, AccessFlags::W_OK).map_err(|error| format!("{shown}: {}", error.desc()))?;
    let space = nix::sys::statvfs::statvfs(existing)
        .map_err(|error| format!("{shown}: {}", error.desc()))?;
    Ok(format!(
        "{shown}, {} MiB free",
        (space.blocks_available() * space.fragment_size()) >> 20
    ))
}

fn qemu() -> Result<String, String> {
    let path = find_in_path(QEMU).ok_or_else(|| format!("{QEMU} is not in PATH"))?;
    let output = Command::new(&path)
        .arg("--version")
        .output()
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version =
        qemu_version(&text).ok_or_else(|| format!("{} tells no version", path.display()))?;
    let shown = format!("{}.{} ({})", version.0, version.1, path.display());
    if version < MIN_QEMU {
        Err(shown)
    } else {
        Ok(shown)
    }
}

/// From "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)".
fn qemu_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_once("version ")?.1.split(['.', ' ', '\n', '(']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_of_a_user_namespace_is_somebody_else_outside() {
        assert_eq!(root_outside("         0          0 4294967295\n"), Some(0));
        assert_eq!(root_outside("0 1000 1\n1 100000 65536\n"), Some(1000));
        assert_eq!(root_outside("1 100000 65536\n"), None);
        assert_eq!(root_outside(""), None);
    }

    #[test]
    fn versions_of_qemu_are_read() {
        assert_eq!(
            qemu_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"),
            Some((10, 0))
        );
        assert_eq!(qemu_version("QEMU emulator version 7.2\n"), Some((7, 2)));
        assert_eq!(qemu_version("something else"), None);
    }

    #[test]
    fn a_state_root_is_refused_with_its_reason() {
        assert!(
            state_root(Path::new("relative"))
                .unwrap_err()
                .contains("absolute")
        );
        assert!(
            state_root(Path::new("/dev/null/x"))
                .unwrap_err()
                .contains("/dev/null is no directory")
        );
        assert!(
            state_root(&Path::new("/").join("x".repeat(90)))
                .unwrap_err()
                .contains("too long")
        );
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("a/b");
        assert!(state_root(&deep).unwrap().contains("MiB free"));
        assert!(!deep.exists());
    }
}
