//! virtio-balloon: how free guest memory goes back to the host (virtio 1.2, section 5.5).
//!
//! The balloon proper has target 0 for ever: nobody asks the guest to give up memory it may need. What works is free
//! page reporting: the guest kernel tells, a few times per second, which large free ranges it holds, and waits until
//! the device has dropped them. Touching such a page later just faults in a zero page.
//!
//! ```text
//! queue 0  inflate    page numbers (u32, 4 KiB pages), readable
//! queue 1  deflate    page numbers, readable; nothing to do, the pages fault in again
//! queue 2  reporting  the free ranges themselves, as writable buffers
//! ```
//!
//! Queue numbers are those of a device without the statistics and hinting queues: queues of features that were not
//! offered do not exist, and the rest moves up.

mod device;

#[cfg(test)]
mod tests;

pub use device::Balloon;

use crate::memory::DiscardError;

/// Bytes of the page that a page number counts, whatever the page size of guest or host.
pub const PAGE: u64 = 4096;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 128;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;

/// Page numbers in one request; Linux sends 256 at most.
const MAX_PAGES: usize = 4096;
/// Ranges in one report; Linux sends PAGE_REPORTING_CAPACITY = 32.
const MAX_RANGES: usize = QUEUE_SIZE as usize;
/// Requests carried out in one go. Each may drop gigabytes, so fewer than for other devices.
const MAX_REQUESTS_PER_EVENT: usize = 16;

/// What the guest did wrong.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    #[error("the request at {head} has {bytes} bytes of page numbers, more than {MAX_PAGES} pages")]
    TooManyPages { head: u16, bytes: usize },
    #[error("the request at {head} ends inside a page number ({bytes} bytes)")]
    PartialPage { head: u16, bytes: usize },
    #[error("the report at {head} names {count} ranges, more than {MAX_RANGES}")]
    TooManyRanges { head: u16, count: usize },
    #[error("the guest gave back memory it does not have")]
    Foreign(#[source] DiscardError),
}
