//! Split virtqueues (virtio 1.2, section 2.7) as a device wants them: whole chains, or an error that says which rule
//! the driver broke.
//!
//! `virtio-queue` walks the rings and never leaves guest memory, but it ends a broken chain silently. [`pop`] checks
//! what it gave and copies the descriptors, so the guest can't change them while a device works:
//! - the available index is at most the queue size ahead,
//! - a chain ends with a descriptor without NEXT, after at most queue-size descriptors, indirect ones counted,
//! - readable buffers come before writable ones, and every buffer lies in RAM.
//!
//! A chain that fails is consumed, so it is never parsed twice.

use super::{Activation, DeviceError, Interrupt, Memory};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, VolatileSlice};

/// Chains a device takes in one `queue_event`, so that one busy queue doesn't starve the others.
pub const MAX_CHAINS_PER_EVENT: usize = 256;

/// A rule of virtio the driver broke, or a ring that can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Also: available index too far ahead.
    #[error("a ring of the queue can't be used")]
    Ring(#[source] virtio_queue::Error),
    #[error(
        "the descriptor chain at {head} has no end, or an index or indirect table out of bounds"
    )]
    BrokenChain { head: u16 },
    #[error("the descriptor chain at {head} is longer than the queue")]
    LongChain { head: u16 },
    #[error("the descriptor chain at {head} has a readable buffer after a writable one")]
    Order { head: u16 },
    #[error(
        "the descriptor chain at {head} has a buffer outside RAM: {length} bytes at {address:#x}"
    )]
    OutsideRam {
        head: u16,
        address: u64,
        length: u32,
    },
    #[error("the descriptor chain at {head} has {have} bytes where the device needs {want}")]
    Short { head: u16, have: usize, want: usize },
}

impl From<QueueError> for DeviceError {
    fn from(error: QueueError) -> Self {
        Self::hostile(error)
    }
}

/// A part of guest memory that lies in RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    pub address: GuestAddress,
    pub length: u32,
}

/// A request of the driver: a checked copy of its descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Names the chain towards [`push`].
    pub head: u16,
    /// What the device may read.
    pub readable: Vec<Buffer>,
    /// What the device may write.
    pub writable: Vec<Buffer>,
}

/// Takes the next chain from the available ring.
pub fn pop(queue: &mut Queue, memory: &Memory) -> Result<Option<Chain>, QueueError> {
    let limit = usize::from(queue.size());
    let Some(descriptors) = queue.iter(memory).map_err(QueueError::Ring)?.next() else {
        return Ok(None);
    };
    let mut chain = Chain {
        head: descriptors.head_index(),
        readable: Vec::new(),
        writable: Vec::new(),
    };
    let head = chain.head;
    let mut ended = false;
    for descriptor in descriptors {
        if chain.readable.len() + chain.writable.len() == limit {
            return Err(QueueError::LongChain { head });
        }
        ended = !descriptor.has_next();
        let (address, length) = (descriptor.addr(), descriptor.len());
        if memory.get_slice(address, length as usize).is_err() {
            return Err(QueueError::OutsideRam {
                head,
                address: address.0,
                length,
            });
        }
        let buffer = Buffer { address, length };
        if descriptor.is_write_only() {
            chain.writable.push(buffer);
        } else if chain.writable.is_empty() {
            chain.readable.push(buffer);
        } else {
            return Err(QueueError::Order { head });
        }
    }
    if ended {
        Ok(Some(chain))
    } else {
        Err(QueueError::BrokenChain { head })
    }
}

/// Gives a chain back with the number of bytes written into it.
pub fn push(queue: &mut Queue, memory: &Memory, head: u16, written: u32) -> Result<(), QueueError> {
    queue
        .add_used(memory, head, written)
        .map_err(QueueError::Ring)
}

/// Interrupts the driver about what was pushed, where it wants to know.
pub fn notify(queue: &mut Queue, memory: &Memory, interrupt: &Interrupt) -> Result<(), QueueError> {
    if queue.needs_notification(memory).map_err(QueueError::Ring)? {
        interrupt.signal_queue();
    }
    Ok(())
}

/// Asks for a kick at the next chain. True: there is one already and no kick will come for it.
pub fn rearm(queue: &mut Queue, memory: &Memory) -> Result<bool, QueueError> {
    queue.enable_notification(memory).map_err(QueueError::Ring)
}

