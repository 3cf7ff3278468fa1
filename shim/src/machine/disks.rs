//! Block devices of the host as disks of the VM: each is in a slot for as long as a container has it.
//!
//! ```text
//!  a container names 8:16 ─► open it ── AttachDisk{slot} ──► the slot becomes a disk ── AddDisk ──► /dev/vda, 254:0 in the guest
//!  the last one is deleted ◄────────── DetachDisk{slot} ◄── all is written ◄── RemoveDisk
//! ```
//!
//! coffer-vmm boots with empty slots, which are filled at any time. QEMU has the disks that it boots with, which are those of the first
//! container.

use super::options::Hypervisor;
use crate::agent::{Agent, AgentError};
use crate::spec::{BlockDevice, DeviceNumber};
use crate::vmm::{Vmm, VmmError};
use coffer_proto::error_chain::chain;
use coffer_proto::ids::ContainerId;
use coffer_proto::limits::MAX_DISKS;
use nix::sys::stat::{major, minor};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use tokio::sync::Mutex;

/// Why a container does not get a block device.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{path}: the host has no block device {number}")]
    Missing {
        path: PathBuf,
        number: DeviceNumber,
        source: io::Error,
    },
    #[error("{path}: can't open the block device {device} of the host")]
    Open {
        path: PathBuf,
        device: PathBuf,
        source: io::Error,
    },
    #[error("{path}: {device} is not the block device {number} any more")]
    Changed {
        path: PathBuf,
        device: PathBuf,
        number: DeviceNumber,
    },
    #[error("{path}: the VM has {slots} places for block devices, and all are taken")]
    NoSlot { path: PathBuf, slots: usize },
    #[error("{path}: under QEMU only the first container of a VM can have block devices")]
    Late { path: PathBuf },
    #[error("{path}: the VM did not take the block device")]
    Vmm { path: PathBuf, source: VmmError },
    #[error("{path}: the guest did not find the block device")]
    Agent { path: PathBuf, source: AgentError },
}

/// The disk slots of a VM.
#[derive(Debug)]
pub struct Disks {
    hypervisor: Hypervisor,
    /// Held during the work, so that containers come one after the other.
    slots: Mutex<Vec<Slot>>,
}

#[derive(Debug)]
enum Slot {
    Free,
    Taken {
        device: BlockDevice,
        users: BTreeSet<ContainerId>,
    },
    /// The guest or the VM did not let go of the disk.
    Spent,
}

/// A disk slot as the VM boots with it.
#[derive(Debug)]
pub struct BootSlot {
    pub serial: String,
    /// None for an empty slot.
    pub file: Option<File>,
    pub read_only: bool,
}

impl Disks {
    /// The slots of a VM whose first container has these block devices.
    pub fn begin(
        hypervisor: Hypervisor,
        wanted: &[BlockDevice],
    ) -> Result<(Self, Vec<BootSlot>), DiskError> {
        let mut slots = Vec::new();
        let mut boot = Vec::new();
        if hypervisor == Hypervisor::CofferVmm {
            slots.resize_with(MAX_DISKS, || Slot::Free);
            boot.extend((0..MAX_DISKS).map(|slot| BootSlot {
                serial: serial(slot),
                file: None,
                read_only: false,
            }));
        } else {
            for device in wanted {
                if slots.iter().any(|slot: &Slot| slot.holds(device)) {
                    continue;
                }
                boot.push(BootSlot {
                    serial: serial(slots.len()),
                    file: Some(open(device)?),
                    read_only: device.read_only,
                });
                slots.push(Slot::Taken {
                    device: device.clone(),
                    users: BTreeSet::new(),
                });
            }
        }
        let slots = Mutex::new(slots);
        Ok((Self { hypervisor, slots }, boot))
    }

