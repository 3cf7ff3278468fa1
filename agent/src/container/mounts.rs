//! The `mounts` of the OCI spec.
//!
//! Sources in the guest and the file systems that need the guest's own privileges (sysfs, mqueue, hugetlbfs) are made by the stage
//! as detached mounts, before the container has any namespace of its own. The rest is made by the new process, whose
//! root is by then the container's, so that no path in here can name anything outside.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use coffer_mount::{Attributes, Depth};
use coffer_proto::limits::{MIRROR_DIR, SHARE_DIR, VOLUMES};
use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};
use oci_spec::runtime::Mount;

use super::cgroup::CGROUP_ROOT;
use super::failure::{Failure, at};
use super::options::{self, MountOptions};
use super::root::{Root, beneath};

/// Nested directories that `tmpcopyup` follows; more is no directory anybody made in good faith.
const MAX_COPY_DEPTH: usize = 64;

/// What is to be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Bind(Depth),
    Proc,
    Sysfs,
    Tmpfs,
    Devpts,
    Mqueue,
    Hugetlbfs,
    /// The container's own cgroup, whichever version the spec names.
    Cgroup,
}

impl Kind {
    /// `None` is a type that containers can't have.
    pub fn of(mount: &Mount, options: &MountOptions) -> Option<Self> {
        if let Some(depth) = options.bind {
            return Some(Self::Bind(depth));
        }
        Some(match mount.typ().as_deref()? {
            "bind" => Self::Bind(Depth::One),
            "proc" => Self::Proc,
            "sysfs" => Self::Sysfs,
            "tmpfs" => Self::Tmpfs,
            "devpts" => Self::Devpts,
            "mqueue" => Self::Mqueue,
            "hugetlbfs" => Self::Hugetlbfs,
            "cgroup" | "cgroup2" => Self::Cgroup,
            _ => return None,
        })
    }

    fn file_system(self) -> &'static CStr {
        match self {
            Self::Bind(_) => c"none",
            Self::Proc => c"proc",
            Self::Sysfs => c"sysfs",
            Self::Tmpfs => c"tmpfs",
            Self::Devpts => c"devpts",
            Self::Mqueue => c"mqueue",
            Self::Hugetlbfs => c"hugetlbfs",
            Self::Cgroup => c"cgroup2",
        }
    }
}

