//! The disk as the guest sees it.

use super::request::{Limits, Request, Status};
use super::worker::{Done, Job, Worker, finish};
use super::{BlockError, ID_BYTES, MAX_CLEAR_SECTORS, QUEUE_SIZE, SECTOR, SEGMENT_BYTES, SEGMENTS};
use crate::virtio::device::{copy_config, with_active};
use crate::virtio::queue::{self, Chain, MAX_CHAINS_PER_EVENT};
use crate::virtio::{Activation, DeviceError, Memory, VirtioDevice};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::epoll::EventSet;

/// Device type of a slot without a device.
const PLACE_HOLDER: u32 = 0;
/// Bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap`.
const CONFIG: usize = 57;

/// A disk. Without a file it is an empty slot, to be filled by [`VirtioDevice::set_backend`]: a place holder, whose device type
/// is 0 (virtio 1.2, 4.2.2 `DeviceID`). Drivers pass over it until they are told to look again.
#[derive(Debug)]
pub struct Block {
    id: [u8; ID_BYTES],
    read_only: bool,
    file: Option<Arc<File>>,
    /// Capacity.
    sectors: u64,
    worker: Worker,
    active: Option<Activation>,
    /// Requests the worker has.
    in_flight: usize,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    requests: u64,
    failed: u64,
}

impl Block {
    /// A disk on `file`, or an empty slot. Starts the worker thread, so the process must have taken its final identity.
    pub fn new(serial: &str, file: Option<OwnedFd>, read_only: bool) -> Result<Self, BlockError> {
        let mut id = [0; ID_BYTES];
        let room = id
            .get_mut(..serial.len())
            .ok_or_else(|| BlockError::LongSerial(serial.into()))?;
        room.copy_from_slice(serial.as_bytes());
        let worker = Worker::start(usize::from(QUEUE_SIZE))?;
        let counters = Counters::default();
        let mut block = Self {
            id,
            read_only,
            file: None,
            sectors: 0,
            worker,
            active: None,
            in_flight: 0,
            counters,
        };
        block.point(file)?;
        Ok(block)
    }

    /// Makes `file` the disk's content.
    fn point(&mut self, file: Option<OwnedFd>) -> Result<(), BlockError> {
        let file = file.map(File::from);
        if let Some(file) = file.as_ref().filter(|_| !self.read_only)
            && !is_writable(file)?
        {
            return Err(BlockError::NotWritable);
        }
        self.sectors = file.as_ref().map_or(Ok(0), capacity)?;
        self.file = file.map(Arc::new);
        Ok(())
    }

    fn config(&self) -> [u8; CONFIG] {
        let mut config = [0; CONFIG];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // DISCARD and WRITE_ZEROES: sectors, segments; the discard's alignment is a page of the host's page cache.
        put(36, &MAX_CLEAR_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &MAX_CLEAR_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }

    /// Takes the requests that wait.
    fn take_requests(&mut self, active: &mut Activation) -> Result<(), DeviceError> {
        queue::serve(active, 0, MAX_CHAINS_PER_EVENT, |chain, memory| {
            self.counters.requests += 1;
            let done = self.start(chain, memory)?;
            Ok(done.map(|done| self.count(done).written))
        })
    }

    /// Begins a request; one that is refused is finished at once.
    fn start(&mut self, chain: Chain, memory: &Memory) -> Result<Option<Done>, DeviceError> {
        if chain.writable_len() == 0 {
            return Err(DeviceError::hostile(BlockError::NoStatus {
                head: chain.head,
            }));
        }
        let limits = Limits {
            sectors: self.sectors,
            read_only: self.read_only,
        };
        let (request, file) = match (Request::parse(&chain, memory, limits), &self.file) {
            (Ok(request), Some(file)) => (request, file.clone()),
            (Ok(_), None) => return Ok(Some(finish(&chain, memory, Status::IoError, 0))),
            (Err(status), _) => return Ok(Some(finish(&chain, memory, status, 0))),
        };
        if self.in_flight == usize::from(QUEUE_SIZE) {
            return Err(DeviceError::hostile(BlockError::TooManyRequests));
        }
        self.worker
            .submit(Job {
                chain,
                request,
                memory: memory.clone(),
                file,
                id: self.id,
            })
            .map_err(DeviceError::fatal)?;
        self.in_flight += 1;
        Ok(None)
    }

    fn count(&mut self, done: Done) -> Done {
        self.counters.failed += u64::from(done.status != Status::Ok);
        done
    }

    /// Gives finished requests back to the guest.
    fn give_back(&mut self, active: &mut Activation) -> Result<(), DeviceError> {
        self.worker.acknowledge();
        let (queue, memory) = (&mut active.queues[0], &active.memory);
        let mut any = false;
        while let Some(done) = self.worker.finished() {
            self.in_flight -= 1;
            let Done { head, written, .. } = self.count(done);
            queue::push(queue, memory, head, written)?;
            any = true;
        }
        if any {
            queue::notify(queue, memory, &active.interrupt)?;
        }
        Ok(())
    }
}

fn is_writable(file: &File) -> Result<bool, BlockError> {
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|error| BlockError::Mode(error.into()))?;
    Ok(OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE == OFlag::O_RDWR)
}