    /// Brings a container's block devices into the guest; gives the number of each on the host and in the guest. After an error
    /// [`Disks::detach`] takes away what was done.
    pub async fn attach(
        &self,
        vmm: &Vmm,
        agent: &Agent,
        id: &ContainerId,
        wanted: &[BlockDevice],
    ) -> Result<Vec<(DeviceNumber, DeviceNumber)>, DiskError> {
        let mut slots = self.slots.lock().await;
        let mut numbers = Vec::with_capacity(wanted.len());
        for device in wanted {
            let slot = match slots.iter().position(|slot| slot.holds(device)) {
                Some(held) => held,
                None => self.fill(&mut slots, vmm, device).await?,
            };
            if let Slot::Taken { users, .. } = &mut slots[slot] {
                users.insert(id.clone());
            }
            let in_guest = agent.add_disk(&serial(slot)).await;
            let in_guest = in_guest.map_err(|source| DiskError::Agent {
                path: device.path.clone(),
                source,
            })?;
            numbers.push((device.number, in_guest));
        }
        Ok(numbers)
    }

    /// Puts a device into a free slot.
    async fn fill(
        &self,
        slots: &mut [Slot],
        vmm: &Vmm,
        device: &BlockDevice,
    ) -> Result<usize, DiskError> {
        let path = device.path.clone();
        if self.hypervisor != Hypervisor::CofferVmm {
            return Err(DiskError::Late { path });
        }
        let file = open(device)?;
        let Some(slot) = slots.iter().position(|slot| matches!(slot, Slot::Free)) else {
            let slots = slots.len();
            return Err(DiskError::NoSlot { path, slots });
        };
        let number = u8::try_from(slot).expect("a VM has few slots");
        vmm.attach_disk(number, file.into())
            .await
            .map_err(|source| DiskError::Vmm { path, source })?;
        slots[slot] = Slot::Taken {
            device: device.clone(),
            users: BTreeSet::new(),
        };
        Ok(slot)
    }

    /// Takes away the disks that no other container has. What can't be taken away stays until the VM ends.
    pub async fn detach(&self, vmm: &Vmm, agent: &Agent, id: &ContainerId) {
        let mut slots = self.slots.lock().await;
        for (number, slot) in slots.iter_mut().enumerate() {
            let Slot::Taken { device, users } = slot else {
                continue;
            };
            if !users.remove(id) || !users.is_empty() {
                continue;
            }
            let removed = agent.remove_disk(&serial(number)).await;
            if let Err(error) = &removed {
                tracing::warn!(device = %device.number, error = chain(error), "the guest keeps a disk");
            }
            if self.hypervisor != Hypervisor::CofferVmm {
                // It stays for the next container that has this device.
                continue;
            }
            let number = u8::try_from(number).expect("a VM has few slots");
            let detached = vmm.detach_disk(number).await;
            if let Err(error) = &detached {
                tracing::warn!(device = %device.number, error = chain(error), "the VM keeps a disk");
            }
            *slot = if removed.is_ok() && detached.is_ok() {
                Slot::Free
            } else {
                Slot::Spent
            };
        }
    }
}

impl Slot {
    fn holds(&self, wanted: &BlockDevice) -> bool {
        match self {
            Self::Taken { device, .. } => {
                device.number == wanted.number && device.read_only == wanted.read_only
            }
            _ => false,
        }
    }
}

/// The serial number by which the guest finds the disk.
fn serial(slot: usize) -> String {
    format!("coffer-{slot}")
}

/// Opens the block device of this number, by the name that the kernel has for it.
fn open(device: &BlockDevice) -> Result<File, DiskError> {
    let (path, number) = (device.path.clone(), device.number);
    let uevent = fs::read_to_string(format!("/sys/dev/block/{number}/uevent"));
    let name = uevent.and_then(|text| {
        let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        name.map(str::to_owned)
            .ok_or_else(|| io::Error::other("it has no name"))
    });
    let name = name.map_err(|source| DiskError::Missing {
        path: path.clone(),
        number,
        source,
    })?;
    let named = PathBuf::from("/dev").join(name);
    let opened = OpenOptions::new()
        .read(true)
        .write(!device.read_only)
        .open(&named)
        .and_then(|file| Ok((file.metadata()?, file)));
    let (meta, file) = opened.map_err(|source| DiskError::Open {
        path: path.clone(),
        device: named.clone(),
        source,
    })?;
    let is = (major(meta.rdev()), minor(meta.rdev()));
    if !meta.file_type().is_block_device() || is != (number.major.into(), number.minor.into()) {
        return Err(DiskError::Changed {
            path,
            device: named,
            number,
        });
    }
    Ok(file)
}
