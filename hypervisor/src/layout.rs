//! The guest's physical address space and interrupt lines, in address order.
//!
//! ```text
//! 0x0000_6000  PVH start info, then the module list          ┐
//! 0x0000_7000  PVH memory map                                │ RAM, "low memory"
//! 0x0002_0000  kernel command line                           ┘
//! 0x0009_fc00  hole: what a PC has for EBDA, VGA and BIOS. The MP table lies in it at 0xf_0000.
//! 0x0010_0000  RAM: kernel at 16 MiB, initrd at the end
//! 0xc000_0000  device gap: virtio-mmio registers at its start, IOAPIC, LAPIC and KVM's own pages near its end
//! 0x1_0000_0000 RAM beyond 3 GiB
//! after RAM      memory that is plugged while the VM runs, where there is any, from a multiple of 2 GiB
//! ```

use vm_memory::GuestAddress;

/// `hvm_start_info` of PVH.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// The one entry of the PVH module list (the initrd).
pub const MODULE_LIST: GuestAddress = GuestAddress(0x6040);
/// The PVH memory map.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// Kernel command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line without its NUL: `COMMAND_LINE_SIZE` of Linux on x86 is 2048.
pub const COMMAND_LINE_MAX: usize = 2047;
/// End of low memory: a PC has its extended BIOS data area here.
pub const LOW_MEMORY_END: GuestAddress = GuestAddress(0x9_fc00);
/// MP floating pointer and MP table. Linux searches the 64 KiB from here; 255 CPUs need 6 KiB.
pub const MP_TABLE: GuestAddress = GuestAddress(0xf_0000);
/// RAM the kernel may use freely starts again here.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// End of RAM below the device gap.
pub const GAP_START: GuestAddress = GuestAddress(0xc000_0000);
/// Registers of the first virtio-mmio device; the others follow.
pub const VIRTIO_MMIO: GuestAddress = GAP_START;
/// Register window of one virtio-mmio device.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// I/O APIC, where every PC has it and KVM puts it.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC, likewise.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel needs for real mode.
pub const KVM_TSS: usize = 0xfffb_d000;
/// RAM goes on here, beyond the device gap.
pub const GAP_END: GuestAddress = GuestAddress(0x1_0000_0000);

/// Interrupt line of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// First interrupt line of virtio devices; 0 to 4 belong to timer, keyboard, cascade and serial ports.
pub const FIRST_VIRTIO_GSI: u32 = 5;
/// Last pin of KVM's I/O APIC.
pub const LAST_GSI: u32 = 23;

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Registers of a serial port.
pub const SERIAL_PORT_COUNT: u16 = 8;
/// Command register of the keyboard controller, which on a PC also resets the CPU.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Data register of the keyboard controller.
pub const I8042_DATA_PORT: u16 = 0x60;

/// RAM ranges for `size` bytes of guest memory.
pub fn ram(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(GAP_START.0);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GAP_END, size - low));
    }
    ranges
}

/// Linux adds memory in pieces of this size, aligned to it, while the RAM it boots with ends below [`LARGE_RAM`].
const HOTPLUG_UNIT: u64 = 128 << 20;
/// From here on, in pieces of up to [`LARGE_HOTPLUG_UNIT`] (`probe_memory_block_size` of Linux on x86).
const LARGE_RAM: u64 = 64 << 30;
const LARGE_HOTPLUG_UNIT: u64 = 2 << 30;

/// Addresses for memory that is plugged while the VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hotplug {
    pub start: GuestAddress,
    /// A multiple of `unit`.
    pub size: u64,
    /// Linux can use only whole pieces of this size.
    pub unit: u64,
}

/// Where a VM with `ram` bytes gets the rest of `most`; None where there is no rest.
pub fn hotplug(ram: u64, most: u64) -> Option<Hotplug> {
    let rest = most.checked_sub(ram).filter(|rest| *rest > 0)?;
    let end = self::ram(ram)
        .last()
        .map_or(0, |(start, size)| start.0 + size);
    let unit = if end < LARGE_RAM {
        HOTPLUG_UNIT
    } else {
        LARGE_HOTPLUG_UNIT
    };
    let start = end.max(GAP_END.0).next_multiple_of(LARGE_HOTPLUG_UNIT);
    Some(Hotplug {
        start: GuestAddress(start),
        size: rest.next_multiple_of(unit),
        unit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_round_the_gap() {
        assert_eq!(ram(256 << 20), [(GuestAddress(0), 256 << 20)]);
        assert_eq!(ram(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ram(5 << 30),
            [(GuestAddress(0), 3 << 30), (GAP_END, 2 << 30)]
        );
    }

    #[test]
    fn plugged_memory_lies_behind_ram_in_whole_pieces() {
        let place = |ram, most| {
            hotplug(ram, most).map(|hotplug| (hotplug.start.0, hotplug.size, hotplug.unit))
        };
        let mib = |count: u64| count << 20;
        assert_eq!(place(mib(256), mib(256)), None);
        assert_eq!(place(mib(256), mib(128)), None);
        assert_eq!(
            place(mib(256), mib(300)),
            Some((4 << 30, mib(128), mib(128)))
        );
        assert_eq!(
            place(mib(3500), mib(4096)),
            Some((6 << 30, mib(640), mib(128)))
        );
        assert_eq!(
            place(64 << 30, 65 << 30),
            Some((66 << 30, 2 << 30, 2 << 30))
        );
    }
}
