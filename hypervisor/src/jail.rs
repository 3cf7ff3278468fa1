//! Locks the process up. Everything it will ever need arrived as an open file, so it keeps no path, no capability, no
//! identity and no way to start another process.
//!
//! Entered once, while the process has one thread: before guest memory exists and long before guest code runs. What
//! each step takes away:
//!
//! | step | afterwards |
//! |---|---|
//! | namespaces | own mounts, network (none), IPC, host name, cgroup view |
//! | empty root | the file system is one empty, read-only directory |
//! | capabilities, uid, gid, groups | nobody that owns anything on this host |
//! | no_new_privs, landlock | no set-uid program, no file or port by any path, should one ever appear |
//! | not dumpable | no core file with guest memory, no ptrace by the same uid |
//! | limits | few open files, no core; later ([`enter_last_limits`]) no larger files than disks and memory, no further thread |
//!
//! A PID namespace would only hold for children, of which there are none. Seccomp ([`crate::seccomp`]) comes on top, per
//! thread.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, Scope,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid};
use std::fs::File;
use std::os::fd::RawFd;

/// Open files at most: 1,023 vsock connections, and what devices and vCPUs need.
const MAX_FILES: u64 = 4096;
/// Files may grow to the largest disk or memory file, or this, which is for the log.
const MIN_FILE_SIZE: u64 = 1 << 30;
/// The rules of Linux 6.12. An older kernel takes those it knows.
const LANDLOCK: ABI = ABI::V6;
/// Any directory that every Linux host has; the empty root is mounted on it, in our own mount namespace.
const STEPPING_STONE: &str = "/proc";

