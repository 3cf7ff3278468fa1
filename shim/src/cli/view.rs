//! The container's files as engines see them through its process.
//!
//! `podman cp` enters the mount namespace of a running container's pid and works on paths there, `podman top` lists the `/proc`
//! that it finds there. In the host's mount namespace both would reach the host's own. So the stand-in's main thread, which is the
//! one that `/proc/<pid>` shows, moves into a mount namespace of its own that has nothing but the container's root and volumes. They
//! are the same directories that the guest has. Its other threads stay where they are.
//!
//! The root is a tenant's: a place in it is resolved by fd within it, and this thread opens nothing by path any more.

use coffer_mount::{Attributes, Change, Depth, Propagation};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, fchdir, pivot_root};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Why there is no such namespace.
#[derive(Debug, thiserror::Error)]
#[error("can't {step} for the container's mount namespace on the host")]
pub struct ViewError {
    step: String,
    source: io::Error,
}

/// What is to be seen.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct View {
    pub(super) rootfs: PathBuf,
    pub(super) read_only: bool,
    pub(super) volumes: Vec<Volume>,
}

/// A bind mount of the container, in the order of its spec.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Volume {
    pub(super) source: PathBuf,
    /// In the container.
    pub(super) destination: PathBuf,
    pub(super) read_only: bool,
}

/// Moves the calling thread there.
pub(super) fn enter(view: &View) -> Result<(), ViewError> {
    let failed = |step: &str| {
        let step = step.to_owned();
        move |source| ViewError { step, source }
    };
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| failed("make a namespace")(errno.into()))?;
    // What the host unmounts goes here too, and nothing of this gets back to the host.
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>)
        .map_err(|errno| failed("leave the host's")(errno.into()))?;
    let root = show_root(view).map_err(failed("mount the root"))?;
    for volume in &view.volumes {
        match show_volume(root.as_fd(), volume) {
            // A place inside a file system that only the guest has, such as a tmpfs.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) => {}
            shown => shown.map_err(failed(&format!("mount {}", volume.destination.display())))?,
        }
    }
    fchdir(&root)
        .and_then(|()| pivot_root(".", "."))
        .and_then(|()| umount2(".", MntFlags::MNT_DETACH))
        .and_then(|()| chdir("/"))
        .map_err(|errno| failed("enter the root")(errno.into()))
}

/// Mounts the root on itself, since only a mount can become a root.
fn show_root(view: &View) -> io::Result<File> {
    let under = place(&view.rootfs)?;
    attach(&under, view.read_only, under.as_fd())?;
    place(&view.rootfs)
}

fn show_volume(root: BorrowedFd<'_>, volume: &Volume) -> io::Result<()> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let point = openat2(root, &volume.destination, how)?;
    attach(&place(&volume.source)?, volume.read_only, point.as_fd())
}

fn attach(source: &File, read_only: bool, point: BorrowedFd<'_>) -> io::Result<()> {
    let tree = coffer_mount::clone_tree(source, Depth::Recursive)?;
    let mut set = Attributes::NODEV | Attributes::NOSUID;
    set.set(Attributes::RDONLY, read_only);
    let private = Change {
        set,
        propagation: Some(Propagation::Private),
        ..Change::default()
    };
    coffer_mount::change(&tree, Depth::Recursive, private)?;
    Ok(coffer_mount::attach(tree, point)?)
}

fn place(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
}
