//! Guest RAM.
//!
//! RAM is one or two regions: up to 3 GiB from address 0, the rest from 4 GiB (`crate::layout`). What stands behind a
//! region decides how memory goes back to the host and how snapshots share it, so the code asks [`Backing::of`] and
//! never assumes. Today the VMM makes [`Backing::SharedFile`], because coffer-fsd maps guest RAM too (vhost-user); the
//! other two are what plain and restored VMs will use, and the device tests already use [`Backing::Anonymous`].

use crate::layout;
use crate::virtio::Memory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap, MemoryRegionAddress,
};

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

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("can't make a memory file of {0} bytes for guest RAM")]
    File(u64, #[source] io::Error),
    #[error("can't map {0} bytes of guest RAM")]
    Map(u64, #[source] FromRangesError),
    #[error("KVM refuses {1} bytes of RAM at {0:#x}")]
    Slot(u64, u64, #[source] kvm_ioctls::Error),
    #[error("{1} bytes at {0:#x} can't be set aside for the VM to grow")]
    Reserve(u64, u64, #[source] GuestRegionCollectionError),
    #[error("the VM was made for the memory that it has")]
    Fixed,
    #[error("the VM can't have {asked} bytes of memory, only {least} to {most}")]
    OutOfRange { asked: u64, least: u64, most: u64 },
}

/// Makes guest RAM of `size` bytes on one shared memory file. Pages appear when they are first touched.
pub fn create(size: u64) -> Result<Memory, MemoryError> {
    let file = Arc::new(create_file(size)?);
    let mut offset = 0;
    let mut ranges = Vec::new();
    for (address, length) in layout::ram(size) {
        ranges.push((
            address,
            length as usize,
            Some(FileOffset::from_arc(file.clone(), offset)),
        ));
        offset += length;
    }
    Memory::from_ranges_with_files(ranges).map_err(|error| MemoryError::Map(size, error))
}

/// An empty memory file of `size` bytes.
pub(crate) fn create_file(size: u64) -> Result<File, MemoryError> {
    let file = memfd_create(c"coffer-ram", MFdFlags::MFD_CLOEXEC)
        .map_err(|error| MemoryError::File(size, error.into()))?;
    let file = File::from(file);
    file.set_len(size)
        .map_err(|error| MemoryError::File(size, error))?;
    Ok(file)
}

/// Gives all regions to KVM, one slot each.
pub fn register(memory: &Memory, vm: &VmFd) -> Result<(), MemoryError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        add_slot(vm, slot, region, 0..region.len())?;
    }
    Ok(())
}

/// Gives this part of a region to KVM. Parts of one region must not overlap.
#[allow(unsafe_code)]
pub(crate) fn add_slot(
    vm: &VmFd,
    slot: u32,
    region: &GuestRegionMmap,
    part: Range<u64>,
) -> Result<(), MemoryError> {
    let (address, size) = (region.start_addr().0 + part.start, part.end - part.start);
    let slot = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: address,
        memory_size: size,
        userspace_addr: region.as_ptr() as u64 + part.start,
    };
    // SAFETY: the machine keeps the region, and so the mapping, as long as its VM.
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(|error| MemoryError::Slot(address, size, error))
}

/// Why a range of guest memory can't be given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// The guest named memory it does not have.
    #[error("{length} bytes at {address:#x} are not in one region of guest RAM")]
    OutsideRam { address: u64, length: usize },
    #[error("can't discard {length} bytes at {address:#x}")]
    Host {
        address: u64,
        length: usize,
        #[source]
        cause: io::Error,
    },
}

