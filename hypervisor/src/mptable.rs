//! The MP table (Intel MultiProcessor Specification 1.4): how the guest learns of its CPUs, the I/O APIC and the
//! interrupt lines, in a machine without ACPI.
//!
//! A floating pointer, which Linux finds by its `_MP_` mark, then the table: a header and one entry for each CPU, the
//! bus, the I/O APIC, and each interrupt line. Every line is "ISA": edge triggered, active high, as irqfd drives it.

use crate::layout::{IO_APIC, LAST_GSI, LOCAL_APIC, MP_TABLE};
use crate::virtio::Memory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

const FLOATING_POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;
/// Version of the local APICs: integrated, as KVM emulates them.
const LOCAL_APIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL_INTERRUPT: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;

/// Writes the table for `vcpus` CPUs, whose APIC ids count from 0.
pub fn write(memory: &Memory, vcpus: u8) -> Result<(), GuestMemoryError> {
    let io_apic_id = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
        entries.extend([0, id, LOCAL_APIC_VERSION, flags]);
        // Signature and features of a CPU that has an APIC; Linux asks CPUID instead.
        entries.extend(0x600u32.to_le_bytes());
        entries.extend(0x201u32.to_le_bytes());
        entries.extend([0; 8]);
    }
    entries.extend([1, 0]);
    entries.extend(b"ISA   ");
    entries.extend([2, io_apic_id, LOCAL_APIC_VERSION, 1]);
    entries.extend(IO_APIC.to_le_bytes());
    for line in 0..=LAST_GSI as u8 {
        entries.extend([3, INTERRUPT, 0, 0, 0, line, io_apic_id, line]);
    }
    entries.extend([4, EXTERNAL_INTERRUPT, 0, 0, 0, 0, 0, 0]);
    entries.extend([4, NMI, 0, 0, 0, 0, ALL_LOCAL_APICS, 1]);
    let count = u16::from(vcpus) + 2 + LAST_GSI as u16 + 1 + 2;

    let mut table: Vec<u8> = b"PCMP".to_vec();
    table.extend(((HEADER_SIZE + entries.len()) as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"COFFER  ");
    table.extend(b"microVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(&entries);
    table[7] = checksum(&table);

    let mut pointer: Vec<u8> = b"_MP_".to_vec();
    pointer.extend((MP_TABLE.0 as u32 + FLOATING_POINTER_SIZE as u32).to_le_bytes());
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);

    memory.write_slice(&pointer, MP_TABLE)?;
    memory.write_slice(
        &table,
        GuestAddress(MP_TABLE.0 + FLOATING_POINTER_SIZE as u64),
    )
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_structures_add_up_to_zero_and_have_the_sizes_they_say() {
        let memory = crate::memory::create(2 << 20).unwrap();
        write(&memory, 64).unwrap();
        let mut bytes = vec![0; 8192];
        memory.read_slice(&mut bytes, MP_TABLE).unwrap();
        let sum = |range: &[u8]| range.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum(&bytes[..FLOATING_POINTER_SIZE]), 0);
        let table = &bytes[FLOATING_POINTER_SIZE..];
        let length = usize::from(u16::from_le_bytes([table[4], table[5]]));
        assert_eq!(sum(&table[..length]), 0);
        let count = usize::from(u16::from_le_bytes([table[34], table[35]]));
        assert_eq!(length, HEADER_SIZE + 64 * 20 + (count - 64) * 8);
        assert!(table[length..].iter().all(|byte| *byte == 0));
    }
}
