//! The root file system of a container: entered first, furnished afterwards.
//!
//! `pivot_root(2)` comes before all mounts. From then on the process's root is the container's, so neither a symlink
//! nor a `..` of a hostile image leads to anything of the guest; what comes from there is held as detached mounts. It
//! takes an agent whose own root is not the initramfs, which `pivot_root` can't leave.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coffer_mount::{Attributes, Depth, Propagation};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{SFlag, fstat, major, minor};
use nix::unistd::{chdir, fchdir, pivot_root};
use oci_spec::runtime::{Linux, Spec};

use super::devices::{self, Device};
use super::failure::{Failure, at};
use super::mounts::{self, Source, Trees};
use super::root::Root;
use super::{console, options};

/// What the stage prepared while it had the guest's privileges and file system.
#[derive(Debug)]
pub struct Prepared {
    root: OwnedFd,
    trees: Trees,
    devices: Vec<Device>,
    /// The nodes of `devices`, for a container in a user namespace.
    borrowed: Vec<OwnedFd>,
}

/// Opens and makes all that the new process can't reach.
pub fn prepare(id: &str, spec: &Spec, cgroup: bool, user: bool) -> Result<Prepared, Failure> {
    let path = spec
        .root()
        .as_ref()
        .map_or(Path::new(""), |root| root.path());
    let step = format!("root.path {}", path.display());
    let source = Source::of(id, path)
        .ok_or_else(|| Failure::new(step.as_str(), "not a path of this container"))?;
    let opened = source.open(id).map_err(at(step.as_str()))?;
    let stat = fstat(&opened).map_err(at(step.as_str()))?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFDIR.bits() {
        return Err(at(step)(Errno::ENOTDIR));
    }
    let root = coffer_mount::clone_tree(opened, Depth::Recursive).map_err(at(step.as_str()))?;
    // pivot_root refuses a shared root; as a slave it still sees what is mounted in the guest later.
    coffer_mount::change(&root, Depth::Recursive, Propagation::Slave).map_err(at(step))?;
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let own = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_deref());
    let devices = devices::all(own.unwrap_or_default());
    let borrowed = if user {
        devices::borrow_from_guest(&devices)?
    } else {
        Vec::new()
    };
    Ok(Prepared {
        root,
        trees: mounts::prepare(id, mounts, cgroup)?,
        devices,
        borrowed,
    })
}

/// Makes the container's root the root of the calling process, which is alone in its mount namespace, and lets go of
/// everything else.
pub fn enter(spec: &Spec, prepared: &mut Prepared) -> Result<Root, Failure> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    mounts::prepare_proc(mounts, &mut prepared.trees)?;
    let guest = Root::current().map_err(at("open the guest's root"))?;
    coffer_mount::change(guest.fd(), Depth::Recursive, Propagation::Private)
        .map_err(at("make mounts private"))?;
    coffer_mount::attach(&prepared.root, guest.fd()).map_err(at("attach the root"))?;
    fchdir(&prepared.root).map_err(at("enter the root"))?;
    // The old root ends up on top of the new one, and "." is what leads to it there (pivot_root(2), NOTES).
    pivot_root(".", ".").map_err(at("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(at("unmount the guest's root"))?;
    chdir("/").map_err(at("enter the root"))?;
    Root::current().map_err(at("open the root"))
}

/// Mounts, devices, masked and read-only paths, in the order the OCI spec and other runtimes have them.
pub fn furnish(
    root: &Root,
    spec: &Spec,
    prepared: &Prepared,
    terminal: Option<(u16, u16)>,
) -> Result<Option<console::Terminal>, Failure> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    mounts::mount_all(root, mounts, &prepared.trees)?;
    // A /dev that is bound here is complete, and not this container's to change.
    if !mounts::binds(mounts, Path::new("/dev")) {
        devices::make(root, &prepared.devices, &prepared.borrowed)?;
        devices::make_symlinks(root)?;
    }
    let terminal = terminal
        .map(|(rows, columns)| console::open(root, rows, columns))
        .transpose()?;
    if let Some(terminal) = &terminal {
        console::bind_console(root, terminal.slave.as_fd())?;
    }
    make_cwd(root, spec)?;
    if let Some(linux) = spec.linux() {
        hide_paths(root, linux)?;
    }
    finish_root(root, spec)?;
    Ok(terminal)
}

/// As other runtimes do; a read-only image without it is left to fail when the directory is entered.
fn make_cwd(root: &Root, spec: &Spec) -> Result<(), Failure> {
    let Some(process) = spec.process() else {
        return Ok(());
    };
    match root.directory(process.cwd()) {
        Ok(_) | Err(Errno::EROFS | Errno::EACCES | Errno::EPERM) => Ok(()),
        Err(errno) => Err(at(format!("make process.cwd {}", process.cwd().display()))(
            errno,
        )),
    }
}

fn hide_paths(root: &Root, linux: &Linux) -> Result<(), Failure> {
    for path in linux.readonly_paths().iter().flatten() {
        make_read_only(root, Path::new(path)).map_err(at(format!("make {path} read-only")))?;
    }
    for path in linux.masked_paths().iter().flatten() {
        mask(root, Path::new(path)).map_err(at(format!("mask {path}")))?;
    }
    Ok(())
}

/// What doesn't exist needs no protection.
fn existing(root: &Root, path: &Path) -> nix::Result<Option<OwnedFd>> {
    match root.open(path, OFlag::O_PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn make_read_only(root: &Root, path: &Path) -> nix::Result<()> {
    let Some(target) = existing(root, path)? else {
        return Ok(());
    };
    let tree = coffer_mount::clone_tree(&target, Depth::Recursive)?;
    coffer_mount::change(&tree, Depth::Recursive, Attributes::RDONLY)?;
    coffer_mount::attach(tree, target)
}

/// A directory becomes an empty one that takes nothing, anything else becomes /dev/null.
fn mask(root: &Root, path: &Path) -> std::io::Result<()> {
    let Some(target) = existing(root, path)? else {
        return Ok(());
    };
    let is_directory = fstat(&target)?.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
    let cover = if is_directory {
        let parameters = [("nr_blocks", "1"), ("nr_inodes", "1"), ("mode", "755")];
        let parameters = parameters.map(|(k, v)| (k.to_owned(), Some(v.to_owned())));
        coffer_mount::new_mount(c"tmpfs", &parameters, Attributes::RDONLY)?
    } else {
        let null = root.open(Path::new("/dev/null"), OFlag::O_PATH)?;
        check_is_null(null.as_fd())?;
        coffer_mount::clone_tree(null, Depth::One)?
    };
    Ok(coffer_mount::attach(cover, target)?)
}

/// An image could have put something else there, which would then show instead of what is to be hidden.
fn check_is_null(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let stat = fstat(fd)?;
    let is_char = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits();
    let is_null = is_char && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3);
    if is_null { Ok(()) } else { Err(Errno::ENODEV) }
}

fn finish_root(root: &Root, spec: &Spec) -> Result<(), Failure> {
    if spec
        .root()
        .as_ref()
        .and_then(oci_spec::runtime::Root::readonly)
        == Some(true)
    {
        coffer_mount::change(root.fd(), Depth::One, Attributes::RDONLY)
            .map_err(at("make the root read-only"))?;
    }
    let name = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.rootfs_propagation().as_deref());
    if let Some((depth, propagation)) = name.and_then(options::propagation) {
        coffer_mount::change(root.fd(), depth, propagation)
            .map_err(at("set linux.rootfsPropagation"))?;
    }
    Ok(())
}
