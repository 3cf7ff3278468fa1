//! Takes every TCP connection that is made to loopback in a network namespace.
//!
//! When a TCP connection comes in, the kernel looks for the socket that listens on its address. A BPF program of type
//! `BPF_PROG_TYPE_SK_LOOKUP`, attached to the namespace, is asked first (Linux 5.9, Documentation/bpf/prog_sk_lookup.rst).
//! Ours names our own listener for all addresses of loopback, whatever the port:
//!
//! ```text
//! if protocol is not TCP:                                   pass
//! IPv4: if local_ip4 is not in 127.0.0.0/8:                 pass    key = 0
//! IPv6: if local_ip6 is not ::1:                            pass    key = 1
//! if there is a socket listeners[key]: assign it, release it
//! pass: return SK_PASS
//! ```
//!
//! An accepted socket has the address that the client asked for, so `getsockname` tells where it wanted to go.
#![allow(unsafe_code, reason = "bpf(2) has no wrapper")]

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt,
};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Connections that wait for their turn, as many as the kernel's own default.
const BACKLOG: i32 = 128;

/// Why connections to loopback can't be taken.
#[derive(Debug, thiserror::Error)]
#[error("can't {action}")]
pub struct LookupError {
    action: &'static str,
    source: io::Error,
}

fn at<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> LookupError {
    move |error| LookupError {
        action,
        source: error.into(),
    }
}

/// The listeners of a namespace. When `link` is closed, the kernel looks for sockets as ever.
#[derive(Debug)]
pub(super) struct Taken {
    pub listeners: Vec<TcpListener>,
    pub link: OwnedFd,
}

/// Takes the connections to loopback in the calling thread's network namespace, which `netns` is.
pub(super) fn take_loopback(netns: BorrowedFd<'_>) -> Result<Taken, LookupError> {
    let map = create_map().map_err(at("make the map of listeners"))?;
    let mut listeners = Vec::new();
    for (key, address) in [
        (IPV4, (Ipv4Addr::LOCALHOST, 0).into()),
        (IPV6, (Ipv6Addr::LOCALHOST, 0).into()),
    ] {
        let listener = match listen_on(address) {
            // A kernel without IPv6 has no connections to take on it.
            Err(Errno::EAFNOSUPPORT) if key == IPV6 => continue,
            listener => listener.map_err(at("listen on loopback"))?,
        };
        put(&map, key, &listener).map_err(at("put a listener into the map"))?;
        listeners.push(listener.into());
    }
    let program = load(&assemble(map.as_raw_fd())).map_err(at("load the program"))?;
    let link = attach(netns, &program).map_err(at("attach the program"))?;
    Ok(Taken { listeners, link })
}

/// A listener on a port that the kernel picks; it gets connections to all ports by the program. Loopback may not be up
/// yet in a namespace that is wired later, hence IP_FREEBIND.
fn listen_on(address: SocketAddr) -> nix::Result<OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&listener, sockopt::IpFreebind, &true)?;
    bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// Keys of the map.
const IPV4: u32 = 0;
const IPV6: u32 = 1;

/// `struct bpf_insn`: code, registers (source << 4 | destination), offset, immediate.
type Instruction = (u8, u8, i16, i32);

// linux/bpf_common.h and linux/bpf.h: class | size or source | mode or operation
const LOAD_WORD: u8 = 0x61;
const LOAD_BYTE: u8 = 0x71;
const STORE_IMMEDIATE: u8 = 0x62;
const LOAD_MAP: u8 = 0x18;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const ADD_IMMEDIATE: u8 = 0x07;
const JUMP: u8 = 0x05;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// Source register that marks a `LOAD_MAP`'s immediate as a descriptor (`BPF_PSEUDO_MAP_FD`).
const MAP_BY_FD: u8 = 0x10;
// Helpers: BPF_FUNC_*
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

// Offsets in `struct bpf_sk_lookup`
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// An offset that stands for "to the end of the program, where it passes".
const PASS: i16 = i16::MAX;
/// Over the IPv4 part, to the part for IPv6; and from its end over that.
const TO_IPV6: i16 = 4;
const OVER_IPV6: i16 = 9;

