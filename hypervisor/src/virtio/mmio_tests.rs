use super::*;
use crate::virtio::fake_driver::{Buf, FakeDriver, RAM};
use crate::virtio::queue::{self, QueueError};
use crate::virtio::rng::Rng;
use crate::virtio::slot::Slot;
use std::sync::Arc;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const QUEUE_SIZE: u16 = 64;

fn hostile(result: Result<(), DeviceError>) -> String {
    match result {
        Err(DeviceError::Hostile(cause)) => cause.to_string(),
        other => panic!("taken: {other:?}"),
    }
}

#[test]
fn the_identity_registers_say_what_linux_looks_for() {
    let driver = FakeDriver::cold(Rng::default());
    assert_eq!(
        (driver.get(0), driver.get(4), driver.get(8)),
        (0x7472_6976, 2, 4)
    );
    assert_eq!((driver.get(0xb0), driver.get(0xb4)), (u32::MAX, u32::MAX));
    let mut byte = [7];
    driver.transport.read(0x70, &mut byte);
    assert_eq!(byte, [7], "a register is not readable by bytes");
}

#[test]
fn registers_are_frozen_after_driver_ok() {
    let mut driver = FakeDriver::new(Rng::default());
    assert!(driver.transport.is_active());
    let before = driver.transport.rejected();
    for (register, value) in [
        (0x38, 8),
        (0x44, 0),
        (0x80, 0xdead_0000),
        (0x90, 2),
        (0xa0, 4),
        (0x20, 0),
        (0x84, 1),
    ] {
        driver.set(register, value);
    }
    assert_eq!(driver.transport.rejected() - before, 7);
    assert_eq!(driver.get(0x44), 1);
    driver.offer(0, &[Buf::Write(0x8000, 16)]);
    driver.kick(0).unwrap();
    assert_eq!(driver.used(0), [(0, 16)], "the old rings are still in use");
}

#[test]
fn status_bits_come_in_order_and_never_go() {
    let mut driver = FakeDriver::cold(Rng::default());
    for skipped in [2, 4, 8, 15, 5, 0x20, 0xffff_ffff] {
        driver.set(0x70, skipped);
        assert_eq!(driver.get(0x70), 0, "{skipped:#x} was taken");
    }
    driver.bring_up();
    driver.work().unwrap();
    assert_eq!(driver.get(0x70), 15);
    driver.set(0x70, 7);
    assert_eq!(driver.get(0x70), 15);
    driver.set(0x70, 0x8f);
    assert_eq!(driver.get(0x70), 0x8f, "FAILED may be set at any time");
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for (select, value) in [(0, 1), (1, 3), (1, 0)] {
        let mut driver = FakeDriver::cold(Rng::default());
        driver.set(0x70, 1);
        driver.set(0x70, 3);
        driver.set(0x24, 1);
        driver.set(0x20, if select == 1 { value } else { 1 });
        if select == 0 {
            driver.set(0x24, 0);
            driver.set(0x20, value);
        }
        driver.set(0x70, 11);
        assert_eq!(driver.get(0x70), 3, "features {value:#x} of half {select}");
    }
}

#[test]
fn a_ring_outside_ram_ends_in_needs_reset_and_a_reset_repairs_it() {
    for (register, address) in [
        (0x80, RAM as u32),
        (0xa0, RAM as u32 - 8),
        (0x90, RAM as u32 - 2),
        (0x80, 8),
        (0xa4, 9),
    ] {
        let mut driver = FakeDriver::cold(Rng::default());
        driver.bring_up();
        // Back to before DRIVER_OK, with one bad address.
        driver.set(0x70, 0);
        driver.work().unwrap();
        for status in [1, 3] {
            driver.set(0x70, status);
        }
        driver.set(0x24, 1);
        driver.set(0x20, 1);
        driver.set(0x70, 11);
        driver.set(register, address);
        driver.set(0x44, 1);
        driver.set(0x70, 15);
        hostile(driver.work());
        driver.transport.needs_reset();
        assert_eq!(driver.get(0x70), 15 | 64);
        assert_eq!(
            driver.get(0x60),
            2,
            "the driver is told by a configuration interrupt"
        );
        driver.bring_up();
        driver.work().unwrap();
        assert_eq!(driver.get(0x70), 15);
    }
}

