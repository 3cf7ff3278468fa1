//! Memory that a VM gets while it runs, beyond what it booted with.
//!
//! At boot this is only a range of addresses ([`layout::hotplug`]), mapped here and in coffer-fsd over a memory file that is
//! empty. When the VM may grow, a further part of the range is opened: the file gets that length, KVM gets a slot for the
//! part, and then [`virtio-mem`](crate::virtio::mem) tells the guest, which takes what it wants of the blocks in it.
//!
//! So no guest has more memory than it was once allowed, whatever it does: its CPUs have no slot beyond the open part,
//! and the memory file, which devices and coffer-fsd reach by address as well, ends there. Who names memory behind the
//! end to a device gets its VM killed by SIGBUS. What was opened stays open, because to shrink is the guest's work;
//! blocks that it gives back are dropped from the file.

use crate::layout::{self, Hotplug};
use crate::memory::{self, MemoryError};
use crate::virtio::Memory;
use crate::virtio::mem::{BLOCK, Mem, Target};
use kvm_ioctls::VmFd;
use std::sync::Arc;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestRegionMmap};

/// What a guest kernel needs on its command line: memory that appears is put to use without a program that says so, and as
/// movable memory, which can go again, as far as three quarters of all (`memory_hotplug.auto_movable_ratio`). With more
/// than that the kernel itself would starve.
pub const KERNEL_PARAMETERS: &str =
    "memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// The range of addresses, and how much of it is open.
#[derive(Debug)]
pub struct Growth {
    region: Arc<GuestRegionMmap>,
    place: Hotplug,
    /// Bytes of RAM that the VM booted with.
    ram: u64,
    /// Bytes of RAM it may have altogether.
    most: u64,
    /// Open bytes of the range.
    open: u64,
    next_slot: u32,
    target: Target,
}

impl Growth {
    /// Sets the addresses aside that a VM with this RAM needs to grow to `most` bytes: with them, guest memory as devices
    /// see it, and the device. None for a VM that does not grow.
    pub fn reserve(ram: &Memory, most: u64) -> Result<Option<(Self, Memory, Mem)>, MemoryError> {
        let size = ram.iter().map(vm_memory::GuestMemoryRegion::len).sum();
        let Some(place) = layout::hotplug(size, most) else {
            return Ok(None);
        };
        let file = FileOffset::new(memory::create_file(0)?, 0);
        let region = GuestRegionMmap::from_range(place.start, place.size as usize, Some(file))
            .map_err(|error| MemoryError::Map(place.size, error))?;
        let region = Arc::new(region);
        let memory = ram
            .insert_region(region.clone())
            .map_err(|error| MemoryError::Reserve(place.start.0, place.size, error))?;
        let device = Mem::new(place.start, place.size);
        let growth = Self {
            region,
            place,
            ram: size,
            most,
            open: 0,
            next_slot: ram.num_regions() as u32,
            target: device.target(),
        };
        Ok(Some((growth, memory, device)))
    }

    /// Bytes the memory file may get.
    pub fn size(&self) -> u64 {
        self.place.size
    }

    /// Asks the guest to have `bytes` of memory, with what it booted with; [`Self::reached`] tells when it has.
    pub fn resize(&mut self, vm: &VmFd, bytes: u64) -> Result<(), MemoryError> {
        if !(self.ram..=self.most).contains(&bytes) {
            return Err(MemoryError::OutOfRange {
                asked: bytes,
                least: self.ram,
                most: self.most,
            });
        }
        let wanted = (bytes - self.ram).next_multiple_of(BLOCK);
        self.open(vm, wanted.next_multiple_of(self.place.unit))?;
        self.target.set(wanted, self.open);
        Ok(())
    }

    /// Opens the range up to `end`, as far as it is not.
    fn open(&mut self, vm: &VmFd, end: u64) -> Result<(), MemoryError> {
        if end <= self.open {
            return Ok(());
        }
        let file = self.region.file_offset().map(FileOffset::file);
        let file = file.expect("the region was made of a file");
        file.set_len(end)
            .map_err(|error| MemoryError::File(end, error))?;
        memory::add_slot(vm, self.next_slot, &self.region, self.open..end)?;
        self.next_slot += 1;
        self.open = end;
        Ok(())
    }

    /// The bytes of memory that the guest has now, when they are at least what [`Self::resize`] asked for; told once.
    pub fn reached(&self) -> Option<u64> {
        self.target.reached().map(|plugged| self.ram + plugged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryRegion;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_vm_that_has_all_it_may_have_does_not_grow() {
        let ram = memory::create(64 * MIB).unwrap();
        for most in [0, 32 * MIB, 64 * MIB] {
            assert!(Growth::reserve(&ram, most).unwrap().is_none());
        }
    }

    #[test]
    fn nothing_is_behind_the_region_before_the_vm_grows() {
        let ram = memory::create(64 * MIB).unwrap();
        let (growth, memory, _) = Growth::reserve(&ram, 1 << 40).unwrap().unwrap();
        assert_eq!(memory.num_regions(), ram.num_regions() + 1);
        assert_eq!(growth.region.len(), growth.place.size);
        assert!(growth.place.size >= (1 << 40) - 64 * MIB);
        let file = growth.region.file_offset().unwrap().file();
        assert_eq!(file.metadata().unwrap().len(), 0);
        // Whoever writes there by address gets an error, and no memory.
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let slice = growth.region.as_volatile_slice().unwrap();
        let mut head = slice.subslice(0, 4096).unwrap();
        assert!(vm_memory::ReadVolatile::read_volatile(&mut &zero, &mut head).is_err());
    }
}
