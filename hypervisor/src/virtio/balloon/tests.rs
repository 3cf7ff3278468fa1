use super::{Balloon, DEFLATE, INFLATE, MAX_PAGES, MAX_REQUESTS_PER_EVENT, PAGE, REPORTING};
use crate::virtio::driver::Part::{In, Out};
use crate::virtio::driver::{Driver, NEXT, RAM, WRITE, attack};
use crate::virtio::{DeviceError, Memory, VirtioDevice};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use vm_memory::{Bytes, FileOffset, GuestAddress};

/// DEFLATE_ON_OOM and REPORTING.
const FEATURES: u64 = 1 << 2 | 1 << 5;
/// Where a test's free memory begins, in pages.
const FREE: u32 = 0x200;

fn balloon() -> (Balloon, Driver) {
    let mut balloon = Balloon::new();
    let mut driver = Driver::new(&balloon);
    driver.activate(&mut balloon, FEATURES).unwrap();
    (balloon, driver)
}

fn pages(numbers: &[u32]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

/// Fills `count` pages from [`FREE`] with their distance from it, plus one.
fn fill(driver: &Driver, count: u32) {
    for page in 0..count {
        let address = GuestAddress(u64::from(FREE + page) * PAGE);
        driver
            .memory
            .write_slice(&[page as u8 + 1; PAGE as usize], address)
            .unwrap();
    }
}

/// First byte of each page from [`FREE`].
fn firsts(driver: &Driver, count: u32) -> Vec<u8> {
    (0..count)
        .map(|page| driver.read(u64::from(FREE + page) * PAGE, 1)[0])
        .collect()
}

#[test]
fn reported_ranges_leave_the_memory_file() {
    let path = tempfile::tempfile().unwrap();
    path.set_len(RAM as u64).unwrap();
    let file: File = path.try_clone().unwrap();
    let ranges = [(GuestAddress(0), RAM, Some(FileOffset::new(path, 0)))];
    let memory = Memory::from_ranges_with_files(ranges).unwrap();
    let mut balloon = Balloon::new();
    let mut driver = Driver::with_memory(&balloon, memory);
    driver.activate(&mut balloon, FEATURES).unwrap();
    fill(&driver, 64);
    file.sync_all().unwrap();
    let before = file.metadata().unwrap().blocks();
    let start = u64::from(FREE) * PAGE;
    driver.descriptor(
        REPORTING,
        0,
        (start + 8 * PAGE, 8 * PAGE as u32),
        WRITE | NEXT,
        1,
    );
    driver.descriptor(
        REPORTING,
        1,
        (start + 32 * PAGE, 16 * PAGE as u32),
        WRITE,
        0,
    );
    driver.offer(REPORTING, 0);
    balloon.queue_event(REPORTING).unwrap();
    assert_eq!(driver.used(REPORTING), [(0, 0)]);
    assert_eq!(driver.interrupt.status(), 1);
    let expected = |page: u32| {
        if (8..16).contains(&page) || (32..48).contains(&page) {
            0
        } else {
            page as u8 + 1
        }
    };
    assert_eq!(
        firsts(&driver, 64),
        (0..64).map(expected).collect::<Vec<_>>()
    );
    assert!(file.metadata().unwrap().blocks() + 24 * 8 <= before);
    assert_eq!(balloon.counters()[0], ("discarded_bytes", 24 * PAGE));
}

#[test]
fn inflated_pages_are_dropped_and_come_back_at_deflate() {
    let (mut balloon, mut driver) = balloon();
    fill(&driver, 8);
    // Neighbours, a loner, and one twice.
    driver.chain(
        INFLATE,
        &[
            Out(&pages(&[FREE, FREE + 1, FREE + 2])),
            Out(&pages(&[FREE + 5, FREE + 5])),
        ],
    );
    balloon.queue_event(INFLATE).unwrap();
    assert_eq!(firsts(&driver, 8), [0, 0, 0, 4, 5, 0, 7, 8]);
    driver.chain(DEFLATE, &[Out(&pages(&[FREE]))]);
    balloon.queue_event(DEFLATE).unwrap();
    assert_eq!(
        (driver.used(INFLATE), driver.used(DEFLATE)),
        (vec![(0, 0)], vec![(0, 0)])
    );
    driver
        .memory
        .write_slice(&[9], GuestAddress(u64::from(FREE) * PAGE))
        .unwrap();
    assert_eq!(firsts(&driver, 1), [9]);
}

#[test]
fn only_whole_pages_are_dropped() {
    let (mut balloon, mut driver) = balloon();
    fill(&driver, 4);
    driver.descriptor(
        REPORTING,
        0,
        (u64::from(FREE) * PAGE + 1, 3 * PAGE as u32 - 2),
        WRITE,
        0,
    );
    driver.offer(REPORTING, 0);
    balloon.queue_event(REPORTING).unwrap();
    assert_eq!(firsts(&driver, 4), [1, 0, 3, 4]);
}

#[test]
fn memory_the_guest_does_not_have_stops_the_device_untouched() {
    let end = (RAM as u64 / PAGE) as u32;
    for numbers in [
        &[end][..],
        &[u32::MAX],
        &[end - 1, end],
        &[0x000c_0000],
        &[u32::MAX - 1, u32::MAX],
    ] {
        let (mut balloon, mut driver) = balloon();
        fill(&driver, 4);
        driver
            .memory
            .write_slice(&[7], GuestAddress(u64::from(end - 1) * PAGE))
            .unwrap();
        driver.chain(INFLATE, &[Out(&pages(numbers))]);
        let outcome = balloon.queue_event(INFLATE);
        assert!(
            matches!(outcome, Err(DeviceError::Hostile(_))),
            "{numbers:?}: {outcome:?}"
        );
        assert_eq!(firsts(&driver, 4), [1, 2, 3, 4]);
        assert_eq!(driver.read(u64::from(end - 1) * PAGE, 1), [7]);
        assert_eq!(balloon.counters()[0].1, 0);
    }
}

#[test]
fn odd_requests_stop_the_device() {
    let too_many = vec![0; (MAX_PAGES + 1) * 4];
    for parts in [
        &[Out(&[0; 3])][..],
        &[Out(&[0; 4]), Out(&[0; 1])],
        &[Out(&too_many)],
    ] {
        let (mut balloon, mut driver) = balloon();
        driver.chain(INFLATE, parts);
        assert!(matches!(
            balloon.queue_event(INFLATE),
            Err(DeviceError::Hostile(_))
        ));
    }
}

#[test]
fn the_wrong_direction_drops_nothing() {
    let (mut balloon, mut driver) = balloon();
    fill(&driver, 2);
    driver.chain(INFLATE, &[In(8)]);
    balloon.queue_event(INFLATE).unwrap();
    driver.descriptor(
        REPORTING,
        0,
        (u64::from(FREE) * PAGE, 2 * PAGE as u32),
        0,
        0,
    );
    driver.offer(REPORTING, 0);
    balloon.queue_event(REPORTING).unwrap();
    assert_eq!(firsts(&driver, 2), [1, 2]);
    assert_eq!(balloon.counters()[0].1, 0);
}

#[test]
fn a_broken_ring_stops_the_device() {
    for queue in [INFLATE, DEFLATE, REPORTING] {
        attack(queue, 0, Balloon::new);
    }
}

#[test]
fn a_storm_of_requests_is_served_in_turns() {
    let (mut balloon, mut driver) = balloon();
    for _ in 0..MAX_REQUESTS_PER_EVENT + 1 {
        driver.chain(DEFLATE, &[Out(&pages(&[FREE]))]);
    }
    balloon.queue_event(DEFLATE).unwrap();
    assert_eq!(driver.used(DEFLATE).len(), MAX_REQUESTS_PER_EVENT);
    assert!(driver.kicked(DEFLATE));
    balloon.queue_event(DEFLATE).unwrap();
    assert_eq!(driver.used(DEFLATE).len(), 1);
    assert!(!driver.kicked(DEFLATE));
}

#[test]
fn only_actual_can_be_written() {
    let (mut balloon, _) = balloon();
    balloon.write_config(0, &[1, 2, 3, 4]);
    balloon.write_config(4, &[5, 6, 7, 8]);
    balloon.write_config(6, &[9; 4]);
    balloon.write_config(u64::MAX, &[9; 4]);
    let mut config = [0xff; 10];
    balloon.read_config(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 5, 6, 7, 8, 0xff, 0xff]);
}
