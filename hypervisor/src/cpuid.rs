//! What CPUID tells the guest: host → normalise → vCPU.
//!
//! We pass on what KVM supports and change only what depends on the VM: APIC ids and topology (one socket, every vCPU
//! a core without siblings), the hypervisor bit, the TSC deadline timer (KVM emulates it but does not list it), and
//! features that a guest must not use: performance counters, turbo reporting, and WAITPKG, which could sleep for long
//! without an exit. A template for mixed fleets would come between the first two steps.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

/// The host's part, the same for every vCPU.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut entries = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?
        .as_slice()
        .to_vec();
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in &mut entries {
        mask(entry, deadline_timer);
    }
    with_topology_levels(&mut entries);
    Ok(CpuId::from_entries(&entries)
        .expect("as many entries as KVM gave, or two more of at most 256"))
}

/// KVM lists no levels of the extended topology leaf; [`place`] needs both.
fn with_topology_levels(entries: &mut Vec<kvm_cpuid_entry2>) {
    let listed = entries.iter().any(|entry| entry.function == 0xb);
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    if listed {
        entries.extend((0..2).map(|index| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..Default::default()
        }));
    }
}

/// Sets what names the vCPU `id` of `count`.
pub fn for_vcpu(supported: &CpuId, id: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        place(entry, u32::from(id), u32::from(count));
    }
    cpuid
}

/// Features that are right or wrong for any VM.
fn mask(entry: &mut kvm_cpuid_entry2, deadline_timer: bool) {
    match entry.function {
        0x1 => {
            set(&mut entry.ecx, 31, true); // hypervisor present
            set(&mut entry.ecx, 24, deadline_timer);
            set(&mut entry.ecx, 15, false); // PDCM, goes with performance counters
            set(&mut entry.edx, 28, true); // the APIC id fields of EBX are valid
        }
        0x6 => {
            set(&mut entry.eax, 1, false); // turbo
            set(&mut entry.ecx, 3, false); // energy performance bias
        }
        0x7 if entry.index == 0 => set(&mut entry.ecx, 5, false), // WAITPKG
        // Performance counters of Intel, then of AMD.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => {
            for bit in [23, 24, 28] {
                set(&mut entry.ecx, bit, false);
            }
        }
        0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Topology: `count` cores, no siblings, one socket, APIC id = vCPU number.
fn place(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    // APIC id bits below the socket's.
    let core_bits = count.next_power_of_two().trailing_zeros();
    match entry.function {
        0x1 => entry.ebx = id << 24 | count.min(255) << 16 | entry.ebx & 0xffff,
        // Caches of Intel and AMD: level 3 is shared by the socket, the others by nobody. [31:26] of leaf 4: cores.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            let cores = if entry.function == 4 {
                ((1 << core_bits) - 1).min(0x3f)
            } else {
                0
            };
            entry.eax = cores << 26 | sharing << 14 | entry.eax & 0x3fff;
        }
        // Extended topology: index 0 is the sibling level, index 1 the core level.
        0xb => {
            entry.edx = id;
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, 1 << 8),
                1 => (core_bits, count, 2 << 8 | 1),
                level => (0, 0, level & 0xff),
            };
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | core_bits << 12 | (count - 1) & 0xff,
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, value: bool) {
    *register = *register & !(1 << bit) | u32::from(value) << bit;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let all = u32::MAX;
        kvm_cpuid_entry2 {
            function,
            index,
            eax: all,
            ebx: all,
            ecx: all,
            edx: all,
            ..Default::default()
        }
    }

    #[test]
    fn every_vcpu_is_a_core_of_its_own() {
        let table = CpuId::from_entries(&[
            entry(1, 0),
            entry(0xb, 0),
            entry(0xb, 1),
            entry(0x8000_001e, 0),
        ])
        .unwrap();
        let cpuid = for_vcpu(&table, 2, 3);
        let [one, sibling, core, amd] = cpuid.as_slice() else {
            panic!("four entries")
        };
        assert_eq!(one.ebx, 0x0203_ffff);
        assert_eq!((sibling.eax, sibling.ebx, sibling.edx), (0, 1, 2));
        assert_eq!((core.eax, core.ebx, core.edx), (2, 3, 2));
        assert_eq!(amd.eax, 2);
    }

    #[test]
    fn performance_counters_are_hidden() {
        let mut intel = entry(0xa, 0);
        mask(&mut intel, true);
        assert_eq!((intel.eax, intel.edx), (0, 0));
        let mut features = entry(1, 0);
        mask(&mut features, false);
        assert_eq!((features.ecx >> 31 & 1, features.ecx >> 24 & 1), (1, 0));
    }
}
