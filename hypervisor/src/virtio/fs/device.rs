//! The file system device as the guest sees it.

use super::backend::Backend;
use super::{DEADLINE, FsError, QUEUE_SIZE, QUEUES, TAG_BYTES};
use crate::virtio::device::copy_config;
use crate::virtio::{Activation, DeviceError, Memory, VirtioDevice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use vhost::vhost_user::VhostUserVirtioFeatures;
use vhost::vhost_user::message::{
    VhostUserMemoryRegion, VhostUserVringAddr, VhostUserVringAddrFlags,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

/// Bytes of `struct virtio_fs_config`: the tag, and the number of request queues (u32).
const CONFIG: usize = TAG_BYTES + 4;

/// A virtio-fs device. Nothing is asked of coffer-fsd before the guest's driver is ready, so the two start side by
/// side.
#[derive(Debug)]
pub struct Fs {
    config: [u8; CONFIG],
    backend: Backend,
    active: Option<Activation>,
    /// A reset could not stop the queues; the next activation tells.
    broken: Option<FsError>,
}

impl Fs {
    /// A device with this tag, served from the other end of `socket` (connected, SOCK_STREAM).
    pub fn new(tag: &str, socket: OwnedFd) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_BYTES {
            return Err(FsError::Tag(tag.into()));
        }
        let mut config = [0; CONFIG];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_BYTES..].copy_from_slice(&(QUEUES as u32 - 1).to_le_bytes());
        Ok(Self {
            config,
            backend: Backend::new(socket),
            active: None,
            broken: None,
        })
    }

    fn start(&mut self, active: &Activation) -> Result<(), FsError> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        self.backend.begin(DEADLINE);
        self.backend.negotiate(
            active.features,
            VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
        )?;
        let (regions, files) = memory_table(&active.memory)?;
        self.backend.set_memory(&regions, &files)?;
        let call = active.interrupt.hand_over().map_err(FsError::Interrupt)?;
        let call = borrow(&call);
        for (index, (queue, kick)) in active.queues.iter().zip(&active.notify).enumerate() {
            if queue.ready() {
                let rings = ring_addresses(index, queue, &active.memory)?;
                self.backend
                    .start_queue(index as u32, queue.size(), &rings, call, borrow(kick))?;
            }
        }
        Ok(())
    }

    fn stop(&mut self, active: &Activation) -> Result<(), FsError> {
        self.backend.begin(DEADLINE);
        let ready = active
            .queues
            .iter()
            .enumerate()
            .filter(|(_, queue)| queue.ready());
        for (index, _) in ready {
            self.backend.stop_queue(index as u32)?;
        }
        Ok(())
    }
}

/// Regions of guest memory with the files that back them.
fn memory_table(
    memory: &Memory,
) -> Result<(Vec<VhostUserMemoryRegion>, Vec<BorrowedFd<'_>>), FsError> {
    let mut regions = Vec::new();
    let mut files = Vec::new();
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let Some(file) = region.file_offset().filter(|_| shared) else {
            return Err(FsError::PrivateMemory(start));
        };
        regions.push(VhostUserMemoryRegion::new(
            start,
            region.len(),
            region.as_ptr() as u64,
            file.start(),
        ));
        files.push(file.file().as_fd());
    }
    Ok((regions, files))
}

/// The rings of a queue as addresses of this process, which coffer-fsd translates by the memory table.
fn ring_addresses(
    index: usize,
    queue: &Queue,
    memory: &Memory,
) -> Result<VhostUserVringAddr, FsError> {
    let host = |address: u64| {
        let pointer = memory
            .get_host_address(GuestAddress(address))
            .map_err(|_| FsError::Ring(index))?;
        Ok(pointer as u64)
    };
    let (descriptors, used, available) = (
        host(queue.desc_table())?,
        host(queue.used_ring())?,
        host(queue.avail_ring())?,
    );
    Ok(VhostUserVringAddr::new(
        index as u32,
        VhostUserVringAddrFlags::empty(),
        descriptors,
        used,
        available,
        0,
    ))
}

#[allow(unsafe_code)]
fn borrow(event: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, active: Activation) -> Result<(), DeviceError> {
        self.start(&active).map_err(DeviceError::fatal)?;
        self.active = Some(active);
        Ok(())
    }

    fn takes_kicks(&self) -> bool {
        true
    }

    /// Never called: coffer-fsd has the kicks.
    fn queue_event(&mut self, _queue: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    fn sources(&self) -> Vec<(RawFd, EventSet, u16)> {
        vec![(
            self.backend.as_raw_fd(),
            EventSet::IN | EventSet::READ_HANG_UP,
            0,
        )]
    }

    fn source_event(&mut self, _token: u16, _set: EventSet) -> Result<(), DeviceError> {
        self.backend.check().map_err(DeviceError::fatal)
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            self.broken = self.stop(&active).err();
        }
    }
}