/// A path of the guest that a container may have as root or as bind source.
#[derive(Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// Below the container's own directory in the pod's share.
    Share(&'a Path),
    /// Below the pod's volumes in the share.
    Volume(&'a Path),
    /// Below the container's own copies of volumes.
    Mirror(&'a Path),
    /// A kernel file system of the guest, relative to its root.
    Guest(&'a Path),
}

/// What the guest itself has that a container may bind.
const GUEST_SOURCES: [&str; 6] = [
    "/dev",
    "/proc",
    "/sys",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
];

impl<'a> Source<'a> {
    /// `None` is a path that belongs to another container or to the agent.
    pub fn of(id: &str, path: &'a Path) -> Option<Self> {
        if let Ok(rest) = path.strip_prefix(Path::new(SHARE_DIR).join(id)) {
            return (!rest.as_os_str().is_empty()).then_some(Self::Share(rest));
        }
        if let Ok(rest) = path.strip_prefix(Path::new(SHARE_DIR).join(VOLUMES)) {
            return (!rest.as_os_str().is_empty()).then_some(Self::Volume(rest));
        }
        if let Ok(rest) = path.strip_prefix(Path::new(MIRROR_DIR).join(id)) {
            return (!rest.as_os_str().is_empty()).then_some(Self::Mirror(rest));
        }
        let known = GUEST_SOURCES.iter().any(|source| path.starts_with(source));
        if known {
            path.strip_prefix("/").ok().map(Self::Guest)
        } else {
            None
        }
    }

    /// Opens it. No symlink is followed: whatever the shim put there is no symlink.
    pub fn open(&self, id: &str) -> nix::Result<OwnedFd> {
        let (base, path) = match self {
            Self::Share(path) => (Path::new(SHARE_DIR).join(id), path),
            Self::Volume(path) => (Path::new(SHARE_DIR).join(VOLUMES), path),
            Self::Mirror(path) => (Path::new(MIRROR_DIR).join(id), path),
            Self::Guest(path) => (PathBuf::from("/"), path),
        };
        let base = nix::fcntl::open(&base, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        // O_DIRECTORY lets the kernel cross into a submount of the share.
        match beneath(base.as_fd(), path, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(Errno::ENOTDIR) => beneath(base.as_fd(), path, OFlag::O_PATH),
            opened => opened,
        }
    }
}

/// Detached mounts by the index of their entry in `mounts`.
pub type Trees = HashMap<usize, OwnedFd>;

/// Makes the mounts which the new process has no access or no privilege for.
pub fn prepare(id: &str, mounts: &[Mount], cgroup_namespace: bool) -> Result<Trees, Failure> {
    let mut trees = Trees::new();
    for (i, mount) in mounts.iter().enumerate() {
        let (kind, options) = parse(i, mount)?;
        let step = || {
            format!(
                "mounts[{i}]: {} for {}",
                source(mount).display(),
                target(mount)
            )
        };
        let tree = match kind {
            Kind::Bind(depth) => {
                let source = Source::of(id, source(mount))
                    .ok_or_else(|| Failure::new(step(), "not a path of this container"))?;
                let opened = source.open(id).map_err(at(step()))?;
                coffer_mount::clone_tree(opened, depth).map_err(at(step()))?
            }
            Kind::Cgroup if !cgroup_namespace => {
                let path = Path::new(CGROUP_ROOT).join(id);
                let opened =
                    nix::fcntl::open(&path, OFlag::O_PATH, Mode::empty()).map_err(at(step()))?;
                coffer_mount::clone_tree(opened, Depth::One).map_err(at(step()))?
            }
            Kind::Sysfs | Kind::Mqueue | Kind::Hugetlbfs => {
                coffer_mount::new_mount(kind.file_system(), &options.parameters, options.change.set)
                    .map_err(at(step()))?
            }
            _ => continue,
        };
        trees.insert(i, tree);
    }
    Ok(trees)
}

/// Makes the proc file systems, in the new process's PID namespace. This comes before it lets go of the guest's: in a user
/// namespace the kernel makes one only while another, with nothing of it hidden, is in sight.
pub fn prepare_proc(mounts: &[Mount], trees: &mut Trees) -> Result<(), Failure> {
    for (i, mount) in mounts.iter().enumerate() {
        let (kind, options) = parse(i, mount)?;
        if kind == Kind::Proc {
            let tree = coffer_mount::new_mount(
                kind.file_system(),
                &options.parameters,
                Attributes::empty(),
            )
            .map_err(at(format!("mounts[{i}]: make proc for {}", target(mount))))?;
            trees.insert(i, tree);
        }
    }
    Ok(())
}

/// Mounts everything into the root, in the order of the spec.
pub fn mount_all(root: &Root, mounts: &[Mount], trees: &Trees) -> Result<(), Failure> {
    for (i, mount) in mounts.iter().enumerate() {
        let (kind, options) = parse(i, mount)?;
        let step = format!(
            "mounts[{i}]: mount {} on {}",
            kind_name(mount),
            target(mount)
        );
        let prepared = trees.get(&i).map(AsFd::as_fd);
        mount_one(root, mount, kind, &options, prepared).map_err(|failure| Failure {
            step: format!("{step}: {}", failure.step),
            ..failure
        })?;
    }
    Ok(())
}

fn mount_one(
    root: &Root,
    mount: &Mount,
    kind: Kind,
    options: &MountOptions,
    prepared: Option<BorrowedFd<'_>>,
) -> Result<(), Failure> {
    let destination = mount.destination();
    let is_directory = match prepared {
        Some(tree) => is_directory(&fstat(tree).map_err(at("fstat"))?),
        None => true,
    };
    let target = if is_directory {
        root.directory(destination)
    } else {
        root.file(destination)
    }
    .map_err(at("make the mount point"))?;
    if matches!(kind, Kind::Proc | Kind::Sysfs) {
        // Masked paths below are found by name later: the name has to lead here for ever.
        root.open_without_symlinks(destination, OFlag::O_PATH)
            .map_err(at("check that no part of the mount point is a symlink"))?;
    }
    let own;
    let tree = match prepared {
        Some(tree) => tree,
        None => {
            own = new_file_system(kind, options, &target)?;
            own.as_fd()
        }
    };
    if options.copy_up && kind == Kind::Tmpfs {
        copy_directory(target.as_fd(), tree, 0)
            .map_err(at("copy the directory below (tmpcopyup)"))?;
    }
    coffer_mount::change(tree, Depth::One, options.change).map_err(at("set the options"))?;
    coffer_mount::change(tree, Depth::Recursive, options.recursive_change)
        .map_err(at("set the recursive options"))?;
    coffer_mount::attach(tree, &target).map_err(at("attach"))?;
    for (depth, propagation) in &options.propagation {
        coffer_mount::change(tree, *depth, *propagation).map_err(at("set the propagation"))?;
    }
    Ok(())
}

fn new_file_system(
    kind: Kind,
    options: &MountOptions,
    target: &OwnedFd,
) -> Result<OwnedFd, Failure> {
    let mut parameters = options.parameters.clone();
    if kind == Kind::Tmpfs && !parameters.iter().any(|(key, _)| key == "mode") {
        // As runc: the directory keeps its permissions.
        let mode = fstat(target).map_err(at("fstat"))?.st_mode & 0o7777;
        parameters.push(("mode".into(), Some(format!("{mode:o}"))));
    }
    // Read-only comes afterwards, for tmpcopyup writes first.
    coffer_mount::new_mount(kind.file_system(), &parameters, Attributes::empty())
        .map_err(at("make the file system"))
}

/// The kind and options of entry `i`, which validation has already seen.
fn parse(i: usize, mount: &Mount) -> Result<(Kind, MountOptions), Failure> {
    let options = options::parse(mount.options().as_deref().unwrap_or_default())
        .map_err(|option| Failure::new(format!("mounts[{i}].options"), option))?;
    let kind = Kind::of(mount, &options)
        .ok_or_else(|| Failure::new(format!("mounts[{i}].type"), kind_name(mount)))?;
    Ok((kind, options))
}

/// Whether this very path is a bind mount.
pub fn binds(mounts: &[Mount], path: &Path) -> bool {
    let kind = |(i, mount)| parse(i, mount).map(|(kind, _)| kind);
    mounts
        .iter()
        .enumerate()
        .filter(|(_, mount)| mount.destination() == path)
        .any(|entry| matches!(kind(entry), Ok(Kind::Bind(_))))
}

fn source(mount: &Mount) -> &Path {
    mount.source().as_deref().unwrap_or(Path::new(""))
}

fn target(mount: &Mount) -> std::path::Display<'_> {
    mount.destination().display()
}

fn kind_name(mount: &Mount) -> &str {
    mount.typ().as_deref().unwrap_or("bind")
}

fn is_directory(stat: &FileStat) -> bool {
    kind_of(stat) == SFlag::S_IFDIR
}

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// Copies directories, files and symlinks with owner and mode. Both sides are walked by descriptor.
fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> nix::Result<()> {
    if depth > MAX_COPY_DEPTH {
        return Err(Errno::ELOOP);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut listing = Dir::openat(from, ".", flags, Mode::empty())?;
    for entry in listing.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        match entry.file_type() {
            Some(Type::Directory) => {
                mkdirat(to, name, Mode::from_bits_truncate(stat.st_mode & 0o7777))?;
                let source = openat(from, name, flags, Mode::empty())?;
                let copy = openat(to, name, flags, Mode::empty())?;
                copy_directory(source.as_fd(), copy.as_fd(), depth + 1)?;
            }
            Some(Type::Symlink) => {
                let to_where = readlinkat(from, name)?;
                symlinkat(to_where.as_os_str(), to, name)?;
            }
            Some(Type::File) => copy_file(from, to, name, &stat)?,
            // Sockets, fifos and devices have no contents.
            _ => continue,
        }
        let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        fchownat(
            to,
            name,
            Some(owner),
            Some(group),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )?;
    }
    Ok(())
}

fn copy_file(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &CStr,
    stat: &FileStat,
) -> nix::Result<()> {
    let read = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let write = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
    let source = openat(from, name, read, Mode::empty())?;
    let copy = openat(to, name, write, Mode::from_bits_truncate(0o600))?;
    std::io::copy(
        &mut std::fs::File::from(source),
        &mut std::fs::File::from(copy.try_clone().map_err(|_| Errno::EMFILE)?),
    )
    .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    fchmod(&copy, mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_paths_are_sources() {
        let own = Path::new("/run/coffer/share/web/mounts/3");
        assert_eq!(
            Source::of("web", own),
            Some(Source::Share(Path::new("mounts/3")))
        );
        let volume = Path::new("/run/coffer/share/.volumes/3");
        assert_eq!(
            Source::of("web", volume),
            Some(Source::Volume(Path::new("3")))
        );
        let copy = Path::new("/run/coffer/mirror/web/3");
        assert_eq!(
            Source::of("web", copy),
            Some(Source::Mirror(Path::new("3")))
        );
        for foreign in [
            "/run/coffer/mirror/db/0",
            "/run/coffer/share/db/rootfs",
            "/run/coffer/share/web2/rootfs",
            "/run/coffer/share/web",
            "/run/coffer/share/.volumes",
            "/run/coffer/share",
            "/run/coffer",
            "/",
            "/etc",
            "/init",
            "relative",
        ] {
            assert_eq!(Source::of("web", Path::new(foreign)), None, "{foreign}");
        }
        let guest = Path::new("/dev/shm");
        assert_eq!(
            Source::of("web", guest),
            Some(Source::Guest(Path::new("dev/shm")))
        );
    }
}
