use super::blocks::{Answer, Blocks, Request, Span, State};
use super::{BLOCK, MAX_REQUESTS_PER_EVENT, Mem};
use crate::virtio::driver::Part::{In, Out};
use crate::virtio::driver::{Driver, RAM, attack};
use crate::virtio::{DeviceError, Memory, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};

/// Where the blocks of these tests are, how many there are, and how many of them the guest may use.
const START: GuestAddress = GuestAddress(4 << 30);
const COUNT: usize = 8;
const USABLE: usize = 6;

/// UNPLUGGED_INACCESSIBLE.
const FEATURES: u64 = 1 << 1;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

fn span(block: u64, blocks: u16) -> Span {
    Span {
        address: START.0 + block * BLOCK,
        blocks,
    }
}

/// Blocks of which the host wants four.
fn blocks() -> Blocks {
    let mut blocks = Blocks::new(START, COUNT);
    blocks.request(4, USABLE);
    blocks
}

fn memory() -> Memory {
    let region = COUNT * BLOCK as usize;
    Memory::from_ranges(&[(GuestAddress(0), RAM), (START, region)]).unwrap()
}

fn mem() -> Mem {
    let mem = Mem::new(START, COUNT as u64 * BLOCK);
    mem.target().set(4 * BLOCK, USABLE as u64 * BLOCK);
    mem
}

fn active() -> (Mem, Driver) {
    let mut mem = mem();
    let mut driver = Driver::with_memory(&mem, memory());
    driver.activate(&mut mem, FEATURES).unwrap();
    (mem, driver)
}

fn message(kind: u16, span: Span) -> Vec<u8> {
    let mut bytes = vec![0; Request::SIZE];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&span.address.to_le_bytes());
    bytes[16..18].copy_from_slice(&span.blocks.to_le_bytes());
    bytes
}

/// Asks one thing; gives type and state of the answer.
fn ask(mem: &mut Mem, driver: &mut Driver, kind: u16, span: Span) -> (u8, u8) {
    let request = message(kind, span);
    let (head, addresses) = driver.chain(0, &[Out(&request), In(Answer::SIZE as u32)]);
    mem.queue_event(0).unwrap();
    assert_eq!(driver.used(0), [(head, Answer::SIZE as u32)]);
    let answer = driver.read(addresses[1], Answer::SIZE);
    (answer[0], answer[8])
}

#[test]
fn blocks_are_plugged_as_far_as_the_host_wants() {
    let mut blocks = blocks();
    assert_eq!(blocks.serve(Request::Plug(span(0, 3))).0, Answer::Ack);
    assert_eq!(blocks.serve(Request::Plug(span(3, 2))).0, Answer::Nack);
    assert_eq!(blocks.serve(Request::Plug(span(5, 1))).0, Answer::Ack);
    assert_eq!(blocks.plugged(), 4 * BLOCK);
    let state = |blocks: &mut Blocks, span| blocks.serve(Request::State(span)).0;
    assert_eq!(state(&mut blocks, span(0, 3)), Answer::Is(State::Plugged));
    assert_eq!(state(&mut blocks, span(3, 2)), Answer::Is(State::Unplugged));
    assert_eq!(state(&mut blocks, span(2, 2)), Answer::Is(State::Mixed));
}

#[test]
fn unplugged_blocks_are_handed_out_to_be_dropped() {
    let mut blocks = blocks();
    blocks.serve(Request::Plug(span(1, 4)));
    assert_eq!(
        blocks.serve(Request::Unplug(span(2, 2))),
        (
            Answer::Ack,
            Some((GuestAddress(START.0 + 2 * BLOCK), 2 * BLOCK))
        )
    );
    assert_eq!(blocks.plugged(), 2 * BLOCK);
    // One of them is not plugged any more.
    assert_eq!(
        blocks.serve(Request::Unplug(span(1, 2))),
        (Answer::Error, None)
    );
    assert_eq!(
        blocks.serve(Request::UnplugAll),
        (Answer::Ack, Some((START, USABLE as u64 * BLOCK)))
    );
    assert_eq!(blocks.plugged(), 0);
}

#[test]
fn requests_that_make_no_sense_change_nothing() {
    let mut blocks = blocks();
    blocks.serve(Request::Plug(span(0, 2)));
    let unaligned = Span {
        address: START.0 + BLOCK + 4096,
        blocks: 1,
    };
    let far = |address| Span { address, blocks: 1 };
    let senseless = [
        ("no block", span(2, 0)),
        ("unaligned", unaligned),
        ("before the region", far(START.0 - BLOCK)),
        ("RAM", far(0)),
        ("the end of all addresses", far(u64::MAX)),
        ("its last block", far(u64::MAX - BLOCK + 1)),
        ("behind what is usable", span(USABLE as u64, 1)),
        ("behind the region", span(COUNT as u64, 1)),
        ("beyond what is usable", span(5, 2)),
        ("as many blocks as can be said", span(2, u16::MAX)),
    ];
    for (what, span) in senseless {
        for request in [
            Request::Plug(span),
            Request::Unplug(span),
            Request::State(span),
        ] {
            assert_eq!(blocks.serve(request), (Answer::Error, None), "{what}");
        }
    }
    for overlap in [span(0, 1), span(1, 2), span(0, 4)] {
        assert_eq!(blocks.serve(Request::Plug(overlap)).0, Answer::Error);
    }
    assert_eq!(blocks.serve(Request::Unknown(4)), (Answer::Error, None));
    assert_eq!(blocks.plugged(), 2 * BLOCK);
}

