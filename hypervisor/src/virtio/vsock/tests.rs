//! The muxer against a guest that is played by the test, packet by packet.

use super::limits::{ANSWER_TIMEOUT, BUFFER, CREDIT_THRESHOLD, MAX_CONNECTIONS, MAX_RESETS};
use super::packet::{HEADER_BYTES, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::{HOST_CID, Header, Muxer, Op};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;

const CID: u64 = 3;
const HOME: u32 = 17;
const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

struct World {
    muxer: Muxer,
    directory: tempfile::TempDir,
    /// The host's end of the connection that the guest may make to port HOME.
    home: UnixStream,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let (home, ours) = UnixStream::pair().unwrap();
        home.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let muxer = Muxer::new(CID, listener, [(HOME, ours)]).unwrap();
        Self {
            muxer,
            directory,
            home,
        }
    }

    /// A client of the listener that says `greeting`.
    fn client(&self, greeting: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        client.write_all(greeting.as_bytes()).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        client
    }

    /// A connection from the host to the guest's port 5, open on both sides, and the host's port.
    fn open(&mut self) -> (UnixStream, u32) {
        let mut client = self.client("CONNECT 5\n");
        self.muxer.poll().unwrap();
        let (request, _) = self.receive().unwrap();
        assert_eq!((request.op, request.dst_port), (Some(Op::Request), 5));
        self.send(
            Header {
                op: Some(Op::Response),
                ..packet(5, request.src_port)
            },
            b"",
        );
        let mut answer = vec![0; format!("OK {}\n", request.src_port).len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, format!("OK {}\n", request.src_port).as_bytes());
        (client, request.src_port)
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let mut data = data.to_vec();
        self.muxer
            .take_packet(&header, &[VolatileSlice::from(&mut data[..])]);
    }

    fn send_data(&mut self, host_port: u32, data: &[u8]) {
        self.send(
            Header {
                len: data.len() as u32,
                ..packet(5, host_port)
            },
            data,
        );
    }

    /// The next packet in a buffer as Linux posts it.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut room = vec![0; 4096 - HEADER_BYTES];
        let header = self
            .muxer
            .next_packet(&[VolatileSlice::from(&mut room[..])])?;
        assert_eq!(
            (header.src_cid, header.dst_cid, header.kind),
            (HOST_CID, CID, TYPE_STREAM)
        );
        room.truncate(header.len as usize);
        Some((header, room))
    }

    /// What the guest gets next after the host's sockets were looked at.
    fn poll_op(&mut self) -> Option<Op> {
        self.muxer.poll().unwrap();
        self.receive().and_then(|(header, _)| header.op)
    }

    /// Whether a thread that sleeps on the muxer would wake up.
    fn wants_poll(&self) -> bool {
        // SAFETY: the muxer outlives the descriptor.
        #[allow(unsafe_code)]
        let fd = unsafe { BorrowedFd::borrow_raw(self.muxer.fd()) };
        poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }
}

/// An RW packet of the guest with nothing in it, and plenty of room at the guest.
fn packet(guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len: 0,
        kind: TYPE_STREAM,
        op: Some(Op::Rw),
        flags: 0,
        buf_alloc: 256 << 10,
        fwd_cnt: 0,
    }
}

fn request(host_port: u32) -> Header {
    Header {
        op: Some(Op::Request),
        ..packet(5, host_port)
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn bytes_flow_both_ways_on_a_connection_of_the_host() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    client.write_all(b"to the guest").unwrap();
    world.muxer.poll().unwrap();
    let (header, data) = world.receive().unwrap();
    assert_eq!(
        (header.op, header.src_port, &data[..]),
        (Some(Op::Rw), port, &b"to the guest"[..])
    );
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER, 0));
    world.send_data(port, b"to the host");
    let mut data = [0; 11];
    client.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"to the host");
    client.write_all(b"x").unwrap();
    world.muxer.poll().unwrap();
    assert_eq!(world.receive().unwrap().0.fwd_cnt, 11);
}

