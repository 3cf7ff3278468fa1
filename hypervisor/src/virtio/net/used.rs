//! Publishing several used chains at once.
//!
//! A received frame may fill many chains, and the driver expects to find all of them as soon as it sees the first
//! (virtio 1.2, 5.1.6.3.1). `virtio-queue` publishes one at a time, so for the receive queue the used ring is written
//! here: entries first, index last. That also means to keep count for EVENT_IDX ourselves.

use crate::virtio::Memory;
use crate::virtio::queue::QueueError;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// Ring header: flags and index.
const RING_HEADER: u64 = 4;
/// `VRING_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// The used side of a queue.
#[derive(Debug, Default)]
pub(super) struct Used {
    /// Index the driver was last asked about an interrupt for.
    told: Wrapping<u16>,
}

impl Used {
    /// Gives chains back, each with its number of written bytes; the driver sees all or none.
    pub(super) fn push(
        queue: &mut Queue,
        memory: &Memory,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let ring = queue.used_ring();
        let mut next = queue.next_used();
        for (head, written) in chains {
            let slot = u64::from(next % queue.size());
            let entry = u64::from(*head) | u64::from(*written) << 32;
            store(memory, ring + RING_HEADER + slot * 8, entry.to_le())?;
            next = next.wrapping_add(1);
        }
        memory
            .store(next.to_le(), GuestAddress(ring + 2), Ordering::Release)
            .map_err(ring_error)?;
        queue.set_next_used(next);
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was pushed since the last call (virtio 1.2, 2.7.10).
    pub(super) fn wants_interrupt(
        &mut self,
        queue: &Queue,
        memory: &Memory,
    ) -> Result<bool, QueueError> {
        let (new, old) = (Wrapping(queue.next_used()), self.told);
        self.told = new;
        if new == old {
            return Ok(false);
        }
        // The index is stored before the driver's wish is read; the driver does it the other way round.
        fence(Ordering::SeqCst);
        let avail = queue.avail_ring();
        if queue.event_idx_enabled() {
            let event = Wrapping(load(
                memory,
                avail + RING_HEADER + 2 * u64::from(queue.size()),
            )?);
            return Ok(new - event - Wrapping(1) < new - old);
        }
        Ok(load(memory, avail)? & NO_INTERRUPT == 0)
    }
}

fn load(memory: &Memory, address: u64) -> Result<u16, QueueError> {
    memory
        .load(GuestAddress(address), Ordering::Relaxed)
        .map(u16::from_le)
        .map_err(ring_error)
}

fn store(memory: &Memory, address: u64, value: u64) -> Result<(), QueueError> {
    memory
        .write_obj(value, GuestAddress(address))
        .map_err(ring_error)
}

fn ring_error(error: vm_memory::GuestMemoryError) -> QueueError {
    QueueError::Ring(virtio_queue::Error::GuestMemory(error))
}
