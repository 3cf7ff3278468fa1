//! The device on a real tap, in a network namespace of the test's own thread. Needs CAP_NET_ADMIN and /dev/net/tun.

use super::{HEADER, MAX_FRAME, NetError, RX, TX};
use crate::virtio::driver::Part::{In, Out};
use crate::virtio::driver::{Driver, NEXT, WRITE, attack};
use crate::virtio::net::Net;
use crate::virtio::{DeviceError, VirtioDevice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::epoll::{Epoll, EventSet};

/// EtherType for local experiments.
const OURS: u16 = 0x88b5;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A tap that is up, and the host's side of its wire.
struct Wire {
    tap: OwnedFd,
    host: File,
}

#[allow(unsafe_code)]
fn open_tap(flags: i32) -> OwnedFd {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the ifreq, which outlives the call.
    let failed = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    assert_eq!(failed, 0);
    tap.into()
}

fn ip(arguments: &str) {
    assert!(
        Command::new("ip")
            .args(arguments.split(' '))
            .status()
            .unwrap()
            .success(),
        "ip {arguments}"
    );
}

#[allow(unsafe_code)]
fn packet_socket() -> File {
    let protocol = OURS.to_be();
    // SAFETY: plain system calls; the address outlives bind, and the new socket belongs to nobody else.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let socket = libc::socket(libc::AF_PACKET, kind, i32::from(protocol));
        assert!(socket >= 0);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = libc::if_nametoindex(c"tap0".as_ptr()) as i32;
        let length = size_of_val(&address) as libc::socklen_t;
        assert_eq!(libc::bind(socket, (&raw const address).cast(), length), 0);
        File::from_raw_fd(socket)
    }
}

const TAP: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A network namespace for this thread, without IPv6, whose kernel sends frames of its own.
fn namespace() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
}

fn wire() -> Wire {
    namespace();
    plug()
}

/// A new tap in the namespace of this thread.
fn plug() -> Wire {
    let tap = open_tap(TAP);
    ip("link set tap0 mtu 9000 up");
    Wire {
        tap,
        host: packet_socket(),
    }
}

fn device(features: u64) -> (Net, Driver, File) {
    let wire = wire();
    let mut net = Net::new(MAC, Some(wire.tap)).unwrap();
    let mut driver = Driver::new(&net);
    driver.activate(&mut net, features).unwrap();
    (net, driver, wire.host)
}

/// An Ethernet frame of ours.
fn frame(length: usize) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &MAC, &OURS.to_be_bytes()].concat();
    frame.extend((frame.len()..length).map(|n| (n * 13) as u8));
    frame
}

/// What comes out of the wire at the host's side next.
fn host_receives(host: &mut File) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 70_000];
    poll(
        &mut [PollFd::new(host.as_fd(), PollFlags::POLLIN)],
        PollTimeout::from(2000u16),
    )
    .unwrap();
    let length = host.read(&mut bytes).ok()?;
    bytes.truncate(length);
    Some(bytes)
}

/// Frames in the used chains: `at` gives each chain's address.
fn guest_receives(driver: &mut Driver, at: &[(u16, u64)]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut used = driver.used(RX).into_iter();
    while let Some((head, written)) = used.next() {
        let address = |head| at.iter().find(|(h, _)| *h == head).unwrap().1;
        let mut bytes = driver.read(address(head), written as usize);
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            let (head, written) = used
                .next()
                .expect("all chains of a frame are published together");
            bytes.extend(driver.read(address(head), written as usize));
        }
        frames.push(bytes[HEADER..].to_vec());
    }
    frames
}

fn tap_event(net: &mut Net) {
    net.source_event(0, EventSet::IN | EventSet::OUT).unwrap();
}

#[test]
fn frames_pass_both_ways() {
    let (mut net, mut driver, mut host) = device(MERGE);
    let mut at = Vec::new();
    for _ in 0..32 {
        let (head, addresses) = driver.chain(RX, &[In(4096)]);
        at.push((head, addresses[0]));
    }
    host.write_all(&frame(60)).unwrap();
    host.write_all(&frame(1500)).unwrap();
    tap_event(&mut net);
    assert_eq!(guest_receives(&mut driver, &at), [frame(60), frame(1500)]);
    assert_eq!(driver.interrupt.status(), 1);

    let sent = frame(1514);
    driver.chain(
        TX,
        &[Out(&[0; HEADER]), Out(&sent[..700]), Out(&sent[700..])],
    );
    driver.chain(TX, &[Out(&[&[0; HEADER][..], &frame(64)].concat())]);
    net.queue_event(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 2);
    assert_eq!(host_receives(&mut host), Some(sent));
    assert_eq!(host_receives(&mut host), Some(frame(64)));
}

