//! virtio-mem: memory that a VM gets and gives back while it runs (virtio 1.2, section 5.15).
//!
//! The device has a range of guest-physical addresses ([`crate::growth`] makes it), cut into blocks that are plugged or
//! not; at boot none is. The host only says how much it wants plugged, by `requested_size` and a configuration interrupt.
//! The guest's driver picks the blocks, in its own time, and asks for each change on the one queue:
//!
//! ```text
//! request (24 bytes)                        answer (10 bytes)
//! 0  type u16: 0 PLUG, 1 UNPLUG,            0  type u16: 0 ACK, 1 NACK, 2 BUSY, 3 ERROR
//!              2 UNPLUG_ALL, 3 STATE        8  state u16: 0 plugged, 1 unplugged, 2 mixed
//! 8  address u64
//! 16 blocks u16
//! ```
//!
//! NACK is for a PLUG beyond what was requested, ERROR for one that makes no sense; both change nothing. To shrink is a
//! wish: the guest gives back what it can free, and keeps trying. Blocks that it unplugs go back to the host at once.

mod blocks;
mod device;

#[cfg(test)]
mod tests;

pub use device::{Mem, Target};

/// Bytes of a block: what Linux on x86 frees as one, and a huge page of the host.
pub const BLOCK: u64 = 2 << 20;

/// Entries of the queue. Linux asks for one change at a time.
const QUEUE_SIZE: u16 = 16;
/// Requests carried out in one go. Each may drop gigabytes, so fewer than for other devices.
const MAX_REQUESTS_PER_EVENT: usize = 4;
