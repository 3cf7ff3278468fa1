//! One function for each target.

use crate::guest::{Guest, MAX_OPERATIONS, RAM};
use crate::input::Input;
use coffer_hypervisor::virtio::balloon::Balloon;
use coffer_hypervisor::virtio::block::Block;
use coffer_hypervisor::virtio::mem::{BLOCK, Mem};
use coffer_hypervisor::virtio::mmio::{Transport, Work};
use coffer_hypervisor::virtio::net::Net;
use coffer_hypervisor::virtio::vsock::{Muxer, Vsock};
use coffer_hypervisor::virtio::{DeviceError, Memory, VirtioDevice};
use nix::sched::{CloneFlags, unshare};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::OnceLock;
use vm_memory::GuestAddress;

/// Bytes of the fuzzed disk, and the byte it is filled with.
const DISK: usize = 64 << 10;
const FILL: u8 = 0xc0;

/// A disk; the first byte of the input decides whether it is read-only, and then its file must not change.
pub fn block(input: &[u8]) {
    let mut input = Input(input);
    let Some(mode) = input.byte() else { return };
    let read_only = mode & 1 == 1;
    let file = tempfile::tempfile().expect("a temporary file");
    file.write_all_at(&[FILL; DISK], 0)
        .expect("a temporary file");
    let fd = OwnedFd::from(file.try_clone().expect("a file"));
    let block = Block::new("fuzz", Some(fd), read_only).expect("a disk");
    Guest::new(block).run(&mut input, |_, _| {});
    assert_eq!(
        file.metadata().expect("a file").len(),
        DISK as u64,
        "the disk changed its size"
    );
    if read_only {
        let mut content = vec![0; DISK];
        file.read_exact_at(&mut content, 0).expect("a file");
        assert!(content == [FILL; DISK], "a read-only disk changed");
    }
}

/// A balloon over the guest's whole RAM.
pub fn balloon(input: &[u8]) {
    Guest::new(Balloon::new()).run(&mut Input(input), |_, _| {});
}

/// Memory of 16 blocks behind RAM, of which the host wants as many as the input says.
pub fn mem(input: &[u8]) {
    const BLOCKS: u64 = 16;
    let (start, size) = (GuestAddress(BLOCK), BLOCKS * BLOCK);
    let device = Mem::new(start, size);
    let target = device.target();
    let mut guest = Guest::new(device);
    guest.memory = Memory::from_ranges(&[(GuestAddress(0), RAM), (start, size as usize)])
        .expect("some mebibytes");
    let mut most = 0;
    guest.run(&mut Input(input), |_, what| {
        let wanted = u64::from(what) % (BLOCKS + 1) * BLOCK;
        most = most.max(wanted);
        target.set(wanted, wanted);
    });
    let counters = guest.device.counters();
    let plugged = counters.iter().find(|(name, _)| *name == "plugged_bytes");
    assert!(
        plugged.expect("a counter").1 <= most,
        "the guest has more than the host wanted"
    );
}

/// A network interface on a tap, whose other side sends frames when the input says so.
pub fn net(input: &[u8]) {
    let (tap, host) = wire();
    let fd = tap.try_clone().expect("a file");
    let net = Net::new([2, 0, 0, 0, 0, 1], Some(fd)).expect("a network interface");
    Guest::new(net).run(&mut Input(input), |net, what| match what {
        0 => net.detach_tap(),
        1 => net
            .attach_tap(tap.try_clone().expect("a file"))
            .expect("a tap"),
        size => {
            let mut frame = vec![0xff; usize::from(size) * 32];
            frame[12..14].copy_from_slice(&[0x88, 0xb5]);
            // A full queue drops.
            let _ = (&*host).write(&frame);
        }
    });
}

