//! Guest RAM.
//!
//! RAM is one or two regions: up to 3 GiB from address 0, the rest from 4 GiB (`crate::layout`). What stands behind a
//! region decides how memory goes back to the host and how snapshots share it, so the code asks [`Backing::of`] and
//! never assumes. Today the VMM makes [`Backing::SharedFile`], because coffer-fsd maps guest RAM too (vhost-user); the
//! other two are what plain and restored VMs will use, and the device tests already use [`Backing::Anonymous`].

use crate::virtio::Memory;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// What stands behind a region of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// MAP_PRIVATE | MAP_ANONYMOUS.
    Anonymous,
    /// MAP_SHARED of a memfd, which other processes map as well. A page is only free when the file has a hole there.
    SharedFile,
    /// MAP_PRIVATE of a snapshot. Dropping a page would bring the old content back.
    PrivateFile,
}

impl Backing {
    pub fn of(region: &GuestRegionMmap) -> Self {
        match (region.file_offset(), region.flags() & libc::MAP_SHARED != 0) {
            (None, _) => Self::Anonymous,
            (Some(_), true) => Self::SharedFile,
            (Some(_), false) => Self::PrivateFile,
        }
    }
}

/// Why a range of guest memory can't be given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// The guest named memory it does not have.
    #[error("{length} bytes at {address:#x} are not in one region of guest RAM")]
    OutsideRam { address: u64, length: usize },
    #[error("can't discard {length} bytes at {address:#x}")]
    Host { address: u64, length: usize, #[source] cause: io::Error },
}

/// Gives a range of guest RAM back to the host; it reads as zeroes afterwards. The range must lie in one region.
/// Whole pages only: an unaligned edge is left alone.
#[allow(unsafe_code)]
pub fn discard(memory: &Memory, address: GuestAddress, length: usize) -> Result<(), DiscardError> {
    let outside = DiscardError::OutsideRam { address: address.0, length };
    let Some((region, start)) = memory.to_region_addr(address) else { return Err(outside) };
    let Ok(slice) = region.get_slice(start, length) else { return Err(outside) };
    let (first, end) = whole_pages(start, length);
    if first >= end {
        return Ok(());
    }
    let cause = |cause| DiscardError::Host { address: address.0, length, cause };
    // SAFETY: `first` lies inside the slice, which `get_slice` checked to be mapped.
    let host = unsafe { slice.ptr_guard_mut().as_ptr().add((first - start.0) as usize) };
    let size = (end - first) as usize;
    let done = match (Backing::of(region), region.file_offset()) {
        (Backing::SharedFile, Some(file)) => {
            let offset = file.start() + first;
            // SAFETY: plain call on an open file; the hole lies in this region's part of it.
            let done = unsafe {
                libc::fallocate(
                    file.file().as_raw_fd(),
                    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    offset as libc::off_t,
                    size as libc::off_t,
                )
            };
            done == 0
        }
        (Backing::PrivateFile, _) => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            // SAFETY: replaces pages of a mapping that `memory` owns by zero pages of the same protection.
            unsafe { libc::mmap(host.cast(), size, region.prot(), flags, -1, 0) != libc::MAP_FAILED }
        }
        // SAFETY: the range lies in a mapping that `memory` owns, and guest memory may change at any time.
        _ => unsafe { libc::madvise(host.cast(), size, libc::MADV_DONTNEED) == 0 },
    };
    if done { Ok(()) } else { Err(cause(io::Error::last_os_error())) }
}

/// The page-aligned part of a range, as offsets in its region (regions are page aligned in memory and in their file).
fn whole_pages(start: MemoryRegionAddress, length: usize) -> (u64, u64) {
    const PAGE: u64 = 4096;
    (start.0.next_multiple_of(PAGE), (start.0 + length as u64) / PAGE * PAGE)
}
