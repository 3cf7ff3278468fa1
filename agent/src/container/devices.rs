//! Device nodes and the customary symlinks in /dev.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use coffer_mount::Depth;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, readlink, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, major, makedev, minor, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use super::failure::{Failure, at};
use super::root::{Root, beneath};

/// A node to be made.
#[derive(Debug, Clone)]
pub struct Device {
    path: PathBuf,
    kind: SFlag,
    number: libc::dev_t,
    mode: Mode,
    owner: Uid,
    group: Gid,
}

/// The devices every container has (OCI runtime spec, "Default Devices"): character devices of mode 0666.
const DEFAULT: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// OCI runtime spec, "Dev symbolic links", and ptmx.
const SYMLINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

impl Device {
    /// The device of the spec, or what is wrong with it.
    pub fn of_spec(spec: &LinuxDevice) -> Result<Self, &'static str> {
        let kind = match spec.typ() {
            LinuxDeviceType::B => SFlag::S_IFBLK,
            LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
            LinuxDeviceType::P => SFlag::S_IFIFO,
            LinuxDeviceType::A => return Err("type a is for cgroup rules only"),
        };
        let number = |value: i64| {
            u64::try_from(value)
                .ok()
                .filter(|v| *v <= u64::from(u32::MAX))
        };
        let (Some(major), Some(minor)) = (number(spec.major()), number(spec.minor())) else {
            return Err("major or minor is out of range");
        };
        Ok(Self {
            path: spec.path().clone(),
            kind,
            number: makedev(major, minor),
            mode: Mode::from_bits_truncate(spec.file_mode().unwrap_or(0o666) & 0o7777),
            owner: Uid::from_raw(spec.uid().unwrap_or(0)),
            group: Gid::from_raw(spec.gid().unwrap_or(0)),
        })
    }

    fn default_ones() -> impl Iterator<Item = Self> {
        DEFAULT.iter().map(|(path, major, minor)| Self {
            path: PathBuf::from(path),
            kind: SFlag::S_IFCHR,
            number: makedev(*major, *minor),
            mode: Mode::from_bits_truncate(0o666),
            owner: Uid::from_raw(0),
            group: Gid::from_raw(0),
        })
    }

    fn is(&self, stat: &libc::stat) -> bool {
        let kind = stat.st_mode & SFlag::S_IFMT.bits();
        kind == self.kind.bits() && (self.kind == SFlag::S_IFIFO || stat.st_rdev == self.number)
    }

    /// The guest's own node. Disks have one name in the guest and another in each container.
    fn path_in_guest(&self) -> nix::Result<PathBuf> {
        if self.kind != SFlag::S_IFBLK {
            return Ok(self.path.clone());
        }
        let (major, minor) = (major(self.number), minor(self.number));
        let disk = readlink(&*format!("/sys/dev/block/{major}:{minor}"))?;
        let name = Path::new(&disk).file_name().ok_or(Errno::ENODEV)?;
        Ok(Path::new("/dev").join(name))
    }

    fn make(&self, root: &Root) -> nix::Result<()> {
        let (parent, name) = root.parent(&self.path)?;
        match mknodat(&parent, name.as_os_str(), self.kind, self.mode, self.number) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                let there = fstatat(&parent, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
                return if self.is(&there) {
                    Ok(())
                } else {
                    Err(Errno::EEXIST)
                };
            }
            Err(errno) => return Err(errno),
        }
        let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
        fchownat(
            &parent,
            name.as_os_str(),
            Some(self.owner),
            Some(self.group),
            flags,
        )
    }
}

/// A container's devices: the default ones and those of the spec.
pub fn all(spec: &[LinuxDevice]) -> Vec<Device> {
    Device::default_ones()
        .chain(spec.iter().filter_map(|d| Device::of_spec(d).ok()))
        .collect()
}

/// For a user namespace, which can't make nodes: the guest's own nodes of these devices, as detached mounts.
pub fn borrow_from_guest(devices: &[Device]) -> Result<Vec<OwnedFd>, Failure> {
    let open = |device: &Device| -> nix::Result<OwnedFd> {
        let guest = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let path = device.path_in_guest()?;
        let path = path.strip_prefix("/").unwrap_or(&path);
        let node = beneath(guest.as_fd(), path, OFlag::O_PATH)?;
        if !device.is(&fstat(&node)?) {
            return Err(Errno::ENODEV);
        }
        coffer_mount::clone_tree(node, Depth::One)
    };
    let borrow = |device: &Device| {
        open(device).map_err(at(format!("take {} from the guest", device.path.display())))
    };
    devices.iter().map(borrow).collect()
}

/// Makes the nodes, or mounts those `borrowed` from the guest.
pub fn make(root: &Root, devices: &[Device], borrowed: &[OwnedFd]) -> Result<(), Failure> {
    for (i, device) in devices.iter().enumerate() {
        let made = match borrowed.get(i) {
            None => device.make(root),
            Some(tree) => root
                .file(&device.path)
                .and_then(|target| coffer_mount::attach(tree, target)),
        };
        made.map_err(at(format!("make device {}", device.path.display())))?;
    }
    Ok(())
}

/// Makes the customary symlinks, over what an image has under these names.
pub fn make_symlinks(root: &Root) -> Result<(), Failure> {
    for (path, target) in SYMLINKS {
        make_symlink(root, Path::new(path), target).map_err(at(format!("make symlink {path}")))?;
    }
    Ok(())
}

fn make_symlink(root: &Root, path: &Path, target: &str) -> nix::Result<()> {
    let (parent, name) = root.parent(path)?;
    let name = name.as_os_str();
    match symlinkat(target, &parent, name) {
        Err(Errno::EEXIST) if readlinkat(&parent, name).is_ok_and(|t| t == target) => Ok(()),
        Err(Errno::EEXIST) => {
            unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir)?;
            symlinkat(target, &parent, name)
        }
        made => made,
    }
}
