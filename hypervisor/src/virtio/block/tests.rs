use super::{Block, BlockError, MAX_DATA, QUEUE_SIZE, SECTOR};
use crate::virtio::driver::Part::{In, Out};
use crate::virtio::driver::{Driver, NEXT, RAM, WRITE, attack};
use crate::virtio::{DeviceError, VirtioDevice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::Write;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const SECTORS: u64 = 64;

fn image() -> File {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[sector as u8 + 1; SECTOR as usize])
            .unwrap();
    }
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn clear_segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &count.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

fn disk(file: &File, read_only: bool) -> (Block, Driver) {
    let fd = OwnedFd::from(file.try_clone().unwrap());
    let mut block = Block::new("coffer-0", Some(fd), read_only).unwrap();
    let mut driver = Driver::new(&block);
    driver.activate(&mut block, 0).unwrap();
    (block, driver)
}

/// Waits for the worker and lets the device take its reports.
fn settle(block: &mut Block) {
    let (fd, ..) = block.sources()[0];
    #[allow(unsafe_code)]
    // SAFETY: the eventfd lives as long as the device.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    assert_eq!(
        poll(
            &mut [PollFd::new(fd, PollFlags::POLLIN)],
            PollTimeout::from(10_000u16)
        ),
        Ok(1)
    );
    block
        .source_event(0, vmm_sys_util::epoll::EventSet::IN)
        .unwrap();
}

/// Runs one request; gives its used length, the data it read, and its status.
fn request(block: &mut Block, driver: &mut Driver, out: &[u8], data_in: u32) -> (u32, Vec<u8>, u8) {
    let (head, addresses) = driver.chain(0, &[Out(out), In(data_in), In(1)]);
    block.queue_event(0).unwrap();
    let mut used = driver.used(0);
    while used.is_empty() {
        settle(block);
        used = driver.used(0);
    }
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].0, head);
    (
        used[0].1,
        driver.read(addresses[1], data_in as usize),
        driver.read(addresses[2], 1)[0],
    )
}

fn status(block: &mut Block, driver: &mut Driver, out: &[u8], data_in: u32) -> u8 {
    request(block, driver, out, data_in).2
}

#[test]
fn what_is_written_is_read_and_in_the_file() {
    let file = image();
    let (mut block, mut driver) = disk(&file, false);
    let data: Vec<u8> = (0..8 * SECTOR).map(|n| (n * 7) as u8).collect();
    let (written, _, code) = request(
        &mut block,
        &mut driver,
        &[header(OUT, 3), data.clone()].concat(),
        0,
    );
    assert_eq!((written, code), (1, OK));
    assert_eq!(status(&mut block, &mut driver, &header(FLUSH, 0), 0), OK);
    assert_eq!(content(&file)[3 * 512..11 * 512], data);
    assert_eq!(
        content(&file)[..3 * 512].iter().filter(|b| **b > 3).count(),
        0
    );
    let (written, read, code) = request(&mut block, &mut driver, &header(IN, 3), 8 * 512);
    assert_eq!((written, code), (8 * 512 + 1, OK));
    assert_eq!(read, data);
}

#[test]
fn framing_is_the_drivers_affair() {
    let file = image();
    let (mut block, mut driver) = disk(&file, false);
    let head = header(OUT, 1);
    let data = [0xab; 512];
    driver.chain(
        0,
        &[
            Out(&head[..5]),
            Out(&head[5..]),
            Out(&data[..100]),
            Out(&data[100..]),
            In(0),
            In(1),
        ],
    );
    block.queue_event(0).unwrap();
    settle(&mut block);
    assert_eq!(driver.used(0).len(), 1);
    assert_eq!(content(&file)[512..1024], data);
    // Status in the same buffer as the data.
    let (_, at) = driver.chain(0, &[Out(&header(IN, 1)), In(200), In(313)]);
    block.queue_event(0).unwrap();
    settle(&mut block);
    assert_eq!(driver.used(0)[0].1, 513);
    assert_eq!(
        [driver.read(at[1], 200), driver.read(at[2], 312)].concat(),
        data
    );
    assert_eq!(driver.read(at[2] + 312, 1), [OK]);
}

