//! ID-mapped mounts (mount_setattr(2), `MOUNT_ATTR_IDMAP`).
//!
//! A pod with a user namespace has volumes whose files belong to ordinary ids on disk. The engine asks for the mapping on the
//! mount. It is set here, on the host's mount in the share, so the guest sees the mapped ids, and what it writes
//! is stored with the ordinary ones; the guest's kernel needs to know nothing of it.

use crate::parked::{Namespace, Parked};
use nix::sched::CloneFlags;
use oci_spec::runtime::LinuxIdMapping;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;

/// Ids of the files on disk, each with the id that it has in the mount.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    pub uids: Vec<LinuxIdMapping>,
    pub gids: Vec<LinuxIdMapping>,
    /// For what is mounted below the source too.
    pub recursive: bool,
}

impl IdMap {
    /// A user namespace with these mappings, which is how the kernel is told of them.
    pub fn user_namespace(&self) -> io::Result<OwnedFd> {
        let process = Parked::start(Namespace::New(CloneFlags::CLONE_NEWUSER))?;
        for (file, mappings) in [("uid_map", &self.uids), ("gid_map", &self.gids)] {
            let text: String = mappings.iter().map(line).collect();
            fs::write(format!("/proc/{}/{file}", process.pid()), text)?;
        }
        Ok(process.namespace("user")?.into())
    }
}

fn line(mapping: &LinuxIdMapping) -> String {
    let (inside, outside) = (mapping.container_id(), mapping.host_id());
    format!("{inside} {outside} {}\n", mapping.size())
}
