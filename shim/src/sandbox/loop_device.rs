//! Loop devices: a file as a block device (loop(4)), for layers that are file system images.

#![allow(unsafe_code, reason = "the control ioctls of loop(4)")]

use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// linux/loop.h
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
/// The device lets go of the file when its last user is gone, which for us is the mount.
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Between asking for a free device and taking it another process may have taken it.
const ATTEMPTS: usize = 32;

/// `struct loop_info64`
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`
#[repr(C)]
struct LoopConfig {
    fd: u32,
    /// 0 for the kernel's choice.
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A loop device. It goes with the last of this value and its mounts.
#[derive(Debug)]
pub struct LoopDevice {
    pub path: PathBuf,
    /// Holds it until it is mounted.
    _device: File,
}

impl LoopDevice {
    /// Puts a file behind a free loop device.
    pub fn attach(image: &Path, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(image)?;
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")?;
        for _ in 0..ATTEMPTS {
            // SAFETY: this ioctl takes no argument.
            let number =
                Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) })?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = OpenOptions::new()
                .read(true)
                .write(!read_only)
                .open(&path)?;
            match configure(&device, &file, read_only) {
                Ok(()) => {
                    return Ok(Self {
                        path,
                        _device: device,
                    });
                }
                Err(Errno::EBUSY) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::EBUSY.into())
    }
}

fn configure(device: &File, image: &File, read_only: bool) -> nix::Result<()> {
    let read_only = if read_only { LO_FLAGS_READ_ONLY } else { 0 };
    let config = LoopConfig {
        fd: image.as_raw_fd().cast_unsigned(),
        block_size: 0,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR | read_only,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads one `struct loop_config` during the call, and both descriptors are open.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
    Errno::result(result).map(drop)
}
