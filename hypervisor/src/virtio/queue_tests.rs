use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::driver::Part::In;
use crate::virtio::driver::{Driver, INDIRECT, NEXT, RAM, WRITE, ring_addresses};
use crate::virtio::rng::Rng;

/// A buffer of the tests.
const BUFFER: u64 = 0x10_0000;

#[test]
fn a_whole_indirect_chain_is_taken() {
    let mut driver = Driver::new(&Rng::default());
    let mut queue = driver.queue(0);
    driver.descriptor_at(0x9000, (BUFFER, 16), WRITE | NEXT, 1);
    driver.descriptor_at(0x9010, (BUFFER + 64, 16), WRITE, 0);
    driver.descriptor(0, 0, (0x9000, 32), INDIRECT, 0);
    driver.offer(0, 0);
    let chain = pop(&mut queue, &driver.memory).unwrap().unwrap();
    assert_eq!((chain.writable.len(), chain.writable_len()), (2, 32));
}

#[test]
fn buffers_may_overlap_each_other_and_the_rings_without_harm_to_the_host() {
    let mut rng = Rng::default();
    let mut driver = Driver::new(&rng);
    driver.activate(&mut rng, 0).unwrap();
    let [descriptors, _, used] = ring_addresses(0).map(u64::from);
    for (index, at) in [(0, used), (1, descriptors)] {
        driver.descriptor(0, index, (at, 512), WRITE | NEXT, index + 1);
    }
    driver.descriptor(0, 2, (used, 512), WRITE, 0);
    driver.offer(0, 0);
    rng.queue_event(0).unwrap();
    rng.reset();
    driver.activate(&mut rng, 0).unwrap();
    let (head, _) = driver.chain(0, &[In(16)]);
    rng.queue_event(0).unwrap();
    assert_eq!(driver.used(0), [(head, 16)]);
}

#[test]
fn a_refused_chain_is_not_parsed_again() {
    let mut driver = Driver::new(&Rng::default());
    let mut queue = driver.queue(0);
    driver.descriptor(0, 0, (RAM as u64, 16), WRITE, 0);
    driver.offer(0, 0);
    driver.descriptor(0, 1, (BUFFER, 16), WRITE, 0);
    driver.offer(0, 1);
    assert!(matches!(
        pop(&mut queue, &driver.memory),
        Err(QueueError::OutsideRam { head: 0, .. })
    ));
    assert_eq!(pop(&mut queue, &driver.memory).unwrap().unwrap().head, 1);
    assert_eq!(pop(&mut queue, &driver.memory).unwrap(), None);
}

#[test]
fn descriptors_that_change_after_the_look_change_nothing() {
    let mut driver = Driver::new(&Rng::default());
    let mut queue = driver.queue(0);
    driver.descriptor(0, 0, (BUFFER, 16), WRITE, 0);
    driver.offer(0, 0);
    let chain = pop(&mut queue, &driver.memory).unwrap().unwrap();
    driver.descriptor(0, 0, (RAM as u64 - 4, u32::MAX), WRITE, 0);
    chain.write(&driver.memory, 0, &[7; 16]).unwrap();
    assert_eq!(driver.read(BUFFER, 16), [7; 16]);
    assert!(matches!(
        chain.write(&driver.memory, 1, &[7; 16]),
        Err(QueueError::Short {
            have: 16,
            want: 17,
            ..
        })
    ));
}

#[test]
fn a_turn_ends_at_its_limit_and_asks_for_another() {
    let mut driver = Driver::new(&Rng::default());
    let mut active = driver.activation(0);
    for _ in 0..5 {
        driver.chain(0, &[In(16)]);
    }
    let mut served = Vec::new();
    serve(&mut active, 0, 3, |chain, _| {
        served.push(chain.head);
        // The second is kept by the device.
        Ok((chain.head != 1).then_some(7))
    })
    .unwrap();
    assert_eq!(served, [0, 1, 2]);
    assert_eq!(driver.used(0), [(0, 7), (2, 7)]);
    assert!(driver.kicked(0), "two more wait");
}