#[test]
fn the_guest_reads_serial_and_capacity() {
    let (mut block, mut driver) = disk(&image(), true);
    let (_, id, code) = request(&mut block, &mut driver, &header(GET_ID, 0), 20);
    assert_eq!(
        (&id[..], code),
        (&b"coffer-0\0\0\0\0\0\0\0\0\0\0\0\0"[..], OK)
    );
    assert_eq!(
        status(&mut block, &mut driver, &header(GET_ID, 0), 19),
        IO_ERROR
    );
    let mut config = [0xff; 64];
    block.read_config(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[57..], [0xff; 7]);
    block.read_config(u64::MAX, &mut config);
    assert!(matches!(
        Block::new(&"x".repeat(21), None, true),
        Err(BlockError::LongSerial(_))
    ));
}

#[test]
fn a_read_only_disk_never_changes() {
    let file = image();
    let before = content(&file);
    // The file is open for writing: it is the device that refuses.
    let (mut block, mut driver) = disk(&file, true);
    assert_ne!(block.features() & 1 << 5, 0);
    assert_eq!(block.features() & (1 << 13 | 1 << 14), 0);
    for out in [
        [header(OUT, 0), vec![9; 512]].concat(),
        [header(DISCARD, 0), clear_segment(0, 1, 0)].concat(),
        [header(WRITE_ZEROES, 0), clear_segment(0, 1, 1)].concat(),
        [header(WRITE_ZEROES, 0), clear_segment(0, 1, 0)].concat(),
    ] {
        assert_eq!(status(&mut block, &mut driver, &out, 0), IO_ERROR);
    }
    assert_eq!(status(&mut block, &mut driver, &header(IN, 0), 512), OK);
    block.reset();
    assert_eq!(content(&file), before);
}

#[test]
fn nothing_beyond_the_end_is_reached() {
    let file = image();
    let before = content(&file);
    let (mut block, mut driver) = disk(&file, false);
    for sector in [
        SECTORS,
        SECTORS - 1,
        u64::MAX,
        u64::MAX / 512,
        u64::MAX / 512 + 1,
        1 << 55,
        u64::MAX - 1,
    ] {
        let out = [header(OUT, sector), vec![9; 1024]].concat();
        assert_eq!(
            status(&mut block, &mut driver, &out, 0),
            IO_ERROR,
            "write at {sector}"
        );
        assert_eq!(
            status(&mut block, &mut driver, &header(IN, sector), 1024),
            IO_ERROR,
            "read at {sector}"
        );
        let out = [header(WRITE_ZEROES, 0), clear_segment(sector, 2, 0)].concat();
        assert_eq!(
            status(&mut block, &mut driver, &out, 0),
            IO_ERROR,
            "zeroes at {sector}"
        );
    }
    for count in [SECTORS as u32 + 1, u32::MAX] {
        let out = [header(DISCARD, 0), clear_segment(0, count, 0)].concat();
        assert_eq!(
            status(&mut block, &mut driver, &out, 0),
            IO_ERROR,
            "discard of {count}"
        );
    }
    assert_eq!(content(&file), before);
    assert_eq!(
        status(&mut block, &mut driver, &header(IN, SECTORS - 2), 1024),
        OK
    );
}

