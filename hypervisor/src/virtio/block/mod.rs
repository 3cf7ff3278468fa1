//! virtio-blk: a raw file as a disk (virtio 1.2, section 5.2).
//!
//! One queue; a request is one chain:
//!
//! ```text
//! readable   type u32 | reserved u32 | sector u64 | data of OUT, DISCARD, WRITE_ZEROES
//! writable   data of IN, GET_ID | status u8
//! ```
//!
//! Sectors have 512 bytes whatever the disk's block size is. How the bytes are cut into descriptors is the driver's
//! affair, so header, data and status are found by counting bytes.
//!
//! The main thread reads the header and decides: a request that can't be right gets its error status at once, the
//! others go to the disk's [`worker`], which does the file I/O straight between the file and guest memory, writes the
//! status byte, and reports back through an eventfd. Chains in flight belong to the worker; their descriptors were
//! copied when the chain was taken, and guest memory is never unmapped, so a guest that reuses a chain can only spoil
//! its own data.
//!
//! Only raw content is served, and nothing in it is ever interpreted.

mod device;
mod request;
mod worker;

#[cfg(test)]
mod tests;

pub use device::Block;

use std::io;

/// Unit of all sector numbers.
pub const SECTOR: u64 = 512;

/// Entries of the queue.
const QUEUE_SIZE: u16 = 256;
/// Data descriptors of one request: what the queue leaves beside header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of one data descriptor.
const SEGMENT_BYTES: u32 = 128 << 10;
/// Data bytes of one request. A driver that keeps to SEG_MAX and SIZE_MAX can't exceed it; it bounds how long one
/// request keeps the worker busy, and with it how long a reset waits.
const MAX_DATA: u64 = SEGMENTS as u64 * SEGMENT_BYTES as u64;
/// Sectors of one DISCARD or WRITE_ZEROES (1 GiB). They touch only metadata, yet a bound keeps them short.
const MAX_CLEAR_SECTORS: u32 = 2 << 20;

/// Bytes of the request header.
const HEADER: usize = 16;
/// Bytes of a DISCARD or WRITE_ZEROES segment; one is allowed per request.
const CLEAR_SEGMENT: usize = 16;
/// Bytes that GET_ID returns.
const ID_BYTES: usize = 20;

/// What can go wrong with a disk on the host side, or be wrong with how the guest drives it.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("the disk serial {0:?} is longer than {ID_BYTES} bytes")]
    LongSerial(String),
    #[error("can't tell the size of the disk file")]
    Size(#[source] io::Error),
    #[error("can't tell how the disk file was opened")]
    Mode(#[source] io::Error),
    #[error("the slot has a disk already")]
    Taken,
    #[error("the disk is writable but its file was opened read-only")]
    NotWritable,
    #[error("can't make the disk's worker")]
    Worker(#[source] io::Error),
    #[error("the disk's worker is gone")]
    WorkerGone,
    #[error("the request at {head} has no room for its status")]
    NoStatus { head: u16 },
    #[error(
        "more than {QUEUE_SIZE} requests are in flight: a chain was reused before it came back"
    )]
    TooManyRequests,
}