/// Gives a range of guest RAM back to the host; it reads as zeroes afterwards. The range must lie in one region.
/// Whole pages only: an unaligned edge is left alone.
#[allow(unsafe_code)]
pub fn discard(memory: &Memory, address: GuestAddress, length: usize) -> Result<(), DiscardError> {
    let outside = DiscardError::OutsideRam {
        address: address.0,
        length,
    };
    let Some((region, start)) = memory.to_region_addr(address) else {
        return Err(outside);
    };
    let Ok(slice) = region.get_slice(start, length) else {
        return Err(outside);
    };
    let (first, end) = whole_pages(start, length);
    if first >= end {
        return Ok(());
    }
    let cause = |cause| DiscardError::Host {
        address: address.0,
        length,
        cause,
    };
    // SAFETY: `first` lies inside the slice, which `get_slice` checked to be mapped.
    let host = unsafe {
        slice
            .ptr_guard_mut()
            .as_ptr()
            .add((first - start.0) as usize)
    };
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
            let flags =
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            // SAFETY: replaces pages of a mapping that `memory` owns by zero pages of the same protection.
            unsafe {
                libc::mmap(host.cast(), size, region.prot(), flags, -1, 0) != libc::MAP_FAILED
            }
        }
        // SAFETY: the range lies in a mapping that `memory` owns, and guest memory may change at any time.
        _ => unsafe { libc::madvise(host.cast(), size, libc::MADV_DONTNEED) == 0 },
    };
    if done {
        Ok(())
    } else {
        Err(cause(io::Error::last_os_error()))
    }
}

/// The page-aligned part of a range, as offsets in its region (regions are page aligned in memory and in their file).
fn whole_pages(start: MemoryRegionAddress, length: usize) -> (u64, u64) {
    const PAGE: u64 = 4096;
    (
        start.0.next_multiple_of(PAGE),
        (start.0 + length as u64) / PAGE * PAGE,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::Bytes;

    const MIB: usize = 1 << 20;

    #[test]
    fn discarded_memory_reads_as_zeroes_and_leaves_the_file() {
        let memory = create(8 << 20).unwrap();
        let region = memory.iter().next().unwrap();
        assert_eq!(Backing::of(region), Backing::SharedFile);
        memory
            .write_slice(&vec![7; 4 * MIB], GuestAddress(0))
            .unwrap();
        let blocks = || {
            region
                .file_offset()
                .unwrap()
                .file()
                .metadata()
                .unwrap()
                .blocks()
        };
        let before = blocks();
        discard(&memory, GuestAddress(MIB as u64), 2 * MIB).unwrap();
        assert!(
            blocks() <= before - (2 * MIB / 512) as u64,
            "{} of {before} blocks are left",
            blocks()
        );
        let byte = |at| memory.read_obj::<u8>(GuestAddress(at as u64)).unwrap();
        assert_eq!(
            [byte(MIB - 1), byte(MIB), byte(3 * MIB - 1), byte(3 * MIB)],
            [7, 0, 0, 7]
        );
    }

    #[test]
    fn anonymous_memory_and_snapshots_read_as_zeroes_too() {
        let anonymous = Memory::from_ranges(&[(GuestAddress(0), MIB)]).unwrap();
        anonymous.write_slice(&[7; 8192], GuestAddress(0)).unwrap();
        discard(&anonymous, GuestAddress(0), 4096).unwrap();
        assert_eq!(anonymous.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);

        let file = File::from(memfd_create(c"snapshot", MFdFlags::MFD_CLOEXEC).unwrap());
        std::os::unix::fs::FileExt::write_all_at(&file, &[9; 8192], 0).unwrap();
        let mapping = vm_memory::MmapRegion::build(
            Some(FileOffset::new(file, 0)),
            8192,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE,
        );
        let region = GuestRegionMmap::new(mapping.unwrap(), GuestAddress(0)).unwrap();
        assert_eq!(Backing::of(&region), Backing::PrivateFile);
        let snapshot = Memory::from_regions(vec![region]).unwrap();
        discard(&snapshot, GuestAddress(0), 4096).unwrap();
        let byte = |at| snapshot.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!([byte(0), byte(4095), byte(4096)], [0, 0, 9]);
    }

    #[test]
    fn ranges_outside_ram_are_refused_and_edges_kept() {
        let memory = create(1 << 20).unwrap();
        for (address, length) in [
            (1 << 20, 4096),
            (MIB as u64 - 4096, 8192),
            (u64::MAX - 4095, 4096),
            (0, usize::MAX),
        ] {
            let result = discard(&memory, GuestAddress(address), length);
            assert!(
                matches!(result, Err(DiscardError::OutsideRam { .. })),
                "{address:#x}+{length:#x}"
            );
        }
        memory.write_slice(&[7; 8192], GuestAddress(0)).unwrap();
        discard(&memory, GuestAddress(1), 4096).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(4095)).unwrap(), 7);
    }
}
