//! A guest that breaks the rules, or makes the host wait.

use super::*;

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
fn dialling_and_giving_up_for_ever_is_remembered_once() {
    let mut world = World::new();
    for _ in 0..10_000 {
        for op in [Op::Request, Op::Rst] {
            let header = Header {
                op: Some(op),
                ..packet(5, HOME)
            };
            world.send(header, b"");
        }
        while world.receive().is_some() {}
    }
    assert_eq!(world.muxer.take_dialled(), [HOME]);
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