/// The program. r6 keeps the context, r7 the socket, and the key is on the stack.
fn assemble(map: RawFd) -> Vec<Instruction> {
    let ipv6_word = |n: i16| (LOAD_WORD, 0x62, LOCAL_IP6 + 4 * n, 0);
    let last_of_localhost = 1_u32.to_be().cast_signed();
    let mut code = vec![
        (MOVE, 0x16, 0, 0),
        (LOAD_WORD, 0x62, PROTOCOL, 0),
        (JUMP_NOT_EQUAL, 0x02, PASS, libc::IPPROTO_TCP),
        (LOAD_WORD, 0x62, FAMILY, 0),
        (JUMP_NOT_EQUAL, 0x02, TO_IPV6, libc::AF_INET),
        // The address is in network order: its first byte comes first.
        (LOAD_BYTE, 0x62, LOCAL_IP4, 0),
        (JUMP_NOT_EQUAL, 0x02, PASS, 127),
        (STORE_IMMEDIATE, 0x0a, -4, IPV4.cast_signed()),
        (JUMP, 0, OVER_IPV6, 0),
        ipv6_word(0),
        (JUMP_NOT_EQUAL, 0x02, PASS, 0),
        ipv6_word(1),
        (JUMP_NOT_EQUAL, 0x02, PASS, 0),
        ipv6_word(2),
        (JUMP_NOT_EQUAL, 0x02, PASS, 0),
        ipv6_word(3),
        (JUMP_NOT_EQUAL, 0x02, PASS, last_of_localhost),
        (STORE_IMMEDIATE, 0x0a, -4, IPV6.cast_signed()),
        // r0 = listeners[key]
        (LOAD_MAP, MAP_BY_FD | 1, 0, map),
        (0, 0, 0, 0),
        (MOVE, 0xa2, 0, 0),
        (ADD_IMMEDIATE, 0x02, 0, -4),
        (CALL, 0, 0, MAP_LOOKUP_ELEM),
        (JUMP_EQUAL, 0x00, PASS, 0),
        (MOVE, 0x07, 0, 0),
        // Without a flag it fails where another program has chosen a socket already, which then stays the choice.
        (MOVE, 0x61, 0, 0),
        (MOVE, 0x72, 0, 0),
        (MOVE_IMMEDIATE, 0x03, 0, 0),
        (CALL, 0, 0, SK_ASSIGN),
        (MOVE, 0x71, 0, 0),
        (CALL, 0, 0, SK_RELEASE),
    ];
    let end = code.len();
    for (i, (_, _, offset, _)) in code.iter_mut().enumerate() {
        if *offset == PASS {
            *offset = i16::try_from(end - i - 1).expect("a short program");
        }
    }
    code.extend([(MOVE_IMMEDIATE, 0x00, 0, SK_PASS), (EXIT, 0, 0, 0)]);
    code
}

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

// The parts of `union bpf_attr` that matter here, one for each command; the kernel takes the rest as 0.

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
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

fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn create_map() -> nix::Result<OwnedFd> {
    let attr = MapCreate {
        map_type: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 4,
        max_entries: 2,
    };
    bpf_fd(BPF_MAP_CREATE, &attr)
}

fn put(map: &OwnedFd, key: u32, listener: &OwnedFd) -> nix::Result<()> {
    let value = number(listener);
    let attr = MapUpdate {
        map_fd: number(map),
        _padding: 0,
        key: std::ptr::from_ref(&key) as u64,
        value: std::ptr::from_ref(&value) as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &attr).map(drop)
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
    let attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_SK_LOOKUP,
        insn_cnt: u32::try_from(code.len()).unwrap_or(u32::MAX),
        insns: bytes.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"coffer_loopback\0",
        prog_ifindex: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    bpf_fd(BPF_PROG_LOAD, &attr)
}

fn attach(netns: BorrowedFd<'_>, program: &OwnedFd) -> nix::Result<OwnedFd> {
    let attr = LinkCreate {
        prog_fd: number(program),
        target_fd: number(&netns),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    bpf_fd(BPF_LINK_CREATE, &attr)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::fs::File;
    use std::net::{TcpStream, UdpSocket};
    use std::os::fd::AsFd;
    use std::process::Command;

    /// Runs a test in a network namespace of its own, which has loopback and 10.66.0.1 on it.
    fn in_new_netns(test: impl FnOnce(File) + Send + 'static) {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root");
            test(File::open("/proc/thread-self/ns/net").unwrap());
        });
        thread.join().unwrap();
    }

    fn bring_up() {
        for command in ["link set lo up", "address add 10.66.0.1/32 dev lo"] {
            let done = Command::new("ip").args(command.split(' ')).status();
            assert!(done.unwrap().success(), "{command}");
        }
    }

    fn accepted(taken: &Taken) -> Vec<SocketAddr> {
        let next = |listener: &TcpListener| Some(listener.accept().ok()?.0.local_addr().unwrap());
        taken.listeners.iter().filter_map(next).collect()
    }

    #[test]
    fn connections_to_any_loopback_address_and_port_are_taken() {
        in_new_netns(|netns| {
            // Before loopback is up: whoever wires the namespace may do so later.
            let taken = take_loopback(netns.as_fd()).unwrap();
            bring_up();
            for to in ["127.0.0.1:80", "127.9.8.7:65535", "[::1]:1"] {
                let to: SocketAddr = to.parse().unwrap();
                let client = TcpStream::connect(to).unwrap();
                assert_eq!(client.peer_addr().unwrap(), to);
                assert_eq!(accepted(&taken), [to]);
            }
        });
    }

    #[test]
    fn our_program_goes_before_a_listener_of_the_host() {
        in_new_netns(|netns| {
            bring_up();
            let host = TcpListener::bind("127.0.0.1:8080").unwrap();
            host.set_nonblocking(true).unwrap();
            let taken = take_loopback(netns.as_fd()).unwrap();
            let to = host.local_addr().unwrap();
            let _client = TcpStream::connect(to).unwrap();
            assert_eq!(accepted(&taken), [to]);
            assert!(host.accept().is_err());
        });
    }

    #[test]
    fn what_is_not_tcp_to_loopback_passes_and_nothing_is_taken_after_the_end() {
        in_new_netns(|netns| {
            bring_up();
            let taken = take_loopback(netns.as_fd()).unwrap();
            let refused = TcpStream::connect("10.66.0.1:80").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            let udp = UdpSocket::bind("127.0.0.1:53").unwrap();
            let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
            sender.send_to(b"x", "127.0.0.1:53").unwrap();
            assert_eq!(udp.recv(&mut [0; 2]).unwrap(), 1);
            assert_eq!(accepted(&taken), []);
            drop(taken);
            let refused = TcpStream::connect("127.0.0.1:80").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        });
    }
}