#[test]
fn a_large_frame_is_spread_over_chains() {
    let (mut net, mut driver, mut host) = device(MERGE);
    host.write_all(&frame(8000)).unwrap();
    let mut at = Vec::new();
    // Too few chains at first: nothing may be published of a frame that is not there as a whole.
    for _ in 0..5 {
        let (head, addresses) = driver.chain(RX, &[In(1000), In(500)]);
        at.push((head, addresses[0]));
        tap_event(&mut net);
    }
    assert!(guest_receives(&mut driver, &at).is_empty());
    for _ in 0..5 {
        let (head, addresses) = driver.chain(RX, &[In(1000), In(500)]);
        at.push((head, addresses[0]));
    }
    net.queue_event(RX).unwrap();
    let used: Vec<_> = driver
        .used(RX)
        .into_iter()
        .map(|(_, written)| written)
        .collect();
    assert_eq!(used, [1500, 1500, 1500, 1500, 1500, 512]);
    let bytes: Vec<u8> = at
        .iter()
        .flat_map(|chain| driver.read(chain.1, 1000))
        .collect();
    assert_eq!(bytes[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0]);
    assert_eq!(bytes[HEADER..1000], frame(8000)[..1000 - HEADER]);
    assert_eq!(bytes[1000..2000], frame(8000)[1500 - HEADER..2500 - HEADER]);
}

#[test]
fn without_buffers_frames_wait_and_nobody_spins() {
    let (mut net, mut driver, mut host) = device(MERGE);
    host.write_all(&frame(100)).unwrap();
    host.write_all(&frame(200)).unwrap();
    tap_event(&mut net);
    assert!(driver.used(RX).is_empty());
    assert!(!driver.kicked(RX));
    // The loop's epoll stays silent while a frame waits, though the tap is readable.
    let epoll = Epoll::new().unwrap();
    let (fd, set, _) = net.sources()[0];
    let watch = vmm_sys_util::epoll::EpollEvent::new(set, 0);
    epoll
        .ctl(vmm_sys_util::epoll::ControlOperation::Add, fd, watch)
        .unwrap();
    let mut events = [vmm_sys_util::epoll::EpollEvent::default()];
    epoll.wait(0, &mut events).unwrap();
    assert_eq!(epoll.wait(50, &mut events).unwrap(), 0);
    let mut at = Vec::new();
    for _ in 0..16 {
        let (head, addresses) = driver.chain(RX, &[In(2048)]);
        at.push((head, addresses[0]));
    }
    net.queue_event(RX).unwrap();
    assert_eq!(guest_receives(&mut driver, &at), [frame(100), frame(200)]);
}

#[test]
fn a_frame_that_can_never_fit_is_dropped_and_its_chain_serves_the_next() {
    let (mut net, mut driver, mut host) = device(0);
    let mut at = Vec::new();
    for _ in 0..16 {
        let (head, addresses) = driver.chain(RX, &[In(512)]);
        at.push((head, addresses[0]));
    }
    host.write_all(&frame(1500)).unwrap();
    host.write_all(&frame(300)).unwrap();
    tap_event(&mut net);
    assert_eq!(guest_receives(&mut driver, &at), [frame(300)]);
    assert_eq!(net.counters()[4], ("dropped", 1));
}

#[test]
fn what_is_no_frame_is_dropped_and_given_back() {
    let (mut net, mut driver, mut host) = device(0);
    let huge = vec![0; MAX_FRAME + 1];
    let bad_header = [&[0xff; HEADER][..], &frame(64)].concat();
    for parts in [
        &[Out(&[])][..],
        &[Out(&[0; HEADER])],
        &[Out(&[0; HEADER + 13])],
        &[Out(&huge)],
        &[Out(&bad_header)],
    ] {
        driver.chain(TX, parts);
    }
    driver.chain(TX, &[In(2000)]);
    net.queue_event(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 6);
    assert_eq!(net.counters()[4], ("dropped", 6));
    driver.chain(TX, &[Out(&[0; HEADER]), Out(&frame(64))]);
    net.queue_event(TX).unwrap();
    assert_eq!(host_receives(&mut host), Some(frame(64)));
}

#[test]
fn receive_buffers_without_room_for_the_header_stop_the_device() {
    for parts in [&[In(11)][..], &[Out(&[0; 2000])], &[In(0)]] {
        let (mut net, mut driver, mut host) = device(MERGE);
        driver.chain(RX, parts);
        host.write_all(&frame(60)).unwrap();
        let outcome = net.source_event(0, EventSet::IN);
        assert!(matches!(outcome, Err(DeviceError::Hostile(_))), "{parts:?}");
    }
}

#[test]
fn a_broken_ring_stops_the_device() {
    attack(TX, 0, || Net::new(MAC, None).unwrap());
    // The receive ring is only read when there is a frame.
    let one = || {
        let wire = wire();
        let mut host = wire.host.try_clone().unwrap();
        host.write_all(&frame(60)).unwrap();
        Net::new(MAC, Some(wire.tap)).unwrap()
    };
    attack(RX, MERGE, one);
}