#[test]
fn bytes_behind_the_greeting_are_not_lost() {
    let mut world = World::new();
    let _client = world.client("CONNECT 9\nearly");
    assert_eq!(world.poll_op(), Some(Op::Request));
    world.send(
        Header {
            op: Some(Op::Response),
            ..packet(9, 1 << 30)
        },
        b"",
    );
    assert_eq!(world.receive().unwrap().1, b"early");
}

#[test]
fn what_is_no_greeting_closes_the_client() {
    let mut world = World::new();
    for text in [
        "HELLO 5\n",
        "CONNECT \n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "CONNECT 5 \n",
        &"C".repeat(40),
    ] {
        let mut client = world.client(text);
        assert_eq!(world.poll_op(), None, "{text:?}");
        let end = client.read(&mut [0]);
        assert!(
            matches!(&end, Ok(0))
                || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
        );
    }
    let mut slow = world.client("CONN");
    assert_eq!(world.poll_op(), None);
    slow.write_all(b"ECT 7\n").unwrap();
    assert_eq!(world.poll_op(), Some(Op::Request));
}

#[test]
fn the_guest_reaches_its_port_once_and_no_other() {
    let mut world = World::new();
    world.send(request(HOME + 1), b"");
    assert_eq!(world.poll_op(), Some(Op::Rst));
    world.send(request(HOME), b"");
    assert_eq!(world.poll_op(), Some(Op::Response));
    assert_eq!(world.muxer.take_dialled(), [HOME]);
    world.send_data(HOME, b"hello");
    let mut hello = [0; 5];
    world.home.read_exact(&mut hello).unwrap();
    world.send(
        Header {
            src_port: 6,
            ..request(HOME)
        },
        b"",
    );
    assert_eq!(world.poll_op(), Some(Op::Rst), "a second connection");
    world.home.write_all(b"x").unwrap();
    assert_eq!(world.poll_op(), Some(Op::Rw), "the first goes on");
}

#[test]
fn requests_to_closed_ports_cost_a_bounded_number_of_resets() {
    let mut world = World::new();
    let (mut sent, mut answered) = (0, 0);
    while answered < 100_000 {
        while world.muxer.accepts_packets() && sent < 100_000 {
            world.send(request(1000 + sent), b"");
            sent += 1;
        }
        assert!(sent - answered <= MAX_RESETS as u32);
        while let Some((header, _)) = world.receive() {
            assert_eq!(
                (header.op, header.src_port),
                (Some(Op::Rst), 1000 + answered)
            );
            answered += 1;
        }
    }
    assert_eq!(world.muxer.counters().connections, 0);
    world.open();
}

#[test]
fn clients_over_the_limit_wait_and_the_others_go_on() {
    let mut world = World::new();
    let (mut first, port) = world.open();
    let mut clients = Vec::new();
    while clients.len() < MAX_CONNECTIONS + 4 {
        // The backlog of a unix socket is shorter than that.
        clients.push(world.client("CONNECT 5\n"));
        world.muxer.poll().unwrap();
        if clients.len() < MAX_CONNECTIONS {
            assert_eq!(world.receive().unwrap().0.op, Some(Op::Request));
        }
    }
    assert!(world.receive().is_none());
    world.send_data(port, b"alive");
    first.read_exact(&mut [0; 5]).unwrap();
    drop(first);
    assert_eq!(world.poll_op(), Some(Op::Shutdown));
    world.send(
        Header {
            op: Some(Op::Rst),
            ..packet(5, port)
        },
        b"",
    );
    std::thread::sleep(Duration::from_millis(5));
    assert!(world.wants_poll());
    assert_eq!(
        world.poll_op(),
        Some(Op::Request),
        "the next client got its turn"
    );
}