/// Which wall could not be raised.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("the VMM can't lock itself up: {0}")]
    System(&'static str, #[source] nix::Error),
    #[error("the VMM can't lock itself up: capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    #[error("the VMM can't lock itself up: landlock")]
    Landlock(#[source] RulesetError),
    #[error("the VMM can't lock itself up: /dev/null can't be opened")]
    Null(#[source] std::io::Error),
}

fn step(what: &'static str) -> impl Fn(nix::Error) -> JailError {
    move |error| JailError::System(what, error)
}

/// Closes what the parent left open beside standard streams and the control socket. First thing in `main`.
#[allow(unsafe_code)]
pub fn close_inherited(after: RawFd) -> Result<(), JailError> {
    // SAFETY: no descriptor above `after` belongs to any object of this process yet.
    let done = unsafe { libc::close_range(after.unsigned_abs() + 1, libc::c_uint::MAX, 0) };
    nix::Error::result(done)
        .map(drop)
        .map_err(step("close inherited files"))
}

/// Raises all walls, for the uid and gid `id`.
pub fn enter(id: u32) -> Result<(), JailError> {
    leave_namespaces()?;
    empty_root()?;
    enter_first_limits()?;
    take_identity(id)?;
    prctl::set_no_new_privs().map_err(step("no_new_privs"))?;
    prctl::set_dumpable(false).map_err(step("not dumpable"))?;
    forbid_paths()
}

fn leave_namespaces() -> Result<(), JailError> {
    let all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(all).map_err(step("new namespaces"))
}

fn empty_root() -> Result<(), JailError> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(step("private mounts"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(
        Some("none"),
        STEPPING_STONE,
        Some("tmpfs"),
        flags,
        Some("size=4k,nr_inodes=1,mode=555"),
    )
    .map_err(step("empty root"))?;
    chdir(STEPPING_STONE).map_err(step("enter the empty root"))?;
    // The old root is stacked on the new one and then taken off, so no directory for it is needed.
    pivot_root(".", ".").map_err(step("pivot to the empty root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the old root"))?;
    chdir("/").map_err(step("enter the empty root"))
}

fn take_identity(id: u32) -> Result<(), JailError> {
    use caps::CapSet;
    let capabilities = |set| caps::clear(None, set).map_err(JailError::Capabilities);
    capabilities(CapSet::Bounding)?;
    capabilities(CapSet::Ambient)?;
    setgroups(&[]).map_err(step("drop groups"))?;
    let (gid, uid) = (Gid::from_raw(id), Uid::from_raw(id));
    setresgid(gid, gid, gid).map_err(step("take the gid"))?;
    setresuid(uid, uid, uid).map_err(step("take the uid"))?;
    // Gone already with the uid, unless that is 0.
    capabilities(CapSet::Inheritable)?;
    capabilities(CapSet::Effective)?;
    capabilities(CapSet::Permitted)
}

/// Landlock with no rule: every file system and network access by name is denied. Older kernels know less of it, and
/// kernels without it leave this to the empty root.
fn forbid_paths() -> Result<(), JailError> {
    rules(AccessFs::from_all(LANDLOCK))
        .and_then(RulesetCreated::restrict_self)
        .map(drop)
        .map_err(JailError::Landlock)
}

/// As much of that as leaves a process that loads libraries and firmware by path, as QEMU does: no file is written,
/// made or removed by its path, and no network, abstract socket or process outside is reached.
pub fn forbid_writes() -> Result<(), JailError> {
    let null = File::open("/dev/null").map_err(JailError::Null)?;
    rules(AccessFs::from_write(LANDLOCK))
        .and_then(|rules| {
            let allowed = AccessFs::WriteFile | AccessFs::IoctlDev;
            rules.add_rule(PathBeneath::new(null, allowed))
        })
        .and_then(RulesetCreated::restrict_self)
        .map(drop)
        .map_err(JailError::Landlock)
}

/// Rules that deny these accesses by name, and all of the network.
fn rules(files: BitFlags<AccessFs>) -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .handle_access(files)
        .and_then(|rules| rules.handle_access(AccessNet::from_all(LANDLOCK)))
        .and_then(|rules| rules.scope(Scope::from_all(LANDLOCK)))
        .and_then(Ruleset::create)
}

/// Limits that hold from the start: open files, and no core file with guest memory in it.
pub fn enter_first_limits() -> Result<(), JailError> {
    limit(Resource::RLIMIT_NOFILE, MAX_FILES, "limit of open files")?;
    limit(Resource::RLIMIT_CORE, 0, "limit of core files")
}

/// The last limits, when all threads run and all memory exists: no process or thread may be started, and no file
/// become larger than `largest_file`.
pub fn enter_last_limits(largest_file: u64) -> Result<(), JailError> {
    limit(
        Resource::RLIMIT_FSIZE,
        largest_file.max(MIN_FILE_SIZE),
        "limit of file sizes",
    )?;
    limit(Resource::RLIMIT_NPROC, 0, "limit of processes")
}

fn limit(resource: Resource, value: u64, what: &'static str) -> Result<(), JailError> {
    // Lower only: raising the hard limit needs a capability that even root may lack.
    let hard = getrlimit(resource).map_err(step(what))?.1;
    let value = value.min(hard);
    setrlimit(resource, value, value).map_err(step(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LANDLOCK_CREATE_RULESET_VERSION.
    #[allow(unsafe_code)]
    fn kernel_has_landlock() -> bool {
        // SAFETY: without a structure, the call only tells a version.
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) > 0 }
    }

    /// In a thread, since the rules hold for the thread that takes them.
    #[test]
    fn who_may_not_write_can_still_read_and_use_dev_null() {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        std::fs::write(&old, "text").unwrap();
        let jailed = move || {
            forbid_writes().unwrap();
            assert_eq!(std::fs::read_to_string(&old).unwrap(), "text");
            std::fs::write("/dev/null", "x").unwrap();
            let changes = [
                std::fs::write(&old, "other"),
                std::fs::write(&new, ""),
                std::fs::create_dir(&new),
                std::fs::remove_file(&old),
            ];
            changes.map(|change| change.map_err(|error| error.raw_os_error()))
        };
        let changes = std::thread::spawn(jailed).join().unwrap();
        if kernel_has_landlock() {
            assert_eq!(changes, [Err(Some(libc::EACCES)); 4]);
        }
    }
}
