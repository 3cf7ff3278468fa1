//! Where an access of a vCPU goes: the few I/O ports of a microVM, and the registers of virtio-mmio devices.
//!
//! An address that nobody answers reads as all ones, as on a PC, and a write to it does nothing. Both are counted.

use crate::layout::{
    I8042_COMMAND_PORT, I8042_DATA_PORT, SERIAL_PORT, SERIAL_PORT_COUNT, VIRTIO_MMIO,
    VIRTIO_MMIO_SIZE,
};
use crate::notice::{Notice, Notices};
use crate::ring::ConsoleRing;
use crate::virtio::slot::Slot;
use coffer_proto::limits::{BOOT_TIMER_PORT, MAX_BOOT_PHASES};
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// `0xfe` at the keyboard controller's command port pulses the CPU's reset line.
const I8042_PULSE_RESET: u8 = 0xfe;

/// The serial port's interrupt line.
#[derive(Debug)]
pub struct SerialLine(pub EventFd);

impl Trigger for SerialLine {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Console output of several writers.
#[derive(Debug, Clone)]
pub struct SharedRing(pub Arc<Mutex<ConsoleRing>>);

impl SharedRing {
    pub fn push(&self, data: &[u8]) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(data);
    }
}

impl io::Write for SharedRing {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.push(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A 16550 whose output goes to the console ring.
pub type SerialPort = Serial<SerialLine, NoEvents, SharedRing>;

/// All that vCPUs can reach outside RAM and the in-kernel interrupt controllers.
pub struct Bus {
    slots: Vec<Arc<Slot>>,
    /// For debugging a kernel before its virtio console: `earlyprintk=serial` or `console=ttyS0`.
    serial: Option<Mutex<SerialPort>>,
    notices: Notices,
    phases: AtomicUsize,
    unanswered: AtomicU64,
}

impl Bus {
    /// A bus with these virtio devices, in the order of their addresses.
    pub fn new(slots: Vec<Arc<Slot>>, serial: Option<SerialPort>, notices: Notices) -> Self {
        let serial = serial.map(Mutex::new);
        Self {
            slots,
            serial,
            notices,
            phases: AtomicUsize::new(0),
            unanswered: AtomicU64::new(0),
        }
    }

    /// Accesses so far that no device answered.
    pub fn unanswered(&self) -> u64 {
        self.unanswered.load(Ordering::Relaxed)
    }

    /// An `out` instruction (a string instruction gives several bytes).
    pub fn port_write(&self, port: u16, data: &[u8]) {
        match (port, data) {
            (I8042_COMMAND_PORT, [I8042_PULSE_RESET]) => self.notices.send(Notice::Reset),
            (I8042_COMMAND_PORT | I8042_DATA_PORT, _) => {}
            (BOOT_TIMER_PORT, &[a, b, c, d]) => self.phase(u32::from_le_bytes([a, b, c, d])),
            _ => match self.serial(port) {
                Some((mut serial, register)) => {
                    for byte in data {
                        // Fails where the interrupt counter is full or loop-back input overflows: nothing to lose.
                        let _ = serial.write(register, *byte);
                    }
                }
                None => self.count(),
            },
        }
    }

    /// An `in` instruction.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            // Status: both buffers empty, so the guest's reset does not wait.
            I8042_COMMAND_PORT | I8042_DATA_PORT => data.fill(0),
            _ => match self.serial(port) {
                Some((mut serial, register)) => data
                    .iter_mut()
                    .for_each(|byte| *byte = serial.read(register)),
                None => self.count(),
            },
        }
    }

    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        match self.slot(address) {
            Some((slot, offset)) => slot.write(offset, data),
            None => self.count(),
        }
    }

    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.slot(address) {
            Some((slot, offset)) => {
                data.fill(0);
                slot.read(offset, data);
            }
            None => {
                data.fill(0xff);
                self.count();
            }
        }
    }

    fn slot(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = address.checked_sub(VIRTIO_MMIO.0)?;
        let slot = self
            .slots
            .get(usize::try_from(offset / VIRTIO_MMIO_SIZE).ok()?)?;
        Some((slot, offset % VIRTIO_MMIO_SIZE))
    }

    fn serial(&self, port: u16) -> Option<(std::sync::MutexGuard<'_, SerialPort>, u8)> {
        let register = port
            .checked_sub(SERIAL_PORT)
            .filter(|register| *register < SERIAL_PORT_COUNT)?;
        let serial = self
            .serial
            .as_ref()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Some((serial, register as u8))
    }

    /// The boot timer: stamped here, on the vCPU's thread, so that a busy main loop adds nothing.
    fn phase(&self, phase: u32) {
        if self.phases.fetch_add(1, Ordering::Relaxed) < MAX_BOOT_PHASES {
            self.notices.send(Notice::Phase {
                phase,
                since_start: crate::clock::since_start(),
            });
        }
    }

    fn count(&self) {
        self.unanswered.fetch_add(1, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bus")
            .field("slots", &self.slots.len())
            .field("serial", &self.serial.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn bus() -> (Bus, Receiver<Notice>) {
        let (sender, receiver) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let bus = Bus::new(Vec::new(), None, Notices::new(sender, wake));
        (bus, receiver)
    }

    #[test]
    fn accesses_that_nobody_answers_read_as_ones_are_counted_and_do_nothing() {
        let (bus, notices) = bus();
        let mut expected = 0;
        for size in [0, 1, 2, 3, 4, 8, 4096] {
            for port in [0, 0x40, SERIAL_PORT, 0xcf8, BOOT_TIMER_PORT - 1, u16::MAX] {
                let mut data = vec![0; size];
                bus.port_read(port, &mut data);
                assert!(data.iter().all(|byte| *byte == 0xff));
                bus.port_write(port, &data);
                expected += 2;
            }
            for address in [0, VIRTIO_MMIO.0 - 1, VIRTIO_MMIO.0, 1 << 52, u64::MAX] {
                let mut data = vec![0; size];
                bus.mmio_read(address, &mut data);
                assert!(data.iter().all(|byte| *byte == 0xff));
                bus.mmio_write(address, &data);
                expected += 2;
            }
        }
        assert_eq!(bus.unanswered(), expected);
        assert!(notices.try_recv().is_err());
    }

    #[test]
    fn the_boot_timer_takes_four_bytes_and_the_reset_line_one_value() {
        let (bus, notices) = bus();
        for size in [0, 1, 2, 3, 5, 8] {
            bus.port_write(BOOT_TIMER_PORT, &vec![1; size]);
        }
        for data in [&[0xff][..], &[0xfe, 0xfe], &[]] {
            bus.port_write(I8042_COMMAND_PORT, data);
        }
        assert!(notices.try_recv().is_err());
        bus.port_write(BOOT_TIMER_PORT, &7u32.to_le_bytes());
        assert!(matches!(
            notices.try_recv(),
            Ok(Notice::Phase { phase: 7, .. })
        ));
        bus.port_write(I8042_COMMAND_PORT, &[I8042_PULSE_RESET]);
        assert!(matches!(notices.try_recv(), Ok(Notice::Reset)));
    }
}
