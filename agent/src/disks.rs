//! Disks that come and go while the VM runs.
//!
//! The VM boots with slots for disks, each of them virtio-mmio registers that may have no device behind them. The driver passes over
//! such a slot at boot; it is told to look again when a disk is there, and to let go before the disk is taken away:
//!
//! ```text
//! /sys/bus/platform/drivers/virtio-mmio/bind, unbind
//!                        virtio-mmio.9 ──► virtio5 ──► /sys/block/vda/serial   "coffer-0"
//!                                                                    /dev      254:0
//! ```

use coffer_proto::agent::Disk;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

const BLOCK_DEVICES: &str = "/sys/block";
const SLOTS: &str = "/sys/bus/platform/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// The file systems that a container mounted from a disk go with the last of its processes, a moment later.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(5);
const UNMOUNT_INTERVAL: Duration = Duration::from_millis(10);

/// Why a disk is not added or removed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("there is no disk {0:?}")]
    NotFound(String),
    #[error("{path} is still in use")]
    InUse { path: PathBuf },
    #[error("can't write back what is left for {path}")]
    Flush {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("can't use {path}")]
    Sysfs {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path} holds {text:?}, which is no device number")]
    Number { path: PathBuf, text: String },
}

/// Finds a disk by its serial number, in slots without a driver too. Blocks.
pub fn add(serial: &str) -> Result<Disk, DiskError> {
    if let Some(disk) = find(serial)? {
        return number(&disk);
    }
    for slot in slots_without_driver()? {
        // Most of them are empty, and then the driver does not want them.
        if fs::write(Path::new(DRIVER).join("bind"), slot).is_ok()
            && let Some(disk) = find(serial)?
        {
            return number(&disk);
        }
    }
    Err(DiskError::NotFound(serial.to_owned()))
}

/// Writes a disk's cache back and takes the disk from its driver. Blocks.
pub fn remove(serial: &str) -> Result<(), DiskError> {
    let Some(disk) = find(serial)? else {
        return Ok(());
    };
    let name = disk.file_name().unwrap_or_default();
    flush(&Path::new("/dev").join(name))?;
    let device = disk.join("device");
    // /sys/devices/platform/…/virtio-mmio.9/virtio5
    let device = fs::canonicalize(&device).map_err(sysfs(&device))?;
    let slot = device
        .parent()
        .and_then(Path::file_name)
        .unwrap_or_default();
    let unbind = Path::new(DRIVER).join("unbind");
    fs::write(&unbind, slot.as_encoded_bytes()).map_err(sysfs(&unbind))
}

/// Writes back what is left, once nobody has the disk any more.
fn flush(node: &Path) -> Result<(), DiskError> {
    let disk = open_unused(node)?;
    disk.sync_all().map_err(|cause| DiskError::Flush {
        path: node.to_owned(),
        cause,
    })
}

/// Opens the disk as only one at a time can (open(2), O_EXCL on a block device). Nobody tells of the last unmount, so it is tried until
/// then.
fn open_unused(node: &Path) -> Result<File, DiskError> {
    let deadline = Instant::now() + UNMOUNT_DEADLINE;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_EXCL);
    loop {
        match options.open(node) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            opened => return opened.map_err(sysfs(node)),
        }
        if Instant::now() > deadline {
            let path = node.to_owned();
            return Err(DiskError::InUse { path });
        }
        sleep(UNMOUNT_INTERVAL);
    }
}

/// The directory of the disk with this serial number.
fn find(serial: &str) -> Result<Option<PathBuf>, DiskError> {
    let is_it = |disk: &PathBuf| {
        fs::read_to_string(disk.join("serial")).is_ok_and(|text| text.trim_end() == serial)
    };
    Ok(list(BLOCK_DEVICES)?.into_iter().find(is_it))
}

fn number(disk: &Path) -> Result<Disk, DiskError> {
    let path = disk.join("dev");
    let text = fs::read_to_string(&path).map_err(sysfs(&path))?;
    let parsed = text.trim_end().split_once(':').and_then(|(major, minor)| {
        Some(Disk {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..Default::default()
        })
    });
    parsed.ok_or(DiskError::Number { path, text })
}

fn slots_without_driver() -> Result<Vec<Vec<u8>>, DiskError> {
    let slots = list(SLOTS)?.into_iter().filter_map(|slot| {
        let name = slot.file_name()?.to_str()?.to_owned();
        let free = name.starts_with("virtio-mmio.") && !slot.join("driver").exists();
        free.then(|| name.into_bytes())
    });
    Ok(slots.collect())
}

fn list(directory: &str) -> Result<Vec<PathBuf>, DiskError> {
    let path = Path::new(directory);
    let entries = fs::read_dir(path).map_err(sysfs(path))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(sysfs(path)));
    paths.collect()
}

fn sysfs(path: &Path) -> impl Fn(io::Error) -> DiskError {
    move |cause| DiskError::Sysfs {
        path: path.to_owned(),
        cause,
    }
}