#[test]
fn a_reset_takes_everything_back() {
    let mut driver = FakeDriver::new(Rng::default());
    driver.offer(0, &[Buf::Write(0x8000, 16)]);
    driver.set(QUEUE_NOTIFY, 0);
    driver.set(0x70, 0);
    driver.work().unwrap();
    assert!(!driver.transport.is_active());
    assert!(
        driver.transport.notify()[0].read().is_err(),
        "the old kick is gone"
    );
    assert_eq!(
        (driver.get(0x70), driver.get(0x44), driver.get(0x60)),
        (0, 0, 0)
    );
    driver.set(QUEUE_NOTIFY, 0);
    assert!(
        driver.transport.notify()[0].read().is_err(),
        "a kick of a dead device does nothing"
    );
}

#[test]
fn queue_sizes_that_are_no_power_of_two_or_too_large_are_refused() {
    let mut driver = FakeDriver::cold(Rng::default());
    for status in [1, 3] {
        driver.set(0x70, status);
    }
    driver.set(0x24, 1);
    driver.set(0x20, 1);
    driver.set(0x70, 11);
    let before = driver.transport.rejected();
    for size in [0, 3, 128, 0x1_0040] {
        driver.set(0x38, size);
    }
    driver.set(0x30, 77);
    assert_eq!(driver.get(0x34), 0);
    driver.set(0x44, 1);
    assert_eq!(driver.transport.rejected() - before, 5);
}

#[test]
fn a_chain_with_a_cycle_is_refused() {
    let mut driver = FakeDriver::new(Rng::default());
    driver.descriptor(0, 0, (0x8000, 16, WRITE | NEXT, 1));
    driver.descriptor(0, 1, (0x8000, 16, WRITE | NEXT, 0));
    driver.publish(0, 0);
    hostile(driver.kick(0));
}

#[test]
fn indices_out_of_bounds_are_refused() {
    for (head, next) in [
        (0, QUEUE_SIZE),
        (0, u16::MAX),
        (QUEUE_SIZE, 0),
        (u16::MAX, 0),
    ] {
        let mut driver = FakeDriver::new(Rng::default());
        driver.descriptor(0, 0, (0x8000, 16, WRITE | NEXT, next));
        driver.publish(0, head);
        hostile(driver.kick(0));
        assert_eq!(driver.used(0), []);
    }
}

#[test]
fn an_available_index_far_ahead_stops_the_device() {
    let mut driver = FakeDriver::new(Rng::default());
    driver.offer(0, &[Buf::Write(0x8000, 16)]);
    driver.set_avail_index(0, QUEUE_SIZE + 1);
    assert!(hostile(driver.kick(0)).contains("ring"));
}

#[test]
fn indirect_tables_that_are_nested_long_or_elsewhere_are_refused() {
    let nested = |driver: &FakeDriver| driver.table_entry(0x9000, (0x9000, 16, INDIRECT, 0));
    let long = |driver: &FakeDriver| {
        for n in 0..u64::from(QUEUE_SIZE) + 1 {
            driver.table_entry(0x9000 + n * 16, (0x8000, 1, WRITE | NEXT, n as u16 + 1));
        }
    };
    let nothing = |_: &FakeDriver| {};
    type Prepare<'a> = &'a dyn Fn(&FakeDriver);
    let cases: [(Prepare, u64, u32); 6] = [
        (&nested, 0x9000, 16),
        (&long, 0x9000, (u32::from(QUEUE_SIZE) + 2) * 16),
        (&nothing, 0x9000, 15),
        (&nothing, 0x9000, 0),
        (&nothing, RAM, 16),
        (&nothing, u64::MAX - 7, 16),
    ];
    for (n, (prepare, address, length)) in cases.into_iter().enumerate() {
        let mut driver = FakeDriver::new(Rng::default());
        prepare(&driver);
        driver.offer(0, &[Buf::Indirect(address, length)]);
        let why = hostile(driver.kick(0));
        assert!(why.contains("chain"), "case {n}: {why}");
        assert_eq!(driver.used(0), []);
    }
}

