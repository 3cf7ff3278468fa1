//! Files that all containers of a pod see: its names, and its shared memory.
//!
//! Engines mount them into every container, from files that they keep beside the pause container. A pod of the Sandbox API has none,
//! and its files are left to the sandbox: they are the guest's, written at its boot.

use super::GuestSpec;
use super::binds::KEPT_OPTIONS;
use super::shared_memory::SHM;
use crate::mount_points::MountPoint;
use oci_spec::runtime::{Mount, MountBuilder};
use std::path::Path;

/// What the agent writes of a pod (`agent/src/guest.rs`).
const NAMES: [&str; 3] = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];

/// The shared memory of a pod, as large as containerd makes it for pods with a pause container.
const SHARED_MEMORY_BYTES: u64 = 64 << 20;

impl GuestSpec {
    /// Gives the container the guest's files in the places where its caller mounts none; gives the size for the guest's /dev/shm, 0 if
    /// the container has no part in it.
    pub fn take_pods_files(&mut self) -> u64 {
        let mut mounts = self.spec.mounts().clone().unwrap_or_default();
        let access = if self.read_only_rootfs { "ro" } else { "rw" };
        for name in NAMES {
            let taken = |mount: &Mount| mount.destination() == Path::new(name);
            if mounts.iter().any(taken) {
                continue;
            }
            mounts.push(bind(name, vec!["bind".into(), access.into()]));
            self.mount_points.push(MountPoint {
                path: name.into(),
                file: true,
            });
        }
        // The default of every container, a tmpfs of its own.
        let own = |mount: &&mut Mount| {
            mount.destination() == Path::new(SHM) && mount.typ().as_deref() == Some("tmpfs")
        };
        let shared = mounts.iter_mut().find(own);
        let bytes = shared.map_or(0, |mount| {
            let mut options = mount.options().clone().unwrap_or_default();
            options.retain(|option| KEPT_OPTIONS.contains(&option.as_str()));
            options.push("bind".into());
            *mount = bind(SHM, options);
            SHARED_MEMORY_BYTES
        });
        self.spec.set_mounts(Some(mounts));
        bytes
    }
}

/// A path of the guest, at the same place in the container.
fn bind(path: &str, options: Vec<String>) -> Mount {
    let mount = MountBuilder::default()
        .destination(path)
        .typ("bind")
        .source(path)
        .options(options);
    mount.build().expect("every field of a mount has a default")
}