#[test]
fn a_flood_is_sent_in_turns() {
    let (mut net, mut driver, _host) = device(0);
    for _ in 0..256 {
        driver.chain(TX, &[Out(&[&[0; HEADER][..], &frame(60)].concat())]);
    }
    net.queue_event(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 256);
    assert!(driver.kicked(TX));
    net.queue_event(TX).unwrap();
    assert!(!driver.kicked(TX));
}

#[test]
fn the_link_follows_the_tap() {
    namespace();
    let link = |net: &Net| {
        let mut config = [0xff; 10];
        net.read_config(0, &mut config);
        assert_eq!(
            (&config[..6], &config[7..]),
            (&MAC[..], &[0, 0xff, 0xff][..])
        );
        config[6]
    };
    let mut net = Net::new(MAC, None).unwrap();
    let mut driver = Driver::new(&net);
    driver.activate(&mut net, MERGE).unwrap();
    assert_eq!((link(&net), net.sources().len()), (0, 0));
    // A pulled cable takes everything.
    driver.chain(TX, &[Out(&[0; HEADER]), Out(&frame(64))]);
    net.queue_event(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 1);

    let mut wire = plug();
    net.attach_tap(wire.tap).unwrap();
    assert_eq!((link(&net), driver.interrupt.status() & 2), (1, 2));
    assert_eq!(net.sources().len(), 1);
    driver.chain(TX, &[Out(&[0; HEADER]), Out(&frame(64))]);
    net.queue_event(TX).unwrap();
    assert_eq!(host_receives(&mut wire.host), Some(frame(64)));

    driver.interrupt.acknowledge(3);
    net.detach_tap();
    assert_eq!((link(&net), driver.interrupt.status() & 2), (0, 2));

    let wire = plug();
    net.set_backend(Some(wire.tap)).unwrap();
    assert_eq!(link(&net), 1);
    // Somebody deletes the interface.
    driver.interrupt.acknowledge(3);
    ip("link del tap0");
    driver.chain(RX, &[In(2048)]);
    tap_event(&mut net);
    assert_eq!((link(&net), driver.interrupt.status() & 2), (0, 2));
}

#[test]
fn only_a_proper_tap_is_taken() {
    namespace();
    let refused = |fd: OwnedFd| {
        Net::new(MAC, Some(fd))
            .map(|net| net.counters())
            .unwrap_err()
    };
    assert!(matches!(
        refused(File::open("/dev/null").unwrap().into()),
        NetError::NotATap(_)
    ));
    assert!(matches!(
        refused(open_tap(libc::IFF_TAP | libc::IFF_NO_PI)),
        NetError::TapFlags(_)
    ));
    assert!(matches!(
        refused(open_tap(
            libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR
        )),
        NetError::TapFlags(_)
    ));
    assert!(matches!(
        refused(open_tap(TAP | libc::IFF_MULTI_QUEUE)),
        NetError::TapFlags(_)
    ));
}

#[test]
fn a_reset_forgets_frames_and_chains() {
    let (mut net, mut driver, mut host) = device(MERGE);
    host.write_all(&frame(8000)).unwrap();
    driver.chain(RX, &[In(1000)]);
    tap_event(&mut net);
    net.reset();
    driver.activate(&mut net, MERGE).unwrap();
    // A chain of one descriptor that is then linked to itself must not be remembered from before.
    driver.descriptor(RX, 0, (0x10_0000, 2048), WRITE, NEXT);
    driver.offer(RX, 0);
    host.write_all(&frame(60)).unwrap();
    tap_event(&mut net);
    let used = driver.used(RX);
    assert_eq!(used.len(), 1);
    assert!(used[0].1 < 8000);
}

#[test]
fn event_idx_asks_for_an_interrupt_at_the_right_frame() {
    use super::used::Used;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress};
    let net = Net::new(MAC, None).unwrap();
    let driver = Driver::new(&net);
    let mut queue = Queue::new(256).unwrap();
    queue.set_avail_ring_address(Some(0x4000), None);
    queue.set_used_ring_address(Some(0x5000), None);
    queue.set_event_idx(true);
    let event = GuestAddress(0x4000 + 4 + 512);
    let mut used = Used::default();
    for (used_event, pushes, wanted) in [
        (0u16, 1, true),
        (5, 3, false),
        (5, 3, true),
        (5, 200, false),
        (206, 1, false),
    ] {
        driver.memory.write_obj(used_event, event).unwrap();
        Used::push(&mut queue, &driver.memory, &vec![(1, 60); pushes]).unwrap();
        assert_eq!(
            used.wants_interrupt(&queue, &driver.memory).unwrap(),
            wanted,
            "event {used_event}"
        );
    }
    queue.set_event_idx(false);
    driver.memory.write_obj(1u16, GuestAddress(0x4000)).unwrap();
    Used::push(&mut queue, &driver.memory, &[(1, 60)]).unwrap();
    assert!(!used.wants_interrupt(&queue, &driver.memory).unwrap());
    assert!(!used.wants_interrupt(&queue, &driver.memory).unwrap());
}
