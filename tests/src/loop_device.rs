//! A block device of the host, for tests that give one away.

use crate::{Test, host, noise};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Bytes of a device. The first MiB is noise.
pub const SIZE: u64 = 16 << 20;

/// A loop device, for as long as it lives.
#[derive(Debug)]
pub struct LoopDevice {
    pub image: PathBuf,
    pub device: PathBuf,
}

impl LoopDevice {
    /// One on a new file in the test's directory.
    pub fn new(test: &Test, name: &str) -> Self {
        let image = test.dir().join(name);
        let file = File::create(&image).expect("scratch is ours");
        file.write_all_at(&noise(1 << 20, 7), 0)
            .and_then(|()| file.set_len(SIZE))
            .expect("scratch has room");
        let path = image.to_str().expect("UTF-8");
        let device = host("losetup", &["--find", "--show", path]).expect("a free loop device");
        let device = PathBuf::from(device.trim());
        Self { image, device }
    }

    pub fn name(&self) -> &str {
        self.device.to_str().expect("UTF-8")
    }

    /// What is on the device now, as the host reads it.
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let device = File::open(&self.device).expect("the device is there");
        device
            .read_exact_at(&mut bytes, offset)
            .expect("it can be read");
        bytes
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = host("losetup", &["--detach", self.name()]);
        if !std::thread::panicking() {
            detached.expect("nobody else has the device");
        }
    }
}