#[test]
fn a_guest_that_ignores_credit_loses_that_connection_only() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    let (mut other, other_port) = world.open();
    let block = vec![1; 64 << 10];
    let mut answer = None;
    for _ in 0..40 {
        world.send_data(port, &block);
        answer = world.receive();
        if answer
            .as_ref()
            .is_some_and(|(header, _)| header.op == Some(Op::Rst))
        {
            break;
        }
    }
    assert_eq!(answer.unwrap().0.op, Some(Op::Rst));
    world.send_data(port, b"x");
    assert_eq!(
        world.receive().unwrap().0.op,
        Some(Op::Rst),
        "it is forgotten"
    );
    let mut all = Vec::new();
    let _ = client.read_to_end(&mut all);
    assert!(all.len() <= 40 << 16);
    world.send_data(other_port, b"alive");
    other.read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn a_reader_that_stalls_holds_the_guest_back_and_loses_nothing() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    let total: Vec<u8> = (0..4u32 << 20).map(|n| (n % 251) as u8).collect();
    let (mut sent, mut known) = (0usize, 0u32);
    let mut got: Vec<u8> = Vec::new();
    client.set_nonblocking(true).unwrap();
    let mut stalls = 0;
    while got.len() < total.len() {
        let room = BUFFER as usize - (sent as u32).wrapping_sub(known) as usize;
        let size = room.min(48 << 10).min(total.len() - sent);
        if size > 0 {
            world.send_data(port, &total[sent..sent + size]);
            sent += size;
        } else {
            stalls += 1;
            let mut part = vec![0; 100 << 10];
            match client.read(&mut part) {
                Ok(count) => got.extend(&part[..count]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        world.muxer.poll().unwrap();
        while let Some((header, _)) = world.receive() {
            assert_eq!(header.op, Some(Op::CreditUpdate));
            known = header.fwd_cnt;
        }
    }
    assert!(stalls > 10, "the guest never had to wait");
    assert!(got == total);
}

#[test]
fn nothing_is_sent_beyond_what_the_guest_has_room_for() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    world.send(
        Header {
            op: Some(Op::CreditUpdate),
            buf_alloc: 10,
            ..packet(5, port)
        },
        b"",
    );
    client.write_all(&[7; 25]).unwrap();
    world.muxer.poll().unwrap();
    assert_eq!(world.receive().unwrap().1, [7; 10]);
    assert_eq!(world.receive().unwrap().0.op, Some(Op::CreditRequest));
    assert!(world.receive().is_none() && !world.wants_poll());
    let mut update = |buf_alloc, fwd_cnt| {
        world.send(
            Header {
                op: Some(Op::CreditUpdate),
                buf_alloc,
                fwd_cnt,
                ..packet(5, port)
            },
            b"",
        );
        world
            .receive()
            .filter(|(header, _)| header.op == Some(Op::Rw))
            .map(|(_, data)| data.len())
    };
    assert_eq!(update(0, 0), None);
    assert_eq!(update(10, 11), None, "more than was sent");
    assert_eq!(update(10, 4), Some(4));
    assert_eq!(update(10, 2), None, "backwards");
    assert_eq!(update(10, 7), Some(3));
    assert_eq!(update(u32::MAX, 7), Some(8));
}

#[test]
fn malformed_packets_reset_the_connection_they_name() {
    type Spoil = fn(&mut Header);
    let spoilt: [(&str, Spoil); 6] = [
        ("more data than the buffer has", |h| h.len = 100),
        ("unknown operation", |h| h.op = None),
        ("unknown type", |h| h.kind = 2),
        ("request on an existing key", |h| h.op = Some(Op::Request)),
        ("response on an open connection", |h| {
            h.op = Some(Op::Response);
        }),
        ("longest length", |h| h.len = u32::MAX),
    ];
    for (what, spoil) in spoilt {
        let mut world = World::new();
        let (mut client, port) = world.open();
        let mut header = packet(5, port);
        spoil(&mut header);
        world.send(header, b"few");
        let (answer, _) = world.receive().expect(what);
        assert_eq!(
            (answer.op, answer.src_port, answer.dst_port),
            (Some(Op::Rst), port, 5),
            "{what}"
        );
        assert!(
            matches!(client.read(&mut [0]), Ok(0)),
            "{what}: the host's socket is closed"
        );
        assert!(world.receive().is_none(), "{what}");
    }
}

#[test]
fn context_ids_that_are_not_ours_are_refused() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    world.send(
        Header {
            src_cid: 9,
            ..packet(5, port)
        },
        b"",
    );
    assert!(world.receive().is_none(), "nobody to answer to");
    let stray = Header {
        dst_cid: 1,
        ..packet(5, port)
    };
    let mut room = [0; 8];
    world.muxer.take_packet(&stray, &[]);
    let answer = world
        .muxer
        .next_packet(&[VolatileSlice::from(&mut room[..])])
        .unwrap();
    assert_eq!((answer.op, answer.src_cid), (Some(Op::Rst), 1));
    world.send_data(port, b"alive");
    client.read_exact(&mut [0; 5]).unwrap();
    assert_eq!(world.muxer.counters().dropped, 1);
}

