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

use coffer_bpf::Helper::{MapLookupElem, SkAssign, SkRelease};
use coffer_bpf::Instruction::{
    Add, Call, Exit, Jump, JumpIfEqual, JumpIfNotEqual, LoadByte, LoadWord, Move, Set, StoreWord,
};
use coffer_bpf::Register::{R0, R1, R2, R3, R6, R7, R10};
use coffer_bpf::{Instruction, Kind, Link, Program, Register, SocketMap, slots};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt,
};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

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

/// The listeners of a namespace. When `link` is dropped, the kernel looks for sockets as ever.
#[derive(Debug)]
pub(super) struct Taken {
    pub listeners: Vec<TcpListener>,
    pub link: Link,
}

/// Takes the connections to loopback in the calling thread's network namespace, which `netns` is.
pub(super) fn take_loopback(netns: BorrowedFd<'_>) -> Result<Taken, LookupError> {
    let map = SocketMap::new(2).map_err(at("make the map of listeners"))?;
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
        map.put(key, listener.as_fd())
            .map_err(at("put a listener into the map"))?;
        listeners.push(listener.into());
    }
    let program =
        Program::load(Kind::SocketLookup, NAME, &assemble(&map)).map_err(at("load the program"))?;
    let link = program
        .link_to_netns(netns)
        .map_err(at("attach the program"))?;
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

/// What `bpftool prog` calls it.
const NAME: &str = "coffer_loopback";

/// Keys of the map.
const IPV4: u32 = 0;
const IPV6: u32 = 1;

// Offsets in `struct bpf_sk_lookup`
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// Where the key is on the stack.
const KEY: i16 = -4;

/// The connection goes on: to the socket that was chosen, or as ever.
const PASS: [Instruction; 2] = [Set(R0, 1), Exit];

/// Passes unless the register has this value.
fn pass_unless(register: Register, value: i32) -> [Instruction; 3] {
    let [set, exit] = PASS;
    [JumpIfEqual(register, value, slots(&PASS)), set, exit]
}

/// The program. R6 keeps the context, R7 the socket, and the key is on the stack.
fn assemble(listeners: &SocketMap) -> Vec<Instruction> {
    let mut ipv6 = Vec::new();
    // The address is in network order.
    for (word, value) in [(0, 0), (1, 0), (2, 0), (3, 1_u32.to_be().cast_signed())] {
        ipv6.push(LoadWord(R2, R6, LOCAL_IP6 + 4 * word));
        ipv6.extend(pass_unless(R2, value));
    }
    ipv6.push(StoreWord(R10, KEY, IPV6.cast_signed()));

    let mut ipv4 = vec![LoadByte(R2, R6, LOCAL_IP4)];
    ipv4.extend(pass_unless(R2, 127));
    ipv4.push(StoreWord(R10, KEY, IPV4.cast_signed()));
    ipv4.push(Jump(slots(&ipv6)));

    let mut code = vec![Move(R6, R1), LoadWord(R2, R6, PROTOCOL)];
    code.extend(pass_unless(R2, libc::IPPROTO_TCP));
    code.push(LoadWord(R2, R6, FAMILY));
    code.push(JumpIfNotEqual(R2, libc::AF_INET, slots(&ipv4)));
    code.extend(ipv4);
    code.extend(ipv6);

    // R7 = listeners[key]
    code.push(listeners.load_into(R1));
    code.extend([Move(R2, R10), Add(R2, KEY.into()), Call(MapLookupElem)]);
    code.push(JumpIfNotEqual(R0, 0, slots(&PASS)));
    code.extend(PASS);
    code.push(Move(R7, R0));
    // Without a flag it fails where another program has chosen a socket already, which then stays the choice.
    code.extend([Move(R1, R6), Move(R2, R7), Set(R3, 0), Call(SkAssign)]);
    code.extend([Move(R1, R7), Call(SkRelease)]);
    code.extend(PASS);
    code
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
