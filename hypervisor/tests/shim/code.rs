//! Kernels of a few instructions, as bytes.

use coffer_proto::limits::BOOT_TIMER_PORT;

/// `mov eax, value; mov edx, BOOT_TIMER_PORT; out dx, eax`
pub fn phase(value: u32) -> Vec<u8> {
    [&[0xb8][..], &value.to_le_bytes(), &out_eax()].concat()
}

pub fn out_eax() -> Vec<u8> {
    [
        &[0xba][..],
        &u32::from(BOOT_TIMER_PORT).to_le_bytes(),
        &[0xef],
    ]
    .concat()
}

/// `mov eax, [address]`
pub fn load(address: u32) -> Vec<u8> {
    [&[0xa1][..], &address.to_le_bytes()].concat()
}

/// `mov dword [address], value`
pub fn store(address: u32, value: u32) -> Vec<u8> {
    [
        &[0xc7, 0x05][..],
        &address.to_le_bytes(),
        &value.to_le_bytes(),
    ]
    .concat()
}

/// `mov al, 0xfe; out 0x64, al`: the i8042 reset pulse.
pub const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];
/// `jmp $`
pub const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `hlt; jmp $-1`, interrupts off.
pub const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];
/// `out 0x80, al; jmp $-2`: a port nobody answers, for ever.
pub const KNOCK: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];

/// `mov byte [address], value`
pub fn store_byte(address: u32, value: u8) -> Vec<u8> {
    [&[0xc6, 0x05][..], &address.to_le_bytes(), &[value]].concat()
}

/// `jmp` back over this code, behind it.
pub fn again(code: &[u8]) -> Vec<u8> {
    const JUMP: usize = 5;
    let distance = -((code.len() + JUMP) as i32);
    [code, &[0xe9], &distance.to_le_bytes()].concat()
}

/// The registers of a device of the machine, by its place in the order of their addresses.
pub fn registers(device: u32) -> u32 {
    0xc000_0000 + device * 0x1000
}

/// Brings a device up with queues of eight entries, which are empty.
pub fn bring_up(device: u32, queues: u32) -> Vec<u8> {
    let set = |register, value| store(registers(device) + register, value);
    let mut code = [
        set(0x70, 1),
        set(0x70, 3),
        set(0x24, 1),
        set(0x20, 1),
        set(0x70, 11),
    ]
    .concat();
    for queue in 0..queues {
        let rings = 0x80_0000 + device * 0x1_0000 + queue * 0x4000;
        code.extend([set(0x30, queue), set(0x38, 8)].concat());
        for (register, at) in [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)] {
            code.extend(set(register, rings + at));
        }
        code.extend(set(0x44, 1));
    }
    code.extend(set(0x70, 15));
    code
}

pub fn program(parts: &[&[u8]]) -> Vec<u8> {
    elf(&parts.concat())
}

/// Console, rng, vsock and balloon, kicked without a pause: by the way that KVM takes, and by one that ends in the VMM.
pub fn storm() -> Vec<u8> {
    const NOTIFY: u32 = 0x50;
    let devices = [(0, 2), (1, 1), (2, 3), (3, 3)];
    let up: Vec<u8> = devices
        .map(|(device, queues)| bring_up(device, queues))
        .concat();
    let mut kicks = Vec::new();
    for (device, queues) in devices {
        for queue in 0..queues {
            kicks.extend(store(registers(device) + NOTIFY, queue));
            kicks.extend(store_byte(registers(device) + NOTIFY, queue as u8));
        }
    }
    program(&[&up, &phase(1), &again(&kicks)])
}

/// A vmlinux whose PVH entry point, at 2 MiB, is this 32-bit code.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const ENTRY: u32 = 0x20_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    // Name size, descriptor size, type 18 (XEN_ELFNOTE_PHYS32_ENTRY), name, descriptor.
    let note: Vec<u8> = [4, 4, 18]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .chain(*b"Xen\0")
        .chain(ENTRY.to_le_bytes())
        .collect();
    let mut elf: Vec<u8> = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2u16, 62].into_iter().flat_map(u16::to_le_bytes));
    elf.extend(1u32.to_le_bytes());
    elf.extend(
        [u64::from(ENTRY), 64, 0]
            .into_iter()
            .flat_map(u64::to_le_bytes),
    );
    elf.extend(0u32.to_le_bytes());
    elf.extend(
        [64u16, 56, 2, 0, 0, 0]
            .into_iter()
            .flat_map(u16::to_le_bytes),
    );
    let mut segment = |kind: u32, offset: u64, address: u64, size: u64| {
        elf.extend([kind, 5].into_iter().flat_map(u32::to_le_bytes));
        elf.extend(
            [offset, address, address, size, size, 4]
                .into_iter()
                .flat_map(u64::to_le_bytes),
        );
    };
    segment(4, HEADERS, 0, note.len() as u64);
    segment(
        1,
        HEADERS + note.len() as u64,
        u64::from(ENTRY),
        code.len() as u64,
    );
    elf.extend(note);
    elf.extend(code);
    elf
}