#[test]
fn a_reset_is_never_answered() {
    let mut world = World::new();
    for spoilt in [
        packet(5, 99),
        Header {
            dst_cid: 7,
            ..packet(5, 99)
        },
        Header {
            kind: 2,
            ..packet(5, 99)
        },
    ] {
        world.send(
            Header {
                op: Some(Op::Rst),
                ..spoilt
            },
            b"",
        );
        assert!(world.receive().is_none());
    }
}

#[test]
fn each_direction_ends_on_its_own() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    world.send_data(port, b"last");
    world.send(
        Header {
            op: Some(Op::Shutdown),
            flags: SHUTDOWN_SEND,
            ..packet(5, port)
        },
        b"",
    );
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last");
    client.write_all(b"answer").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    world.muxer.poll().unwrap();
    assert_eq!(world.receive().unwrap().1, b"answer");
    let (header, _) = world.receive().unwrap();
    assert_eq!(header.op, Some(Op::Shutdown));
    assert!(header.flags & SHUTDOWN_SEND != 0);
    world.send(
        Header {
            op: Some(Op::Shutdown),
            flags: SHUTDOWN_BOTH,
            ..packet(5, port)
        },
        b"",
    );
    assert_eq!(world.receive().unwrap().0.op, Some(Op::Rst));
    assert!(world.receive().is_none());
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_reader() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    let block = vec![3; BUFFER as usize];
    world.send_data(port, &block);
    world.send(
        Header {
            op: Some(Op::Shutdown),
            flags: SHUTDOWN_BOTH,
            ..packet(5, port)
        },
        b"",
    );
    let answers: Vec<_> = std::iter::from_fn(|| world.receive())
        .map(|(header, _)| header.op)
        .collect();
    assert_eq!(
        answers.last(),
        Some(&Some(Op::Rst)),
        "the guest may forget it at once"
    );
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all.len()
    });
    while !reader.is_finished() {
        world.muxer.poll().unwrap();
    }
    assert_eq!(reader.join().unwrap(), block.len());
}

#[test]
fn a_host_that_closes_is_told_to_the_guest_after_its_last_byte() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    client.write_all(b"bye").unwrap();
    drop(client);
    world.muxer.poll().unwrap();
    assert_eq!(world.receive().unwrap().1, b"bye");
    let (header, _) = world.receive().unwrap();
    assert_eq!(
        (header.op, header.flags),
        (Some(Op::Shutdown), SHUTDOWN_BOTH)
    );
    world.send_data(port, &vec![0; 200 << 10]);
    assert!(
        world
            .receive()
            .is_none_or(|(header, _)| header.op == Some(Op::CreditUpdate)),
        "dropped quietly"
    );
    world.send(
        Header {
            op: Some(Op::Rst),
            ..packet(5, port)
        },
        b"",
    );
    assert!(world.receive().is_none());
}

#[test]
fn a_guest_without_buffers_costs_no_cpu() {
    let mut world = World::new();
    let (mut client, _) = world.open();
    client.write_all(&[0; 1000]).unwrap();
    world.muxer.poll().unwrap();
    assert!(
        !world.wants_poll(),
        "the socket is still readable, and the muxer sleeps"
    );
    drop(client);
    world.muxer.poll().unwrap();
    assert!(!world.wants_poll());
    assert_eq!(world.receive().unwrap().1.len(), 1000);
}