#[test]
fn a_whole_indirect_chain_is_taken() {
    let mut driver = FakeDriver::new(Rng::default());
    driver.table_entry(0x9000, (0x8000, 16, WRITE | NEXT, 1));
    driver.table_entry(0x9010, (0xa000, 16, WRITE, 0));
    driver.offer(0, &[Buf::Indirect(0x9000, 32)]);
    driver.kick(0).unwrap();
    assert_eq!(driver.used(0), [(0, 32)]);
}

#[test]
fn buffers_may_overlap_each_other_and_the_rings_without_harm_to_the_host() {
    let mut driver = FakeDriver::new(Rng::default());
    // The used ring itself, twice.
    driver.offer(0, &[Buf::Write(0x20_a000, 512), Buf::Write(0x20_a000, 512)]);
    driver.kick(0).unwrap();
    driver.offer(0, &[Buf::Write(RAM - 8, 16)]);
    hostile(driver.kick(0));
}

#[test]
fn a_readable_buffer_after_a_writable_one_is_refused() {
    let mut driver = FakeDriver::new(Rng::default());
    driver.offer(0, &[Buf::Write(0x8000, 16), Buf::Read(0x8000, 16)]);
    assert!(hostile(driver.kick(0)).contains("readable buffer after"));
}

#[test]
fn a_refused_chain_is_not_parsed_again() {
    let driver = FakeDriver::new(Rng::default());
    let memory = driver.memory.clone();
    let mut driver = driver;
    driver.offer(0, &[Buf::Write(RAM, 16)]);
    driver.offer(0, &[Buf::Write(0x8000, 16)]);
    let mut ring = driver.transport.queue(&driver.transport.queues[0]).unwrap();
    assert!(matches!(
        queue::pop(&mut ring, &memory),
        Err(QueueError::OutsideRam { head: 0, .. })
    ));
    assert_eq!(queue::pop(&mut ring, &memory).unwrap().unwrap().head, 1);
    assert_eq!(queue::pop(&mut ring, &memory).unwrap(), None);
}

#[test]
fn accesses_of_odd_sizes_and_places_do_nothing() {
    let mut driver = FakeDriver::new(Rng::default());
    for offset in [0, 3, 0x50, 0x70, 0xfe, 0xff, 0x100, 0xfff] {
        for size in [0, 1, 2, 3, 8, 64] {
            let mut data = vec![0xa5; size];
            driver.transport.read(offset, &mut data);
            driver.transport.write(offset, &vec![0; size]);
        }
    }
    assert_eq!(driver.get(0x70), 15);
    assert!(driver.transport.is_active());
}

#[test]
fn a_vcpu_waits_until_the_main_thread_has_done_its_work() {
    let wake = Arc::new(EventFd::new(EFD_CLOEXEC).unwrap());
    let mut driver = FakeDriver::cold(Rng::default());
    driver.bring_up();
    driver.transport.status = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    driver.transport.work = None;
    let slot = Arc::new(Slot::new("rng", driver.transport, wake.clone()));
    let vcpu = std::thread::spawn({
        let slot = slot.clone();
        move || {
            slot.write(0x70, &15u32.to_le_bytes());
            slot.lock().is_active()
        }
    });
    wake.read().unwrap();
    let mut transport = slot.lock();
    assert_eq!(transport.take_work(), Some(Work::Activate));
    transport.activate().unwrap();
    drop(transport);
    slot.finished();
    assert!(
        vcpu.join().unwrap(),
        "the write came back before the device was active"
    );

    let vcpu = std::thread::spawn({
        let slot = slot.clone();
        move || slot.write(0x70, &0u32.to_le_bytes())
    });
    wake.read().unwrap();
    slot.abandon();
    vcpu.join().unwrap();
}
