//! The balloon.

use super::{
    BalloonError, DEFLATE, INFLATE, MAX_PAGES, MAX_RANGES, MAX_REQUESTS_PER_EVENT, PAGE,
    QUEUE_SIZE, REPORTING,
};
use crate::memory::{DiscardError, discard};
use crate::virtio::device::{copy_config, with_active};
use crate::virtio::queue::{self, Chain};
use crate::virtio::{Activation, DeviceError, Memory, VirtioDevice};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::GuestAddress;

/// The guest takes pages back by itself before it runs out of memory (virtio 1.2, 5.5.3).
const F_DEFLATE_ON_OOM: u32 = 2;
/// Free page reporting.
const F_REPORTING: u32 = 5;
/// Bytes of `struct virtio_balloon_config` without the hinting fields: target u32, actual u32.
const CONFIG: usize = 8;
/// Where the guest tells how large the balloon is.
const ACTUAL: usize = 4;

/// A balloon with target 0 and free page reporting.
#[derive(Debug, Default)]
pub struct Balloon {
    config: [u8; CONFIG],
    active: Option<Activation>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    discarded_bytes: u64,
    /// Ranges the host could not drop. The guest does not mind.
    failed: u64,
}

impl Balloon {
    pub fn new() -> Self {
        Self::default()
    }

    fn requests(&mut self, active: &mut Activation, index: usize) -> Result<(), DeviceError> {
        queue::serve(active, index, MAX_REQUESTS_PER_EVENT, |chain, memory| {
            match index {
                INFLATE => self.inflate(&chain, memory)?,
                REPORTING => self.report(&chain, memory)?,
                _ => debug_assert_eq!(index, DEFLATE),
            }
            Ok(Some(0))
        })
    }

    /// Drops pages named by number. Neighbours, which is how Linux sends them, are dropped together.
    fn inflate(&mut self, chain: &Chain, memory: &Memory) -> Result<(), DeviceError> {
        let (head, bytes) = (chain.head, chain.readable_len());
        if bytes > MAX_PAGES * size_of::<u32>() {
            return Err(DeviceError::hostile(BalloonError::TooManyPages {
                head,
                bytes,
            }));
        }
        if bytes % size_of::<u32>() != 0 {
            return Err(DeviceError::hostile(BalloonError::PartialPage {
                head,
                bytes,
            }));
        }
        let mut numbers = vec![0; bytes];
        chain.read(memory, 0, &mut numbers)?;
        let mut pages = numbers
            .as_chunks()
            .0
            .iter()
            .map(|number| u64::from(u32::from_le_bytes(*number)))
            .peekable();
        while let Some(first) = pages.next() {
            let mut count = 1;
            while pages.next_if_eq(&(first + count)).is_some() {
                count += 1;
            }
            self.discard(memory, GuestAddress(first * PAGE), (count * PAGE) as usize)?;
        }
        Ok(())
    }

    /// Drops the ranges that a report's buffers are.
    fn report(&mut self, chain: &Chain, memory: &Memory) -> Result<(), DeviceError> {
        let count = chain.writable.len();
        if count > MAX_RANGES {
            return Err(DeviceError::hostile(BalloonError::TooManyRanges {
                head: chain.head,
                count,
            }));
        }
        for range in &chain.writable {
            self.discard(memory, range.address, range.length as usize)?;
        }
        Ok(())
    }

    fn discard(
        &mut self,
        memory: &Memory,
        address: GuestAddress,
        length: usize,
    ) -> Result<(), DeviceError> {
        match discard(memory, address, length) {
            Ok(()) => self.counters.discarded_bytes += length as u64,
            // The page stays where it is: the guest only asked us to save memory.
            Err(DiscardError::Host { .. }) => self.counters.failed += 1,
            Err(error @ DiscardError::OutsideRam { .. }) => {
                return Err(DeviceError::hostile(BalloonError::Foreign(error)));
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << F_DEFLATE_ON_OOM | 1 << F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    /// Only `actual` is the driver's to write; it is kept so that the driver reads it back.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == ACTUAL as u64 && data.len() == size_of::<u32>() {
            self.config[ACTUAL..].copy_from_slice(data);
        }
    }

    fn activate(&mut self, active: Activation) -> Result<(), DeviceError> {
        self.active = Some(active);
        Ok(())
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        with_active(
            self,
            |balloon| &mut balloon.active,
            |balloon, active| balloon.requests(active, queue),
        )
    }

    fn reset(&mut self) {
        self.active = None;
        self.config = [0; CONFIG];
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("discarded_bytes", self.counters.discarded_bytes),
            ("failed", self.counters.failed),
        ]
    }
}
