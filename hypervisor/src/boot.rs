//! Puts a Linux kernel and all it is told into guest memory, by the PVH boot protocol.
//!
//! PVH (Xen's "HVM direct boot"): the kernel is an ELF file with a note that names a 32-bit entry point. The boot CPU
//! starts there in protected mode without paging, with EBX pointing to `hvm_start_info`, which points to the memory
//! map, the command line and the modules (our one module is the initrd). No firmware, no real mode, no decompression.

use crate::layout::{
    COMMAND_LINE, COMMAND_LINE_MAX, GAP_START, HIGH_MEMORY, LOW_MEMORY_END, MEMORY_MAP,
    MODULE_LIST, START_INFO,
};
use crate::mptable;
use crate::virtio::Memory;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{Elf, KernelLoader};
use std::fs::File;
use std::io;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

/// Kernel parameters of every VM. `reboot=k` makes the end of the guest an i8042 pulse and `panic=-1` turns a panic
/// into that at once; the others keep the kernel from looking for hardware that a microVM does not have, and from making
/// a `dummy0` that nobody asked for.
pub const BASE_COMMAND_LINE: &str = "reboot=k panic=-1 nomodule acpi=off pci=off 8250.nr_uarts=0 i8042.noaux i8042.nomux \
     i8042.dumbkbd tsc=reliable no_timer_check random.trust_cpu=on dummy.numdummies=0 quiet console=hvc0";

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
const E820_RAM: u32 = 1;
const PAGE: u64 = 4096;

/// Why a kernel can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(
        "the kernel can't be loaded: it is no complete ELF vmlinux, or does not fit into guest memory"
    )]
    Kernel(#[source] linux_loader::loader::Error),
    #[error("the kernel has no PVH entry point: it was built without CONFIG_PVH")]
    NoPvh,
    #[error("the initrd can't be read")]
    Initrd(#[source] io::Error),
    #[error("the initrd is empty")]
    EmptyInitrd,
    #[error(
        "the initrd of {size} bytes does not fit into {memory} bytes of guest memory beside the kernel"
    )]
    LargeInitrd { size: u64, memory: u64 },
    #[error("the kernel command line has {0} bytes; Linux takes {COMMAND_LINE_MAX}")]
    LongCommandLine(usize),
    #[error(
        "the kernel command line holds a NUL byte or \" -- \", after which nothing reaches the kernel"
    )]
    BrokenCommandLine,
    #[error("boot data can't be written to guest memory")]
    Memory(#[from] GuestMemoryError),
    #[error("boot data can't be written to guest memory")]
    Parameters(#[from] linux_loader::configurator::Error),
}

/// Joins the base parameters, the devices' and the shim's, and checks the result.
pub fn command_line(devices: &[String], more: &str) -> Result<String, BootError> {
    let mut line = BASE_COMMAND_LINE.to_owned();
    for part in devices
        .iter()
        .map(String::as_str)
        .chain([more])
        .filter(|part| !part.is_empty())
    {
        line.push(' ');
        line.push_str(part);
    }
    if line.len() > COMMAND_LINE_MAX {
        return Err(BootError::LongCommandLine(line.len()));
    }
    if line.contains('\0') || line.split_ascii_whitespace().any(|word| word == "--") {
        return Err(BootError::BrokenCommandLine);
    }
    Ok(line)
}

/// Where a kernel was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// The PVH entry point.
    pub entry: GuestAddress,
    /// The kernel's image, from its first byte.
    pub kernel: (GuestAddress, u64),
    pub initrd: (GuestAddress, u64),
}

/// Loads everything.
pub fn load(
    memory: &Memory,
    mut kernel: File,
    mut initrd: File,
    command_line: &str,
    vcpus: u8,
) -> Result<Loaded, BootError> {
    let loaded =
        Elf::load(memory, None, &mut kernel, Some(HIGH_MEMORY)).map_err(BootError::Kernel)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvh);
    };
    let module = load_initrd(memory, &mut initrd, loaded.kernel_end)?;
    memory.write_slice(command_line.as_bytes(), COMMAND_LINE)?;
    memory.write_obj(
        0u8,
        GuestAddress(COMMAND_LINE.0 + command_line.len() as u64),
    )?;
    mptable::write(memory, vcpus)?;
    write_start_info(memory, module)?;
    let start = loaded.kernel_load.min(entry);
    Ok(Loaded {
        entry,
        kernel: (start, loaded.kernel_end - start.0),
        initrd: (GuestAddress(module.paddr), module.size),
    })
}

/// Places the initrd at the end of RAM below the device gap, page aligned.
fn load_initrd(
    memory: &Memory,
    initrd: &mut File,
    kernel_end: u64,
) -> Result<hvm_modlist_entry, BootError> {
    let size = initrd.metadata().map_err(BootError::Initrd)?.len();
    if size == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let low_end = memory
        .iter()
        .next()
        .map_or(0, |region| region.start_addr().0 + region.len())
        .min(GAP_START.0);
    let address = match low_end.checked_sub(size) {
        Some(start) if start / PAGE * PAGE >= kernel_end => start / PAGE * PAGE,
        _ => {
            return Err(BootError::LargeInitrd {
                size,
                memory: low_end,
            });
        }
    };
    memory
        .read_exact_volatile_from(GuestAddress(address), initrd, size as usize)
        .map_err(|error| BootError::Initrd(io::Error::other(error)))?;
    Ok(hvm_modlist_entry {
        paddr: address,
        size,
        ..Default::default()
    })
}

fn write_start_info(memory: &Memory, initrd: hvm_modlist_entry) -> Result<(), BootError> {
    let ram = |start: GuestAddress, end: u64| hvm_memmap_table_entry {
        addr: start.0,
        size: end - start.0,
        type_: E820_RAM,
        reserved: 0,
    };
    let mut map = vec![ram(GuestAddress(0), LOW_MEMORY_END.0)];
    for region in memory.iter() {
        let start = region.start_addr().max(HIGH_MEMORY);
        map.push(ram(start, region.start_addr().0 + region.len()));
    }
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        nr_modules: 1,
        modlist_paddr: MODULE_LIST.0,
        cmdline_paddr: COMMAND_LINE.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut parameters = BootParams::new(&info, START_INFO);
    parameters.set_sections(&map, MEMORY_MAP);
    parameters.set_modules(&[initrd], MODULE_LIST);
    PvhBootConfigurator::write_bootparams(&parameters, memory)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_base_then_devices_then_the_shims() {
        let devices = ["virtio_mmio.device=4K@0xc0000000:5".to_owned()];
        let line = command_line(&devices, "coffer.debug=1").unwrap();
        assert!(line.starts_with(BASE_COMMAND_LINE));
        assert!(line.ends_with(" virtio_mmio.device=4K@0xc0000000:5 coffer.debug=1"));
        assert_eq!(command_line(&[], "").unwrap(), BASE_COMMAND_LINE);
    }

    #[test]
    fn parameters_that_would_not_reach_the_kernel_are_refused() {
        let room = COMMAND_LINE_MAX - BASE_COMMAND_LINE.len() - 1;
        assert_eq!(
            command_line(&[], &"x".repeat(room)).unwrap().len(),
            COMMAND_LINE_MAX
        );
        assert!(matches!(
            command_line(&[], &"x".repeat(room + 1)),
            Err(BootError::LongCommandLine(2048))
        ));
        for broken in ["-- init", "a --", "a\0b"] {
            assert!(
                matches!(command_line(&[], broken), Err(BootError::BrokenCommandLine)),
                "{broken:?}"
            );
        }
    }
}
