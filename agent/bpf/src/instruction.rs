//! The instructions (Documentation/bpf/standardization/instruction-set.rst), as far as they are needed.
//!
//! One is `struct bpf_insn`: eight bytes with the operation, source and destination register, an offset and an immediate value. The load of
//! a map's address takes the place of two. Jumps count such places, from the next instruction on.

use std::os::fd::RawFd;

/// R0 is what calls and the program return, R1 to R5 are arguments and lost in a call, R6 to R9 are kept, and R10 is the frame
/// pointer, below which the stack is. A program begins with its context in R1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
}

/// Functions of the kernel (`BPF_FUNC_*` in linux/bpf.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Helper {
    /// `r0 = map r1 [*r2]`; 0 if there is nothing.
    MapLookupElem = 1,
    /// Gives a socket back that a lookup gave.
    SkRelease = 86,
    /// Chooses the socket r2 for the lookup r1, with flags in r3.
    SkAssign = 124,
}

/// An instruction; its doc line says in C what it does, with its fields in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// `to = *(u8 *)(from + offset)`
    LoadByte(Register, Register, i16),
    /// `to = *(u32 *)(from + offset)`
    LoadWord(Register, Register, i16),
    /// `*(u32 *)(to + offset) = value`
    StoreWord(Register, i16, i32),
    /// `to = the map with this descriptor`
    LoadMap(Register, RawFd),
    /// `to = from`
    Move(Register, Register),
    /// `to = value`
    Set(Register, i32),
    /// `to += value`
    Add(Register, i32),
    /// `to &= value`, which is extended with its sign.
    And(Register, i32),
    /// `to >>= bits`
    ShiftRight(Register, i32),
    /// `goto over`
    Jump(i16),
    /// `if (register == value) goto over`
    JumpIfEqual(Register, i32, i16),
    /// `if (register != value) goto over`
    JumpIfNotEqual(Register, i32, i16),
    /// `if (register & value) goto over`
    JumpIfSet(Register, i32, i16),
    /// `r0 = helper(r1, r2, r3, r4, r5)`
    Call(Helper),
    /// `return r0`
    Exit,
}

/// Source register that marks the value of a [`Instruction::LoadMap`] as a descriptor (`BPF_PSEUDO_MAP_FD`).
const MAP_BY_FD: u8 = 1;

/// How far a jump over these instructions goes.
///
/// # Panics
/// If a jump can't go as far, which is 32,767 places.
pub fn slots(code: &[Instruction]) -> i16 {
    let slots: usize = code.iter().map(Instruction::slots).sum();
    i16::try_from(slots).expect("programs are short")
}

impl Instruction {
    fn slots(&self) -> usize {
        match self {
            Self::LoadMap(..) => 2,
            _ => 1,
        }
    }

    /// As the kernel has it in memory.
    pub(crate) fn encode(self, bytes: &mut Vec<u8>) {
        // Operations: class | source of the operand or size | operation or mode
        let (operation, to, from, offset, value) = match self {
            Self::LoadByte(to, from, offset) => (0x71, to as u8, from as u8, offset, 0),
            Self::LoadWord(to, from, offset) => (0x61, to as u8, from as u8, offset, 0),
            Self::StoreWord(to, offset, value) => (0x62, to as u8, 0, offset, value),
            Self::LoadMap(to, map) => (0x18, to as u8, MAP_BY_FD, 0, map),
            Self::Move(to, from) => (0xbf, to as u8, from as u8, 0, 0),
            Self::Set(to, value) => (0xb7, to as u8, 0, 0, value),
            Self::Add(to, value) => (0x07, to as u8, 0, 0, value),
            Self::And(to, value) => (0x57, to as u8, 0, 0, value),
            Self::ShiftRight(to, bits) => (0x77, to as u8, 0, 0, bits),
            Self::Jump(over) => (0x05, 0, 0, over, 0),
            Self::JumpIfEqual(register, value, over) => (0x15, register as u8, 0, over, value),
            Self::JumpIfNotEqual(register, value, over) => (0x55, register as u8, 0, over, value),
            Self::JumpIfSet(register, value, over) => (0x45, register as u8, 0, over, value),
            Self::Call(helper) => (0x85, 0, 0, 0, helper as i32),
            Self::Exit => (0x95, 0, 0, 0, 0),
        };
        bytes.extend([operation, (from << 4) | to]);
        bytes.extend(offset.to_ne_bytes());
        bytes.extend(value.to_ne_bytes());
        // The second place of two is the upper half of a 64-bit value.
        bytes.resize(bytes.len() + (self.slots() - 1) * 8, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Instruction::{Call, JumpIfNotEqual, LoadMap, LoadWord, Move, StoreWord};
    use super::Register::{R1, R2, R6, R10};
    use super::*;

    fn encoded(instruction: Instruction) -> Vec<u8> {
        let mut bytes = Vec::new();
        instruction.encode(&mut bytes);
        bytes
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn instructions_are_the_kernels_bytes() {
        // As `llvm-objdump --disassemble` of clang's output shows them.
        let cases: [(Instruction, &[u8]); 6] = [
            (Move(R6, R1), &[0xbf, 0x16, 0, 0, 0, 0, 0, 0]),
            (LoadWord(R2, R6, 12), &[0x61, 0x62, 12, 0, 0, 0, 0, 0]),
            (
                JumpIfNotEqual(R2, -2, 258),
                &[0x55, 2, 2, 1, 0xfe, 0xff, 0xff, 0xff],
            ),
            (StoreWord(R10, -4, 1), &[0x62, 0x0a, 0xfc, 0xff, 1, 0, 0, 0]),
            (Call(Helper::SkAssign), &[0x85, 0, 0, 0, 124, 0, 0, 0]),
            (
                LoadMap(R1, 9),
                &[0x18, 0x11, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ),
        ];
        for (instruction, bytes) in cases {
            assert_eq!(encoded(instruction), bytes, "{instruction:?}");
        }
    }

    #[test]
    fn a_jump_counts_the_load_of_a_map_twice() {
        assert_eq!(slots(&[Move(R6, R1), LoadMap(R1, 3)]), 3);
    }
}