/// Stream sockets, with clients of the host that come, write, read and go when the input says so.
pub fn vsock(input: &[u8]) {
    const HOME: u32 = 17;
    const CID: u64 = 3;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("vsock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let (home, ours) = UnixStream::pair().expect("a socket pair");
    let muxer = Muxer::new(CID, listener, [(HOME, ours)]).expect("event descriptors");
    let mut guest = Guest::new(Vsock::new(CID, muxer));
    let mut clients = VecDeque::from([home]);
    let mut received = 0;
    guest.run(&mut Input(input), |_, what| match what {
        0 if clients.len() < 32 => {
            let mut client = UnixStream::connect(&path).expect("the listener");
            client
                .write_all(b"CONNECT 5\n")
                .expect("room in a new socket");
            clients.push_back(client);
        }
        1 => drop(clients.pop_front()),
        2 => received += clients.iter().map(read_all).sum::<u64>(),
        size => {
            if let Some(mut client) = clients.back() {
                client.set_nonblocking(true).expect("a socket");
                // A full socket, or one whose other end is closed, takes nothing.
                let _ = client.write(&vec![size; usize::from(size) * 32]);
            }
        }
    });
    received += clients.iter().map(read_all).sum::<u64>();
    let sent = guest
        .device
        .counters()
        .into_iter()
        .find(|(name, _)| *name == "tx_bytes");
    // Beside what the guest sent, each client of the listener reads `OK <port>`.
    let greetings = MAX_OPERATIONS as u64 * 16;
    assert!(
        received <= sent.expect("a counter").1 + greetings,
        "bytes from nowhere"
    );
}

fn read_all(client: &UnixStream) -> u64 {
    client.set_nonblocking(true).expect("a socket");
    let mut client = client;
    let mut all = Vec::new();
    // It ends with an error where the socket is still open; what came before that is in `all`.
    let _ = client.read_to_end(&mut all);
    all.len() as u64
}

/// Registers of a device, in any order; the main thread's part is done when the transport asks for it.
pub fn mmio(input: &[u8]) {
    let memory = Memory::from_ranges(&[(GuestAddress(0), RAM)]).expect("a mebibyte");
    let mut transport = Transport::new(Box::new(Balloon::new()), memory).expect("eventfds");
    let mut input = Input(input);
    while let Some(operation) = input.byte() {
        let Some(register) = input.byte() else { return };
        // Registers lie at multiples of 4; a few accesses are odd.
        let offset = u64::from(register) * if operation & 0x40 != 0 { 1 } else { 4 };
        let width = [4, 4, 4, 4, 1, 2, 8, 3][usize::from(operation >> 1 & 7)];
        if operation & 1 == 0 {
            transport.read(offset, &mut vec![0; width]);
            continue;
        }
        let Some(value) = input.take(width) else {
            return;
        };
        transport.write(offset, value);
        let result = match transport.take_work() {
            Some(Work::Activate) => transport.activate(),
            Some(Work::Reset) => {
                transport.reset();
                Ok(())
            }
            None if transport.is_active() => {
                let queue = usize::from(operation >> 4 & 3) % transport.notify().len();
                transport.device().queue_event(queue)
            }
            None => Ok(()),
        };
        match result {
            Ok(()) => {}
            Err(DeviceError::Hostile(_)) => transport.needs_reset(),
            Err(DeviceError::Fatal(cause)) => {
                panic!("a guest must not be able to end the VM: {cause}")
            }
        }
    }
}

/// A tap that is up, in a network namespace of its own, and a packet socket on it. Made once. Needs root.
fn wire() -> &'static (OwnedFd, File) {
    static WIRE: OnceLock<(OwnedFd, File)> = OnceLock::new();
    WIRE.get_or_init(|| {
        // In a thread, so that the rest of a test program stays where it is.
        std::thread::spawn(make_wire).join().expect("a tap")
    })
}

fn make_wire() -> (OwnedFd, File) {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (needs root)");
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").expect("the sysctl");
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("/dev/net/tun");
    // struct ifreq: 16 bytes of name, then the flags.
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tap0");
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    #[allow(unsafe_code)]
    // SAFETY: TUNSETIFF reads and writes an ifreq, which has 40 bytes.
    let failed = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(failed, 0, "TUNSETIFF");
    let up = Command::new("ip")
        .args(["link", "set", "tap0", "mtu", "9000", "up"])
        .status();
    assert!(up.expect("ip").success());
    let protocol = 0x88b5u16.to_be();
    #[allow(unsafe_code)]
    // SAFETY: plain system calls; the address outlives bind, and the new socket belongs to nobody else.
    let host = unsafe {
        let socket = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_NONBLOCK,
            i32::from(protocol),
        );
        assert!(socket >= 0, "a packet socket");
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = libc::if_nametoindex(c"tap0".as_ptr()) as i32;
        let length = size_of_val(&address) as libc::socklen_t;
        assert_eq!(libc::bind(socket, (&raw const address).cast(), length), 0);
        File::from_raw_fd(socket)
    };
    // The namespace lives as long as the socket in it.
    (tap.into(), host)
}
