//! bpf(2): its commands, each with the part of `union bpf_attr` that matters here. The kernel takes the rest of the union as 0.
#![allow(unsafe_code, reason = "bpf(2) has no wrapper")]

use crate::instruction::{Instruction, Register};
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

// Commands.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_LINK_CREATE: libc::c_int = 28;

const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
/// Beside programs that others attach to the cgroup.
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;
/// Length of a program's name with the zero behind it.
const BPF_OBJ_NAME_LEN: usize = 16;

/// What a program is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// May the process use or make this device? 1 allows, 0 gives EPERM.
    CgroupDevice,
    /// Which socket gets this connection? 1 goes on with the socket that the program chose, or as ever if it chose none.
    SocketLookup,
}

impl Kind {
    /// `BPF_PROG_TYPE_*`
    fn program_type(self) -> u32 {
        match self {
            Self::CgroupDevice => 15,
            Self::SocketLookup => 30,
        }
    }

    /// `enum bpf_attach_type`
    fn attach_type(self) -> u32 {
        match self {
            Self::CgroupDevice => 6,
            Self::SocketLookup => 36,
        }
    }
}

/// A program in the kernel. It lives on where it is attached.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    kind: Kind,
}

/// A program's hold on a network namespace, which ends when this is dropped.
#[derive(Debug)]
pub struct Link {
    _fd: OwnedFd,
}

impl Program {
    /// Gives the program to the verifier. `name` is for `bpftool`, of at most 15 letters, digits and underscores.
    pub fn load(kind: Kind, name: &str, code: &[Instruction]) -> nix::Result<Self> {
        let mut bytes = Vec::new();
        for instruction in code {
            instruction.encode(&mut bytes);
        }
        let mut prog_name = [0; BPF_OBJ_NAME_LEN];
        for (to, from) in prog_name[..BPF_OBJ_NAME_LEN - 1]
            .iter_mut()
            .zip(name.bytes())
        {
            *to = from;
        }
        let attr = LoadAttr {
            prog_type: kind.program_type(),
            insn_cnt: u32::try_from(bytes.len() / 8).map_err(|_| Errno::E2BIG)?,
            insns: bytes.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log_buf: 0,
            kern_version: 0,
            prog_flags: 0,
            prog_name,
            prog_ifindex: 0,
            expected_attach_type: kind.attach_type(),
        };
        let fd = bpf_fd(BPF_PROG_LOAD, &attr)?;
        Ok(Self { fd, kind })
    }

    /// Has the cgroup ask it, in the place of `old` if that is attached.
    pub fn attach_to_cgroup(&self, cgroup: BorrowedFd<'_>, old: Option<&Self>) -> nix::Result<()> {
        let attr = AttachAttr {
            target_fd: number(cgroup),
            attach_bpf_fd: number(self.fd.as_fd()),
            attach_type: self.kind.attach_type(),
            attach_flags: BPF_F_ALLOW_MULTI | if old.is_some() { BPF_F_REPLACE } else { 0 },
            replace_bpf_fd: old.map_or(0, |old| number(old.fd.as_fd())),
        };
        bpf(BPF_PROG_ATTACH, &attr).map(drop)
    }

    /// Has the network namespace ask it.
    pub fn link_to_netns(&self, netns: BorrowedFd<'_>) -> nix::Result<Link> {
        let attr = LinkAttr {
            prog_fd: number(self.fd.as_fd()),
            target_fd: number(netns),
            attach_type: self.kind.attach_type(),
            flags: 0,
        };
        let fd = bpf_fd(BPF_LINK_CREATE, &attr)?;
        Ok(Link { _fd: fd })
    }
}

/// An array of sockets that a program can choose from.
#[derive(Debug)]
pub struct SocketMap {
    fd: OwnedFd,
}

impl SocketMap {
    pub fn new(entries: u32) -> nix::Result<Self> {
        let attr = MapAttr {
            map_type: BPF_MAP_TYPE_SOCKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: entries,
        };
        let fd = bpf_fd(BPF_MAP_CREATE, &attr)?;
        Ok(Self { fd })
    }

    pub fn put(&self, key: u32, socket: BorrowedFd<'_>) -> nix::Result<()> {
        let value = number(socket);
        let attr = UpdateAttr {
            map_fd: number(self.fd.as_fd()),
            _padding: 0,
            key: std::ptr::from_ref(&key) as u64,
            value: std::ptr::from_ref(&value) as u64,
            flags: 0,
        };
        bpf(BPF_MAP_UPDATE_ELEM, &attr).map(drop)
    }

    /// The instruction that has it in a register. A program that was loaded with it keeps the map alive.
    pub fn load_into(&self, register: Register) -> Instruction {
        Instruction::LoadMap(register, self.fd.as_raw_fd())
    }
}

#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; BPF_OBJ_NAME_LEN],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

#[repr(C)]
struct LinkAttr {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct UpdateAttr {
    map_fd: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
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
    Errno::result(result).map(|value| libc::c_int::try_from(value).unwrap_or_default())
}

/// For the commands that make a descriptor.
fn bpf_fd<T>(command: libc::c_int, attr: &T) -> nix::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}
