//! What stands between a guest that took over this process and the host.
//!
//! - **Root**: a private mount namespace in which DIR is all there is. It is a *slave* of the mount the shim made, so
//!   that container roots and volumes which the shim binds below DIR later appear here too, while nothing done here
//!   can appear outside. `nodev,nosuid`. A mount arrives with the flags it has when the shim attaches it and later
//!   changes of flags don't arrive: a read-only volume must be read-only before it is attached below DIR. Unmounting
//!   must be lazy (MNT_DETACH), since the guest may still know files of the mount.
//! - **Namespaces**: pid (root's other processes can't be signalled), net, ipc, uts, cgroup.
//! - **Capabilities**: only [`KEPT`]. Without CAP_DAC_READ_SEARCH no file can be opened by handle, which would
//!   reach every file of the file system that DIR lives on; without CAP_MKNOD the guest can't make device nodes
//!   (fifos, sockets and overlayfs whiteouts need none); without CAP_SYS_ADMIN nothing can be mounted.
//! - **System calls**: virtiofsd's list; any other ends the process. `no_new_privs`.

#![allow(unsafe_code)]

use caps::{CapSet, Capability, CapsHashSet};
use coffer_mount::{Attributes, Depth};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fchdir, fork, pivot_root};
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use virtiofsd::seccomp::{SeccompAction, enable_seccomp};

/// What acting for the users of the guest needs: give files to anyone, pass permission checks that the guest's kernel
/// made already, keep or clear set-id bits, take a user's identity to create a file, store file capabilities.
const KEPT: [Capability; 7] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// A step of the way into the jail failed; none is optional.
#[derive(Debug, thiserror::Error)]
#[error("can't {step}")]
pub struct Error {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Names the step in the error.
fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error {
        step,
        source: source.into(),
    }
}

/// The two processes after the fork.
pub enum Role {
    /// Outside; only waits for the child.
    Parent(Pid),
    /// Process 1 of the new pid namespace, which goes on to serve.
    Child,
}

/// Only a child enters a new pid namespace, so this needs a fork. The process must have one thread.
pub fn fork_into_pid_namespace() -> Result<Role, Error> {
    unshare(CloneFlags::CLONE_NEWPID).map_err(step("make a pid namespace"))?;
    // SAFETY: no thread was started yet, so the child finds no lock held by a thread it doesn't have.
    match unsafe { fork() }.map_err(step("fork"))? {
        ForkResult::Parent { child } => Ok(Role::Parent(child)),
        ForkResult::Child => Ok(Role::Child),
    }
}

/// Waits for the child without any privilege and hands on how it ended.
pub fn wait(child: Pid) -> ExitCode {
    for set in [CapSet::Effective, CapSet::Permitted] {
        if let Err(error) = caps::clear(None, set) {
            eprintln!("coffer-fsd: can't drop capabilities: {error}");
        }
    }
    loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => {
                return ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX));
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                let reason = if signal == Signal::SIGSYS {
                    ", for a system call that is not allowed"
                } else {
                    ""
                };
                eprintln!("coffer-fsd: the server was killed by {signal}{reason}");
                return ExitCode::FAILURE;
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                eprintln!("coffer-fsd: can't wait for the server: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
}

/// Makes `share` the root directory of a new mount namespace and leaves the other namespaces too. Returns the
/// directory `/proc/self/fd`, which virtiofsd opens files through, with no way up from it.
pub fn enter(share: &Path) -> Result<File, Error> {
    let others = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP | others)
        .map_err(step("make namespaces"))?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_SLAVE | MsFlags::MS_REC,
        None::<&str>,
    )
    .map_err(step("make the mounts slaves"))?;

    let proc_self_fd = open(Path::new("/proc/self/fd")).map_err(step("open /proc/self/fd"))?;
    let proc_self_fd = coffer_mount::clone_tree(proc_self_fd, Depth::One)
        .map_err(step("take /proc/self/fd along"))?;
    // The copy of a slave is a slave of the same master.
    let share = open(share).map_err(step("open the directory"))?;
    let root =
        coffer_mount::clone_tree(&share, Depth::Recursive).map_err(step("clone its mounts"))?;
    coffer_mount::change(
        &root,
        Depth::Recursive,
        Attributes::NODEV | Attributes::NOSUID,
    )
    .map_err(step("set nodev,nosuid on it"))?;
    coffer_mount::attach(&root, share).map_err(step("mount it on itself"))?;

    fchdir(&root).map_err(step("go to it"))?;
    pivot_root(".", ".").map_err(step("make it the root"))?;
    // The old root now lies on top of the new one, and goes.
    umount2(".", MntFlags::MNT_DETACH).map_err(step("leave the old root"))?;
    nix::unistd::chdir("/").map_err(step("go to the new root"))?;
    Ok(proc_self_fd.into())
}

/// Gives up all that serving does not need. Threads started later inherit the result.
pub fn drop_privileges() -> Result<(), Error> {
    let kept: CapsHashSet = KEPT.into_iter().collect();
    let capabilities = || {
        for unwanted in caps::runtime::thread_all_supported().difference(&kept) {
            caps::drop(None, CapSet::Bounding, *unwanted)?;
        }
        caps::clear(None, CapSet::Inheritable)?;
        caps::set(None, CapSet::Effective, &kept)?;
        caps::set(None, CapSet::Permitted, &kept)
    };
    keep_capabilities_as_a_user().map_err(step("keep capabilities as another user"))?;
    capabilities()
        .map_err(io::Error::other)
        .map_err(step("drop capabilities"))?;
    // No core file: it would hold the guest's memory.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("forbid core files"))?;
    nix::sys::prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;
    // Last of the credential changes, since such changes clear it. The end of the vhost-user connection is the
    // orderly signal; this one is for a parent that is killed.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("ask for the parent's death"))?;
    enable_seccomp(SeccompAction::Kill, false)
        .map_err(io::Error::other)
        .map_err(step("install the seccomp filter"))
}

/// virtiofsd takes the identity of the guest's user to make a file, and the kernel would take the capabilities from a user other
/// than root. But this user may be root of a user namespace in the guest, which may write where the mode forbids it, as in the root of Fedora's
/// images. The guest's kernel has checked that already. Takes CAP_SETPCAP, and holds for threads started later too.
fn keep_capabilities_as_a_user() -> io::Result<()> {
    // SAFETY: no memory is passed.
    let set = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, libc::SECBIT_NO_SETUID_FIXUP) };
    Ok(Errno::result(set).map(drop)?)
}

/// A place to mount from or on.
fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_PATH).open(path)
}
