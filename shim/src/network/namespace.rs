//! Which network namespace a path means: one namespace may have many names, as `/run/netns/<name>` and `/proc/<pid>/ns/net`.

use super::NetworkError;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A network namespace of this host, as long as it exists. One that a machine is wired to exists as long as the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl NamespaceId {
    /// The namespace at a path.
    pub fn of(path: &Path) -> Result<Self, NetworkError> {
        let found = fs::metadata(path).map_err(|source| NetworkError::Find {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
        })
    }

    /// The same for a pod. Ours is the host's: to carry its interfaces into a VM would cut the host off, so it is refused.
    pub fn of_pod(path: &Path) -> Result<Self, NetworkError> {
        let found = Self::of(path)?;
        if found == Self::of(Path::new("/proc/self/ns/net"))? {
            return Err(NetworkError::Host {
                path: path.to_owned(),
            });
        }
        Ok(found)
    }
}