/// One turn of a device at queue `index`: takes chains until there are no more or `limit` were taken, then interrupts the
/// driver where it wants to know. `serve` gives the number of bytes it wrote into a chain, which so goes back, or None
/// for a chain that the device keeps. Where more may wait, the device is kicked again, so that the others get their turn.
///
/// A queue that the driver left out is never served.
pub fn serve(
    active: &mut Activation,
    index: usize,
    limit: usize,
    mut serve: impl FnMut(Chain, &Memory) -> Result<Option<u32>, DeviceError>,
) -> Result<(), DeviceError> {
    let Activation {
        memory,
        queues,
        notify: kicks,
        interrupt,
        ..
    } = active;
    let queue = &mut queues[index];
    if !queue.ready() {
        return Ok(());
    }
    let (mut more, mut used) = (true, false);
    // Rounds are counted, not chains: a guest that moves the index to and fro must not keep us here.
    for _ in 0..limit {
        if let Some(chain) = pop(queue, memory)? {
            let head = chain.head;
            if let Some(written) = serve(chain, memory)? {
                push(queue, memory, head, written)?;
                used = true;
            }
        } else if !rearm(queue, memory)? {
            more = false;
            break;
        }
    }
    if more {
        // A full counter (EAGAIN) means that the kick is pending already.
        let _ = kicks[index].write(1);
    }
    if used {
        notify(queue, memory, interrupt)?;
    }
    Ok(())
}

impl Chain {
    pub fn readable_len(&self) -> usize {
        total(&self.readable)
    }

    pub fn writable_len(&self) -> usize {
        total(&self.writable)
    }

    /// Copies `data.len()` bytes out of the readable part, beginning at `offset`.
    pub fn read(&self, memory: &Memory, offset: usize, data: &mut [u8]) -> Result<(), QueueError> {
        self.want(self.readable_len(), offset, data.len())?;
        let mut rest = data;
        for slice in slices(&self.readable, memory, offset, rest.len()) {
            let (part, tail) = rest.split_at_mut(slice.len());
            slice.copy_to(part);
            rest = tail;
        }
        Ok(())
    }

    /// Copies `data` into the writable part, beginning at `offset`.
    pub fn write(&self, memory: &Memory, offset: usize, data: &[u8]) -> Result<(), QueueError> {
        self.want(self.writable_len(), offset, data.len())?;
        let mut rest = data;
        for slice in slices(&self.writable, memory, offset, rest.len()) {
            let (part, tail) = rest.split_at(slice.len());
            slice.copy_from(part);
            rest = tail;
        }
        Ok(())
    }

    /// Reads a structure at `offset` of the readable part.
    pub fn read_obj<T: ByteValued + Default>(
        &self,
        memory: &Memory,
        offset: usize,
    ) -> Result<T, QueueError> {
        let mut value = T::default();
        self.read(memory, offset, value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes a structure at `offset` of the writable part.
    pub fn write_obj<T: ByteValued>(
        &self,
        memory: &Memory,
        offset: usize,
        value: &T,
    ) -> Result<(), QueueError> {
        self.write(memory, offset, value.as_slice())
    }

    /// Up to `length` bytes of the readable part from `offset`, as host memory (for writev).
    pub fn readable_slices<'m>(
        &self,
        memory: &'m Memory,
        offset: usize,
        length: usize,
    ) -> Vec<VolatileSlice<'m>> {
        slices(&self.readable, memory, offset, length)
    }

    /// Up to `length` bytes of the writable part from `offset`, as host memory (for readv).
    pub fn writable_slices<'m>(
        &self,
        memory: &'m Memory,
        offset: usize,
        length: usize,
    ) -> Vec<VolatileSlice<'m>> {
        slices(&self.writable, memory, offset, length)
    }

    fn want(&self, have: usize, offset: usize, length: usize) -> Result<(), QueueError> {
        let want = offset.saturating_add(length);
        if want > have {
            Err(QueueError::Short {
                head: self.head,
                have,
                want,
            })
        } else {
            Ok(())
        }
    }
}

fn total(buffers: &[Buffer]) -> usize {
    buffers.iter().map(|b| b.length as usize).sum()
}

fn slices<'m>(
    buffers: &[Buffer],
    memory: &'m Memory,
    mut offset: usize,
    mut length: usize,
) -> Vec<VolatileSlice<'m>> {
    let mut slices = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let size = buffer.length as usize;
        if offset >= size {
            offset -= size;
            continue;
        }
        let take = (size - offset).min(length);
        if take == 0 {
            break;
        }
        let address = GuestAddress(buffer.address.0 + offset as u64);
        slices.push(
            memory
                .get_slice(address, take)
                .expect("pop() saw this range in RAM, and RAM never goes away"),
        );
        offset = 0;
        length -= take;
    }
    slices
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