#[test]
fn who_never_answers_is_given_up() {
    let mut world = World::new();
    let mut silent = world.client("");
    let mut asking = world.client("CONNECT 5\n");
    assert_eq!(world.poll_op(), Some(Op::Request));
    let (closing, port) = world.open();
    drop(closing);
    assert_eq!(world.poll_op(), Some(Op::Shutdown));
    world.muxer.expire(Instant::now());
    assert!(world.receive().is_none());
    world.muxer.expire(Instant::now() + ANSWER_TIMEOUT);
    let resets: Vec<_> = std::iter::from_fn(|| world.receive())
        .map(|(h, _)| (h.op, h.src_port))
        .collect();
    assert_eq!(resets.len(), 2);
    assert!(
        resets.iter().all(|(op, _)| *op == Some(Op::Rst))
            && resets.contains(&(Some(Op::Rst), port))
    );
    assert!(matches!(silent.read(&mut [0]), Ok(0)) && matches!(asking.read(&mut [0]), Ok(0)));
}

#[test]
fn connections_that_come_and_go_leave_nothing() {
    let mut world = World::new();
    world.open();
    while world.poll_op().is_some() {}
    let before = descriptors();
    for round in 0..2000u32 {
        let (client, port) = world.open();
        let op = if round % 2 == 0 {
            Op::Rst
        } else {
            Op::Shutdown
        };
        world.send(
            Header {
                op: Some(op),
                flags: SHUTDOWN_BOTH,
                ..packet(5, port)
            },
            b"",
        );
        while world.receive().is_some() {}
        drop(client);
    }
    world.muxer.poll().unwrap();
    // Other tests of this process open files too.
    assert!(descriptors() < before + 500);
    world.muxer.reset();
    assert!(!world.muxer.has_packets());
}

#[test]
fn the_guest_hears_of_freed_space_before_it_runs_out() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all.len()
    });
    let total = 8u32 << 20;
    let (mut sent, mut known, mut updates) = (0u32, 0u32, 0);
    while sent < total {
        if BUFFER - (sent - known) >= 32 << 10 {
            world.send_data(port, &[0; 32 << 10]);
            sent += 32 << 10;
        }
        world.muxer.poll().unwrap();
        while let Some((header, _)) = world.receive() {
            known = header.fwd_cnt;
            updates += 1;
        }
    }
    world.send(
        Header {
            op: Some(Op::Shutdown),
            flags: SHUTDOWN_BOTH,
            ..packet(5, port)
        },
        b"",
    );
    while !reader.is_finished() {
        world.muxer.poll().unwrap();
    }
    assert_eq!(reader.join().unwrap(), total as usize);
    assert!(
        updates <= total / (BUFFER - CREDIT_THRESHOLD) * 4,
        "{updates} updates"
    );
}

fn any_header() -> impl Strategy<Value = Header> {
    let port = prop_oneof![
        Just(5u32),
        Just(HOME),
        Just(1 << 30),
        Just((1 << 30) + 1),
        any::<u32>()
    ];
    let guest_port = prop_oneof![Just(5u32), Just(6u32)];
    let op = prop_oneof![9 => (1u16..9).boxed(), 1 => any::<u16>().boxed()];
    let len = prop_oneof![0u32..64, Just(u32::MAX)];
    (
        op,
        guest_port,
        port,
        len,
        any::<u32>(),
        any::<u32>(),
        0u32..5,
    )
        .prop_map(|(op, src_port, dst_port, len, buf_alloc, fwd_cnt, flags)| {
            let mut bytes = Header {
                len,
                flags,
                buf_alloc,
                fwd_cnt,
                ..packet(src_port, dst_port)
            }
            .to_bytes();
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            Header::from_bytes(&bytes)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_packets_in_any_order_are_answered_at_most_once_each(
        headers in prop::collection::vec((any_header(), any::<bool>()), 1..60),
    ) {
        let mut world = World::new();
        let mut clients = vec![world.client("CONNECT 5\nhello"), world.client("CONNECT 6\n")];
        world.muxer.poll().unwrap();
        let mut answers = 0;
        for (header, look) in &headers {
            world.send(*header, &[9; 64][..header.len.min(64) as usize]);
            if *look {
                let mut room = [0; 128];
                while let Some(answer) = world.muxer.next_packet(&[VolatileSlice::from(&mut room[..])]) {
                    prop_assert!(answer.len as usize <= room.len());
                    answers += 1;
                }
                clients.pop();
                world.muxer.poll().unwrap();
            }
        }
        // Two for each connection come from the host: what it wrote, and its end.
        prop_assert!(answers <= headers.len() * 2 + 12);
    }
}
