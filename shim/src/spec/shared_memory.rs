//! `/dev/shm`: containerd, CRI-O, podman and docker make a tmpfs named `shm` on the host for it, one for all containers that share
//! an IPC namespace. In the VM it is a tmpfs of the guest of the same size; the host's, through file sharing, would not be one memory
//! for two containers.

use super::GuestSpec;
use super::binds::KEPT_OPTIONS;
use nix::sys::stat::stat;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::Mount;
use std::path::{Path, PathBuf};

/// Where POSIX shared memory is.
pub(super) const SHM: &str = "/dev/shm";

/// The shared memory that a container was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMemory {
    index: usize,
    /// Names the tmpfs: containers that share their memory have the same one.
    pub host: HostTmpfs,
    /// 0 where it has no limit.
    pub bytes: u64,
}

/// The device number of a tmpfs of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostTmpfs(u64);

impl SharedMemory {
    /// Takes mount number `index`, if that is what it is: it becomes the guest's.
    pub(super) fn of(mount: &mut Mount, index: usize, source: &Path) -> Option<Self> {
        let named = mount.destination() == Path::new(SHM)
            && source.file_name().is_some_and(|name| name == "shm");
        let tmpfs = statfs(source).ok().filter(|_| named)?;
        if tmpfs.filesystem_type() != TMPFS_MAGIC {
            return None;
        }
        let host = HostTmpfs(stat(source).ok()?.st_dev);
        mount.set_source(Some(SHM.into()));
        let block = u64::try_from(tmpfs.block_size()).unwrap_or_default();
        Some(Self {
            index,
            host,
            bytes: tmpfs.blocks() * block,
        })
    }
}

impl GuestSpec {
    /// Gives the container a memory of its own, for the guest's is that of other containers.
    pub fn keep_shared_memory_apart(&mut self) {
        let Some(memory) = self.shared_memory.take() else {
            return;
        };
        let mounts = self.spec.mounts_mut().as_mut();
        let Some(mount) = mounts.and_then(|mounts| mounts.get_mut(memory.index)) else {
            return;
        };
        let mut options = mount.options().clone().unwrap_or_default();
        options.retain(|option| KEPT_OPTIONS.contains(&option.as_str()));
        options.push("mode=1777".into());
        if memory.bytes > 0 {
            options.push(format!("size={}", memory.bytes));
        }
        mount
            .set_typ(Some("tmpfs".into()))
            .set_source(Some(PathBuf::from("shm")))
            .set_options(Some(options));
    }
}
