//! `manifest.json`: what the guest image consists of and what it was made from.

use serde::{Deserialize, Serialize};

use crate::cache;

#[derive(Debug, Serialize)]
pub struct Manifest {
    /// Coffer's version, which is the agent's.
    pub version: String,
    pub kernel: KernelOrigin,
    pub vmlinux: File,
    pub initrd: File,
}

/// What the kernel was built from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KernelOrigin {
    /// As `uname -r` prints it in the guest.
    pub release: String,
    /// The source package with its version, or the directory given as `KERNEL_SRC`.
    pub source: String,
    pub compiler: String,
    /// SHA-256 of the whole configuration that the kernel was built with.
    pub config_sha256: String,
}

#[derive(Debug, Serialize)]
pub struct File {
    pub bytes: usize,
    pub sha256: String,
}

impl File {
    pub fn describe(content: &[u8]) -> Self {
        Self {
            bytes: content.len(),
            sha256: cache::sha256(content),
        }
    }
}