#[test]
fn odd_requests_get_an_error_status() {
    let (mut block, mut driver) = disk(&image(), false);
    for (out, data_in, expected) in [
        (header(99, 0), 0, UNSUPPORTED),
        (header(u32::MAX, 0), 512, UNSUPPORTED),
        (header(IN, 0), 511, IO_ERROR),
        (header(IN, 0), 0, OK),
        ([header(OUT, 0), vec![0; 100]].concat(), 0, IO_ERROR),
        (header(IN, 0)[..15].to_vec(), 512, IO_ERROR),
        (vec![], 512, IO_ERROR),
        (
            [
                header(DISCARD, 0),
                clear_segment(0, 1, 0),
                clear_segment(1, 1, 0),
            ]
            .concat(),
            0,
            IO_ERROR,
        ),
        ([header(DISCARD, 0), vec![0; 15]].concat(), 0, IO_ERROR),
        (
            [header(DISCARD, 0), clear_segment(0, 1, 1)].concat(),
            0,
            UNSUPPORTED,
        ),
        (
            [header(WRITE_ZEROES, 0), clear_segment(0, 1, 2)].concat(),
            0,
            UNSUPPORTED,
        ),
    ] {
        assert_eq!(
            status(&mut block, &mut driver, &out, data_in),
            expected,
            "{out:?} {data_in}"
        );
    }
}

#[test]
fn zeroes_reach_the_file() {
    let file = image();
    let (mut block, mut driver) = disk(&file, false);
    let out = [header(DISCARD, 0), clear_segment(8, 8, 0)].concat();
    assert_eq!(status(&mut block, &mut driver, &out, 0), OK);
    assert_eq!(content(&file)[8 * 512..16 * 512], [0; 8 * 512]);
    let out = [header(WRITE_ZEROES, 0), clear_segment(1, 1, 1)].concat();
    assert_eq!(status(&mut block, &mut driver, &out, 0), OK);
    assert_eq!(content(&file)[512..1024], [0; 512]);
    assert_eq!(content(&file)[1024], 3);
    assert_eq!(content(&file).len() as u64, SECTORS * 512);
}

#[test]
fn a_chain_without_room_for_the_status_stops_the_device() {
    for parts in [&[Out(&[0; 16])][..], &[Out(&[0; 16]), In(0)]] {
        let (mut block, mut driver) = disk(&image(), false);
        driver.chain(0, parts);
        assert!(matches!(block.queue_event(0), Err(DeviceError::Hostile(_))));
        assert!(driver.used(0).is_empty());
    }
}

#[test]
fn a_broken_ring_stops_the_device() {
    let file = image();
    attack(0, 0, || {
        Block::new("", Some(file.try_clone().unwrap().into()), false).unwrap()
    });
}

#[test]
fn a_request_larger_than_any_honest_one_is_refused() {
    // One descriptor over all of RAM, 255 times: more than the limits allow, all of it valid memory.
    let (mut block, mut driver) = disk(&image(), false);
    let head = driver.buffer(&header(IN, 0));
    driver.descriptor(0, 0, (head, 16), NEXT, 1);
    for index in 1..QUEUE_SIZE {
        let more = if index + 1 < QUEUE_SIZE { NEXT } else { 0 };
        driver.descriptor(
            0,
            index,
            (0x10_0000, RAM as u32 - 0x10_0000),
            WRITE | more,
            index + 1,
        );
    }
    assert!((RAM as u64 - 0x10_0000) * u64::from(QUEUE_SIZE - 1) > MAX_DATA);
    driver.offer(0, 0);
    block.queue_event(0).unwrap();
    assert_eq!(driver.used(0), [(0, 0)]);
    assert_eq!(driver.read(RAM as u64 - 1, 1), [IO_ERROR]);
}

#[test]
fn data_over_status_and_rings_harms_only_the_guest() {
    let (mut block, mut driver) = disk(&image(), false);
    let head = driver.buffer(&header(IN, 0));
    // The data lands on the descriptor table, the available ring, and the status byte.
    driver.descriptor(0, 0, (head, 16), NEXT, 1);
    driver.descriptor(0, 1, (0, 0x5000), WRITE | NEXT, 2);
    driver.descriptor(0, 2, (0x100, 1), WRITE, 0);
    driver.offer(0, 0);
    // The available index becomes garbage, which the device sees at once or after the request.
    let outcome = block.queue_event(0).and_then(|()| {
        settle(&mut block);
        assert_eq!(driver.used(0), [(0, 0x5001)]);
        block.queue_event(0)
    });
    assert!(
        matches!(outcome, Err(DeviceError::Hostile(_))),
        "{outcome:?}"
    );
    block.reset();
}