#[test]
fn a_smaller_request_leaves_plugged_blocks_usable() {
    let mut blocks = blocks();
    blocks.serve(Request::Plug(span(2, 4)));
    blocks.request(1, 1);
    assert_eq!(blocks.plugged(), 4 * BLOCK);
    assert_eq!(blocks.serve(Request::Plug(span(0, 1))).0, Answer::Nack);
    assert_eq!(blocks.serve(Request::Unplug(span(2, 4))).0, Answer::Ack);
    // More than there is at all.
    blocks.request(usize::MAX, usize::MAX);
    assert_eq!(blocks.requested(), COUNT as u64 * BLOCK);
}

#[test]
fn configuration_space_tells_place_and_sizes() {
    let (mut mem, mut driver) = active();
    assert_eq!(ask(&mut mem, &mut driver, PLUG, span(0, 3)), (0, 0));
    let mut config = [0xff; 60];
    mem.read_config(0, &mut config);
    let word = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    assert_eq!(
        [0, 8, 16, 24, 32, 40, 48].map(word),
        [
            BLOCK,
            0,
            START.0,
            COUNT as u64 * BLOCK,
            USABLE as u64 * BLOCK,
            3 * BLOCK,
            4 * BLOCK
        ]
    );
    assert_eq!(config[56..], [0xff; 4]);
}

#[test]
fn the_host_asks_by_interrupt_and_hears_once() {
    let (mut mem, mut driver) = active();
    let target = mem.target();
    let before = driver.interrupt.generation();
    target.set(2 * BLOCK, 2 * BLOCK);
    assert_eq!(driver.interrupt.status(), 2);
    assert_eq!(driver.interrupt.generation(), before + 1);
    assert_eq!(target.reached(), None);
    assert_eq!(ask(&mut mem, &mut driver, PLUG, span(0, 1)), (0, 0));
    assert_eq!(target.reached(), None);
    assert_eq!(ask(&mut mem, &mut driver, PLUG, span(1, 1)), (0, 0));
    assert_eq!(target.reached(), Some(2 * BLOCK));
    assert_eq!(target.reached(), None);
}

#[test]
fn unplugged_memory_goes_back_to_the_host() {
    let (mut mem, mut driver) = active();
    ask(&mut mem, &mut driver, PLUG, span(0, 2));
    let byte = |driver: &Driver, block: u64| driver.read(START.0 + block * BLOCK, 1)[0];
    for block in 0..2 {
        let address = GuestAddress(START.0 + block * BLOCK);
        driver.memory.write_slice(&[7], address).unwrap();
    }
    assert_eq!(ask(&mut mem, &mut driver, UNPLUG, span(1, 1)), (0, 0));
    assert_eq!([0, 1].map(|block| byte(&driver, block)), [7, 0]);
    assert_eq!(ask(&mut mem, &mut driver, STATE, span(0, 2)), (0, 2));
    assert_eq!(ask(&mut mem, &mut driver, UNPLUG_ALL, span(0, 0)), (0, 0));
    assert_eq!(byte(&driver, 0), 0);
}

#[test]
fn blocks_outlive_a_reset() {
    let (mut mem, mut driver) = active();
    ask(&mut mem, &mut driver, PLUG, span(0, 2));
    mem.reset();
    // No driver, no interrupt; the wish is kept for the next one.
    mem.target().set(3 * BLOCK, 3 * BLOCK);
    driver.activate(&mut mem, FEATURES).unwrap();
    assert_eq!(ask(&mut mem, &mut driver, STATE, span(0, 2)), (0, 0));
    assert_eq!(ask(&mut mem, &mut driver, PLUG, span(2, 1)), (0, 0));
}

#[test]
fn refused_requests_are_answered_and_counted() {
    let (mut mem, mut driver) = active();
    assert_eq!(ask(&mut mem, &mut driver, PLUG, span(0, 5)), (1, 0));
    assert_eq!(ask(&mut mem, &mut driver, PLUG, span(0, u16::MAX)), (3, 0));
    assert_eq!(ask(&mut mem, &mut driver, u16::MAX, span(0, 1)), (3, 0));
    assert!(mem.counters().contains(&("refused", 3)));
}

#[test]
fn requests_without_room_stop_the_device() {
    let short = message(PLUG, span(0, 1));
    let requests: [&[crate::virtio::driver::Part<'_>]; 4] = [
        &[Out(&short[..23]), In(10)],
        &[Out(&short), In(9)],
        &[Out(&short)],
        &[In(64)],
    ];
    for request in requests {
        let (mut mem, mut driver) = active();
        driver.chain(0, request);
        let outcome = mem.queue_event(0);
        assert!(
            matches!(outcome, Err(DeviceError::Hostile(_))),
            "{request:?}: {outcome:?}"
        );
        assert!(mem.counters().contains(&("plugged_bytes", 0)));
    }
}

#[test]
fn a_broken_ring_stops_the_device() {
    attack(0, 0, mem);
}

#[test]
fn a_storm_of_requests_is_served_in_turns() {
    let (mut mem, mut driver) = active();
    let request = message(STATE, span(0, 1));
    for _ in 0..MAX_REQUESTS_PER_EVENT + 1 {
        driver.chain(0, &[Out(&request), In(Answer::SIZE as u32)]);
    }
    mem.queue_event(0).unwrap();
    assert_eq!(driver.used(0).len(), MAX_REQUESTS_PER_EVENT);
    assert!(driver.kicked(0));
    mem.queue_event(0).unwrap();
    assert_eq!(driver.used(0).len(), 1);
    assert!(!driver.kicked(0));
}
