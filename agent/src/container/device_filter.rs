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
#![allow(unsafe_code, reason = "bpf(2) has no wrapper")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
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
    old: Option<&OwnedFd>,
) -> Result<OwnedFd, Failure> {
    let all: Vec<Rule> = rules.iter().chain(&ALWAYS_ALLOWED).copied().collect();
    let program = load(&assemble(&all)).map_err(at("load the device rules"))?;
    attach(cgroup, &program, old).map_err(at("attach the device rules"))?;
    Ok(program)
}

/// `struct bpf_insn`: code, registers (source << 4 | destination), offset, immediate.
type Instruction = (u8, u8, i16, i32);

// linux/bpf_common.h and linux/bpf.h: class | source | operation
const LOAD_WORD: u8 = 0x61;
const MOVE_IMMEDIATE: u8 = 0xb7;
const MOVE: u8 = 0xbf;
const AND_IMMEDIATE: u8 = 0x57;
const SHIFT_RIGHT_IMMEDIATE: u8 = 0x77;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
/// Jump if destination & immediate is not 0.
const JUMP_SET: u8 = 0x45;
const EXIT: u8 = 0x95;

fn assemble(rules: &[Rule]) -> Vec<Instruction> {
    let mut code = vec![
        // access_type: the kind in the lower half, the accesses in the upper
        (LOAD_WORD, 0x12, 0, 0),
        (MOVE, 0x23, 0, 0),
        (AND_IMMEDIATE, 0x02, 0, 0xffff),
        (SHIFT_RIGHT_IMMEDIATE, 0x03, 0, 16),
        (LOAD_WORD, 0x14, 4, 0),
        (LOAD_WORD, 0x15, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let decision = decision(rule);
        let tests: Vec<(u8, u32)> = [
            rule.kind.map(|kind| (2, kind as u32)),
            rule.major.map(|major| (4, major)),
            rule.minor.map(|minor| (5, minor)),
        ]
        .into_iter()
        .flatten()
        .collect();
        for (i, (register, value)) in tests.iter().enumerate() {
            let rest = tests.len() - i - 1 + decision.len();
            let rest = i16::try_from(rest).expect("a rule is at most seven instructions");
            code.push((JUMP_NOT_EQUAL, *register, rest, value.cast_signed()));
        }
        code.extend(decision);
    }
    code.extend(give(0));
    code
}

fn give(value: i32) -> [Instruction; 2] {
    [(MOVE_IMMEDIATE, 0, 0, value), (EXIT, 0, 0, 0)]
}

fn decision(rule: &Rule) -> Vec<Instruction> {
    let access = i32::from(rule.access);
    let mut code = if rule.allow {
        vec![
            (AND_IMMEDIATE, 0x03, 0, !access),
            (JUMP_EQUAL, 0x03, 1, 0),
            SKIP,
        ]
    } else {
        vec![(JUMP_SET, 0x03, 1, access), SKIP]
    };
    code.extend(give(i32::from(rule.allow)));
    code
}

/// Over the `return` that ends a decision.
const SKIP: Instruction = (0x05, 0, 2, 0);

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;

/// The part of `union bpf_attr` for `BPF_PROG_LOAD` that matters here; the kernel takes the rest as 0.
#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

/// `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

fn bpf<T>(command: libc::c_int, attr: &T) -> nix::Result<libc::c_int> {
    // SAFETY: `attr` is the union's beginning, of the size given, and what it points to is alive.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        )
    };
    Errno::result(result).map(|fd| libc::c_int::try_from(fd).unwrap_or_default())
}

fn load(code: &[Instruction]) -> nix::Result<OwnedFd> {
    let bytes: Vec<u8> = code
        .iter()
        .flat_map(|(operation, registers, offset, immediate)| {
            let mut bytes = [*operation, *registers, 0, 0, 0, 0, 0, 0];
            bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
            bytes[4..].copy_from_slice(&immediate.to_ne_bytes());
            bytes
        })
        .collect();
    let attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(code.len()).unwrap_or(u32::MAX),
        insns: bytes.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
    };
    let fd = bpf(BPF_PROG_LOAD, &attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach(cgroup: BorrowedFd<'_>, program: &OwnedFd, old: Option<&OwnedFd>) -> nix::Result<()> {
    let number = |fd: libc::c_int| fd.cast_unsigned();
    let attr = AttachAttr {
        target_fd: number(cgroup.as_raw_fd()),
        attach_bpf_fd: number(program.as_raw_fd()),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI | if old.is_some() { BPF_F_REPLACE } else { 0 },
        replace_bpf_fd: old.map_or(0, |fd| number(fd.as_raw_fd())),
    };
    bpf(BPF_PROG_ATTACH, &attr).map(|_| ())
}

#[cfg(test)]
mod tests;