#[test]
fn reused_chains_do_not_pile_up() {
    let (mut block, mut driver) = disk(&image(), false);
    for _ in 0..QUEUE_SIZE {
        driver.chain(0, &[Out(&header(FLUSH, 0)), In(1)]);
    }
    block.queue_event(0).unwrap();
    assert!(
        driver.kicked(0),
        "the turn ended before the queue was seen empty"
    );
    block.queue_event(0).unwrap();
    driver.offer(0, 0);
    assert!(matches!(block.queue_event(0), Err(DeviceError::Hostile(_))));
    block.reset();
}

#[test]
fn a_reset_leaves_nothing_in_flight() {
    let file = image();
    let (mut block, mut driver) = disk(&file, false);
    for round in 0..200 {
        for sector in 0..32 {
            driver.chain(0, &[Out(&header(IN, sector)), In(512), In(1)]);
        }
        block.queue_event(0).unwrap();
        block.reset();
        let before = driver.read(0, RAM);
        assert!(
            block
                .source_event(0, vmm_sys_util::epoll::EventSet::IN)
                .is_ok()
        );
        assert!(
            before == driver.read(0, RAM),
            "memory changed after reset {round}"
        );
        driver.activate(&mut block, 0).unwrap();
        assert!(driver.used(0).is_empty());
    }
    assert_eq!(status(&mut block, &mut driver, &header(IN, 0), 512), OK);
}

#[test]
fn an_empty_slot_gets_a_file_and_another() {
    let mut block = Block::new("slot", None, false).unwrap();
    assert_eq!(block.kind(), 0);
    let mut driver = Driver::new(&block);
    driver.activate(&mut block, 0).unwrap();
    let capacity = |block: &Block| {
        let mut bytes = [0; 8];
        block.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(capacity(&block), 0);
    assert_eq!(
        status(&mut block, &mut driver, &header(FLUSH, 0), 0),
        IO_ERROR
    );
    block.set_backend(Some(image().into())).unwrap();
    assert_eq!(driver.interrupt.status() & 2, 2);
    assert_eq!(capacity(&block), SECTORS);
    assert_eq!(
        request(&mut block, &mut driver, &header(IN, 1), 512).1,
        [2; 512]
    );
    assert!(block.set_backend(Some(image().into())).is_err());
    assert_eq!(block.kind(), 2);
    block.set_backend(None).unwrap();
    assert_eq!((capacity(&block), block.kind()), (0, 0));
}

#[test]
fn a_slot_is_as_writable_as_its_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SECTORS * SECTOR).unwrap();
    let mut block = Block::new("slot", None, false).unwrap();
    let read_only_bit = 1 << 5;
    let sector = [&header(OUT, 1)[..], &[7; 512]].concat();
    let cases = [
        (File::open(file.path()).unwrap(), IO_ERROR),
        (file.reopen().unwrap(), OK),
    ];
    for (opened, expected) in cases {
        block.set_backend(Some(opened.into())).unwrap();
        assert_eq!(block.features() & read_only_bit != 0, expected == IO_ERROR);
        // A driver that writes all the same.
        let mut driver = Driver::new(&block);
        driver.activate(&mut block, 0).unwrap();
        assert_eq!(status(&mut block, &mut driver, &sector, 0), expected);
        block.set_backend(None).unwrap();
        block.reset();
    }
    assert_eq!(content(file.as_file())[512..1024], [7; 512]);
}

#[test]
fn a_file_cut_short_is_an_io_error_and_its_new_size_is_seen_after_a_reset() {
    let file = image();
    let (mut block, mut driver) = disk(&file, false);
    file.set_len(8 * 512).unwrap();
    assert_eq!(
        status(&mut block, &mut driver, &header(IN, 7), 1024),
        IO_ERROR
    );
    block.reset();
    let mut capacity = [0; 8];
    block.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 8);
}
