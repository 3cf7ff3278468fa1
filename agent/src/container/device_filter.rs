//! Device rules of a cgroup, which in v2 are an eBPF program of type `BPF_PROG_TYPE_CGROUP_DEVICE`.
//!
//! The kernel calls the program for every open and mknod of a device with `struct bpf_cgroup_dev_ctx`; 1 allows and 0
//! gives EPERM. The rules come in the order of the spec, a later one wins over an earlier one, and what no rule
//! names is denied. The program therefore looks at the last rule first and keeps the set of accesses nobody has decided on:
//!
//! ```text
//! r2 = kind (1 block, 2 char)   r3 = accesses asked for (1 mknod, 2 read, 4 write)   r4 = major   r5 = minor
//! for each rule, the last first:
//!     if kind, major or minor differ: next rule
//!     allow:  r3 &= ~accesses;  if r3 == 0: return 1
//!     deny:   if r3 & accesses: return 0
//! return 0
//! ```

use std::os::fd::BorrowedFd;

use coffer_bpf::Instruction::{
    And, Exit, Jump, JumpIfEqual, JumpIfNotEqual, JumpIfSet, LoadWord, Move, Set, ShiftRight,
};
use coffer_bpf::Register::{R0, R1, R2, R3, R4, R5};
use coffer_bpf::{Instruction, Program, slots};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::failure::{Failure, at};

/// Which devices a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    /// `None` is both.
    kind: Option<Kind>,
    /// `None` is any number.
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

/// `BPF_DEVCG_DEV_*`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block = 1,
    Char = 2,
}

// BPF_DEVCG_ACC_*
const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;

const fn char_device(major: u32, minor: Option<u32>) -> Rule {
    let access = MKNOD | READ | WRITE;
    Rule {
        allow: true,
        kind: Some(Kind::Char),
        major: Some(major),
        minor,
        access,
    }
}

/// What every container may use, as with other runtimes: making nodes (the file system decides about using them), the
/// default devices, and pseudo-terminals.
const ALWAYS_ALLOWED: [Rule; 10] = [
    Rule {
        allow: true,
        kind: None,
        major: None,
        minor: None,
        access: MKNOD,
    },
    char_device(1, Some(3)), // null
    char_device(1, Some(5)), // zero
    char_device(1, Some(7)), // full
    char_device(1, Some(8)), // random
    char_device(1, Some(9)), // urandom
    char_device(5, Some(0)), // tty
    char_device(5, Some(1)), // console
    char_device(5, Some(2)), // ptmx
    char_device(136, None),  // pts
];

/// The rule of the spec, or what is wrong with it.
pub fn rule(spec: &LinuxDeviceCgroup) -> Result<Rule, &'static str> {
    let kind = match spec.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(Kind::Block),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(Kind::Char),
        Some(LinuxDeviceType::P) => return Err("a fifo is no device"),
    };
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| "a number is out of range"),
    };
    let mut access = 0;
    for letter in spec.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => return Err("access is made of r, w and m"),
        };
    }
    Ok(Rule {
        allow: spec.allow(),
        kind,
        major: number(spec.major())?,
        minor: number(spec.minor())?,
        access,
    })
}

/// Loads the program for these rules and attaches it. `old` is the program it replaces.
pub fn install(
    cgroup: BorrowedFd<'_>,
    rules: &[Rule],
    old: Option<&Program>,
) -> Result<Program, Failure> {
    let all: Vec<Rule> = rules.iter().chain(&ALWAYS_ALLOWED).copied().collect();
    let program = Program::load(coffer_bpf::Kind::CgroupDevice, NAME, &assemble(&all))
        .map_err(at("load the device rules"))?;
    program
        .attach_to_cgroup(cgroup, old)
        .map_err(at("attach the device rules"))?;
    Ok(program)
}

/// What `bpftool prog` calls it.
const NAME: &str = "coffer_devices";

// Offsets in `struct bpf_cgroup_dev_ctx`
const ACCESS_TYPE: i16 = 0;
const MAJOR: i16 = 4;
const MINOR: i16 = 8;

fn assemble(rules: &[Rule]) -> Vec<Instruction> {
    let mut code = vec![
        // The kind in the lower half, the accesses in the upper.
        LoadWord(R2, R1, ACCESS_TYPE),
        Move(R3, R2),
        And(R2, 0xffff),
        ShiftRight(R3, 16),
        LoadWord(R4, R1, MAJOR),
        LoadWord(R5, R1, MINOR),
    ];
    for rule in rules.iter().rev() {
        let mut step = decision(rule);
        // In front of the decision, the last test first: whoever fails one goes over all that is behind it.
        let tests = [
            (R5, rule.minor),
            (R4, rule.major),
            (R2, rule.kind.map(|kind| kind as u32)),
        ];
        for (register, value) in tests {
            let Some(value) = value else { continue };
            step.insert(
                0,
                JumpIfNotEqual(register, value.cast_signed(), slots(&step)),
            );
        }
        code.extend(step);
    }
    code.extend(give(0));
    code
}

fn give(value: i32) -> [Instruction; 2] {
    [Set(R0, value), Exit]
}

fn decision(rule: &Rule) -> Vec<Instruction> {
    let access = i32::from(rule.access);
    let give = give(i32::from(rule.allow));
    let over = Jump(slots(&give));
    let mut code = if rule.allow {
        vec![And(R3, !access), JumpIfEqual(R3, 0, slots(&[over])), over]
    } else {
        vec![JumpIfSet(R3, access, slots(&[over])), over]
    };
    code.extend(give);
    code
}

#[cfg(test)]
mod tests;
