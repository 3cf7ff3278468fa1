//! Mounts of the host, for tests that give one away.

use crate::host;
use std::fs;
use std::path::{Path, PathBuf};

/// A mount, for as long as it lives.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts on a directory, which is made; `args` are those of mount(8) before it.
    pub fn new(point: &Path, args: &[&str]) -> Self {
        fs::create_dir_all(point).expect("scratch is ours");
        let path = point.to_str().expect("UTF-8");
        host("mount", &[args, &[path]].concat()).expect("root may mount");
        Self(point.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let path = self.0.to_str().expect("UTF-8");
        // Lazily, as what a failed test left may have it.
        let gone = host("umount", &["--lazy", path]);
        if !std::thread::panicking() {
            gone.expect("it is mounted");
        }
    }
}
