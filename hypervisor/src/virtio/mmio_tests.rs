use super::*;
use crate::virtio::driver::Part::In;
use crate::virtio::driver::{Driver, RAM, ring_addresses};
use crate::virtio::rng::Rng;
use crate::virtio::slot::Slot;
use std::sync::Arc;

/// A driver that reaches its device through the registers only.
struct Registers {
    transport: Transport,
    driver: Driver,
}

impl Registers {
    /// A device up to DRIVER_OK with all its queues at their largest size.
    fn new(device: impl VirtioDevice + 'static) -> Self {
        let mut registers = Self::cold(device);
        registers.bring_up();
        registers.work().unwrap();
        registers
    }

    /// A device nobody touched yet.
    fn cold(device: impl VirtioDevice + 'static) -> Self {
        let driver = Driver::new(&device);
        let transport = Transport::new(Box::new(device), driver.memory.clone()).unwrap();
        Self { transport, driver }
    }

    fn bring_up(&mut self) {
        for status in [0u32, 1, 3] {
            self.set(0x70, status);
            self.work().unwrap();
        }
        // VERSION_1 only: no EVENT_IDX, so every completion interrupts.
        self.set(0x24, 1);
        self.set(0x20, 1);
        self.set(0x70, 11);
        for queue in 0..self.transport.notify().len() {
            self.set(0x30, queue as u32);
            let max = self.get(0x34);
            self.set(0x38, max);
            for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(ring_addresses(queue)) {
                self.set(register, address);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
    }

    /// Does what the main thread would.
    fn work(&mut self) -> Result<(), DeviceError> {
        match self.transport.take_work() {
            Some(Work::Activate) => self.transport.activate(),
            Some(Work::Reset) => {
                self.transport.reset();
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn get(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(register, &mut word);
        u32::from_le_bytes(word)
    }

    /// Kicks through the register and lets the device work as the event loop would.
    fn kick(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.set(QUEUE_NOTIFY, queue as u32);
        while self.transport.notify()[queue].read().is_ok() {
            self.transport.device().queue_event(queue)?;
        }
        Ok(())
    }
}

fn hostile(result: Result<(), DeviceError>) -> String {
    match result {
        Err(DeviceError::Hostile(cause)) => cause.to_string(),
        other => panic!("taken: {other:?}"),
    }
}

#[test]
fn the_identity_registers_say_what_linux_looks_for() {
    let registers = Registers::cold(Rng::default());
    assert_eq!(
        (registers.get(0), registers.get(4), registers.get(8)),
        (0x7472_6976, 2, 4)
    );
    assert_eq!(
        (registers.get(0xb0), registers.get(0xb4)),
        (u32::MAX, u32::MAX)
    );
    let mut byte = [7];
    registers.transport.read(0x70, &mut byte);
    assert_eq!(byte, [7], "a register is not readable by bytes");
}

#[test]
fn registers_are_frozen_after_driver_ok() {
    let mut registers = Registers::new(Rng::default());
    assert!(registers.transport.is_active());
    let before = registers.transport.rejected();
    for (register, value) in [
        (0x38, 8),
        (0x44, 0),
        (0x80, 0xdead_0000),
        (0x90, 2),
        (0xa0, 4),
        (0x20, 0),
        (0x84, 1),
    ] {
        registers.set(register, value);
    }
    assert_eq!(registers.transport.rejected() - before, 7);
    assert_eq!(registers.get(0x44), 1);
    registers.driver.chain(0, &[In(16)]);
    registers.kick(0).unwrap();
    assert_eq!(
        registers.driver.used(0),
        [(0, 16)],
        "the old rings are still in use"
    );
}

#[test]
fn status_bits_come_in_order_and_never_go() {
    let mut registers = Registers::cold(Rng::default());
    for skipped in [2, 4, 8, 15, 5, 0x20, 0xffff_ffff] {
        registers.set(0x70, skipped);
        assert_eq!(registers.get(0x70), 0, "{skipped:#x} was taken");
    }
    registers.bring_up();
    registers.work().unwrap();
    assert_eq!(registers.get(0x70), 15);
    registers.set(0x70, 7);
    assert_eq!(registers.get(0x70), 15);
    registers.set(0x70, 0x8f);
    assert_eq!(registers.get(0x70), 0x8f, "FAILED may be set at any time");
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for (select, value) in [(0, 1), (1, 3), (1, 0)] {
        let mut registers = Registers::cold(Rng::default());
        registers.set(0x70, 1);
        registers.set(0x70, 3);
        registers.set(0x24, 1);
        registers.set(0x20, if select == 1 { value } else { 1 });
        if select == 0 {
            registers.set(0x24, 0);
            registers.set(0x20, value);
        }
        registers.set(0x70, 11);
        assert_eq!(
            registers.get(0x70),
            3,
            "features {value:#x} of half {select}"
        );
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
        let mut registers = Registers::cold(Rng::default());
        registers.bring_up();
        // Back to before DRIVER_OK, with one bad address.
        registers.set(0x70, 0);
        registers.work().unwrap();
        for status in [1, 3] {
            registers.set(0x70, status);
        }
        registers.set(0x24, 1);
        registers.set(0x20, 1);
        registers.set(0x70, 11);
        registers.set(register, address);
        registers.set(0x44, 1);
        registers.set(0x70, 15);
        hostile(registers.work());
        registers.transport.needs_reset();
        assert_eq!(registers.get(0x70), 15 | 64);
        assert_eq!(
            registers.get(0x60),
            2,
            "the driver is told by a configuration interrupt"
        );
        registers.bring_up();
        registers.work().unwrap();
        assert_eq!(registers.get(0x70), 15);
    }
}

#[test]
fn a_reset_takes_everything_back() {
    let mut registers = Registers::new(Rng::default());
    registers.driver.chain(0, &[In(16)]);
    registers.set(QUEUE_NOTIFY, 0);
    registers.set(0x70, 0);
    registers.work().unwrap();
    assert!(!registers.transport.is_active());
    assert!(
        registers.transport.notify()[0].read().is_err(),
        "the old kick is gone"
    );
    assert_eq!(
        (
            registers.get(0x70),
            registers.get(0x44),
            registers.get(0x60)
        ),
        (0, 0, 0)
    );
    registers.set(QUEUE_NOTIFY, 0);
    assert!(
        registers.transport.notify()[0].read().is_err(),
        "a kick of a dead device does nothing"
    );
}

#[test]
fn queue_sizes_that_are_no_power_of_two_or_too_large_are_refused() {
    let mut registers = Registers::cold(Rng::default());
    for status in [1, 3] {
        registers.set(0x70, status);
    }
    registers.set(0x24, 1);
    registers.set(0x20, 1);
    registers.set(0x70, 11);
    let before = registers.transport.rejected();
    for size in [0, 3, 128, 0x1_0040] {
        registers.set(0x38, size);
    }
    registers.set(0x30, 77);
    assert_eq!(registers.get(0x34), 0);
    registers.set(0x44, 1);
    assert_eq!(registers.transport.rejected() - before, 5);
}

#[test]
fn accesses_of_odd_sizes_and_places_do_nothing() {
    let mut registers = Registers::new(Rng::default());
    for offset in [0, 3, 0x50, 0x70, 0xfe, 0xff, 0x100, 0xfff] {
        for size in [0, 1, 2, 3, 8, 64] {
            let mut data = vec![0xa5; size];
            registers.transport.read(offset, &mut data);
            registers.transport.write(offset, &vec![0; size]);
        }
    }
    assert_eq!(registers.get(0x70), 15);
    assert!(registers.transport.is_active());
}

#[test]
fn a_vcpu_waits_until_the_main_thread_has_done_its_work() {
    let wake = Arc::new(EventFd::new(EFD_CLOEXEC).unwrap());
    let mut registers = Registers::cold(Rng::default());
    registers.bring_up();
    registers.transport.status = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    registers.transport.work = None;
    let slot = Arc::new(Slot::new("rng", registers.transport, wake.clone()));
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