/// Whole sectors of a file or a block device.
fn capacity(mut file: &File) -> Result<u64, BlockError> {
    file.seek(SeekFrom::End(0))
        .map(|bytes| bytes / SECTOR)
        .map_err(BlockError::Size)
}

impl VirtioDevice for Block {
    fn kind(&self) -> u32 {
        if self.file.is_some() {
            VIRTIO_ID_BLOCK
        } else {
            PLACE_HOLDER
        }
    }

    fn features(&self) -> u64 {
        let common = bits(&[
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
        ]);
        let own = if self.read_only {
            bits(&[VIRTIO_BLK_F_RO])
        } else {
            bits(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES])
        };
        common | own
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config(), offset, data);
    }

    fn activate(&mut self, active: Activation) -> Result<(), DeviceError> {
        self.active = Some(active);
        Ok(())
    }

    fn queue_event(&mut self, _queue: usize) -> Result<(), DeviceError> {
        with_active(self, |block| &mut block.active, Self::take_requests)
    }

    fn sources(&self) -> Vec<(RawFd, EventSet, u16)> {
        vec![(self.worker.ready_fd(), EventSet::IN, 0)]
    }

    fn source_event(&mut self, _token: u16, _set: EventSet) -> Result<(), DeviceError> {
        with_active(self, |block| &mut block.active, Self::give_back)
    }

    fn reset(&mut self) {
        self.worker.cancel();
        self.in_flight = 0;
        self.active = None;
        // The next driver sees the file as it is now; where its size can't be told, the old one stays.
        if let Some(Ok(sectors)) = self.file.as_deref().map(capacity) {
            self.sectors = sectors;
        }
    }

    /// A slot that is empty becomes a disk, read-only where its file was opened so; one that is not becomes empty, and requests
    /// in flight finish on the old file. A driver that holds on to an empty slot sees a disk of capacity 0.
    fn set_backend(&mut self, backend: Option<OwnedFd>) -> Result<(), DeviceError> {
        let file = backend.map(File::from);
        if file.is_some() && self.file.is_some() {
            return Err(DeviceError::fatal(BlockError::Taken));
        }
        if let Some(file) = &file {
            self.read_only = !is_writable(file).map_err(DeviceError::fatal)?;
        }
        let file = file.map(OwnedFd::from);
        self.point(file).map_err(DeviceError::fatal)?;
        if let Some(active) = &self.active {
            active.interrupt.signal_config();
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("requests", self.counters.requests),
            ("failed", self.counters.failed),
        ]
    }
}

fn bits(numbers: &[u32]) -> u64 {
    numbers.iter().fold(0, |all, bit| all | 1 << bit)
}
