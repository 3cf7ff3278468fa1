//! What well-behaved sides see: how connections begin, carry bytes and end.

use super::*;

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
fn a_guest_that_gave_up_while_it_connected_may_try_again() {
    let mut world = World::new();
    for guest_port in [5, 6] {
        let header = Header {
            src_port: guest_port,
            ..request(HOME)
        };
        world.send(header, b"");
        assert_eq!(world.poll_op(), Some(Op::Response));
        world.send(
            Header {
                op: Some(Op::Rst),
                ..header
            },
            b"",
        );
    }
    world.send(request(HOME), b"");
    assert_eq!(world.poll_op(), Some(Op::Response));
    world.send_data(HOME, b"used");
    world.home.read_exact(&mut [0; 4]).unwrap();
    world.send(
        Header {
            op: Some(Op::Rst),
            ..packet(5, HOME)
        },
        b"",
    );
    assert_eq!(world.home.read(&mut [0]).unwrap(), 0);
    world.send(request(HOME), b"");
    assert_eq!(world.poll_op(), Some(Op::Rst));
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
fn a_reader_that_stalls_holds_the_guest_back_and_loses_nothing() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    let (mut other, other_port) = world.open();
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
            world.send_data(other_port, b"alive");
            other.read_exact(&mut [0; 5]).unwrap();
            let mut part = vec![0; 100 << 10];
            match client.read(&mut part) {
                Ok(count) => got.extend(&part[..count]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        world.muxer.poll().unwrap();
        while let Some((header, _)) = world.receive() {
            assert_eq!(header.op, Some(Op::CreditUpdate));
            if header.src_port == port {
                known = header.fwd_cnt;
            }
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
    world.shut_down(port, SHUTDOWN_BOTH);
    while !reader.is_finished() {
        world.muxer.poll().unwrap();
    }
    assert_eq!(reader.join().unwrap(), total as usize);
    assert!(
        updates <= total / (BUFFER - CREDIT_THRESHOLD) * 4,
        "{updates} updates"
    );
}

#[test]
fn each_direction_ends_on_its_own() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    world.send_data(port, b"last");
    world.shut_down(port, SHUTDOWN_SEND);
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
    world.shut_down(port, SHUTDOWN_BOTH);
    assert_eq!(world.receive().unwrap().0.op, Some(Op::Rst));
    assert!(world.receive().is_none());
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_reader() {
    let mut world = World::new();
    let (mut client, port) = world.open();
    let block = vec![3; BUFFER as usize];
    world.send_data(port, &block);
    world.shut_down(port, SHUTDOWN_BOTH);
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
