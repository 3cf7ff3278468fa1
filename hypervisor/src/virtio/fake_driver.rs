//! A driver over a byte buffer, for tests: it brings a device up through the registers as Linux does, offers chains
//! of any shape, and looks at what came back.

use super::mmio::{QUEUE_NOTIFY, Transport, Work};
use super::{DeviceError, Memory, VirtioDevice};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

pub(crate) const RAM: u64 = 4 << 20;
/// Rings of queue `n` begin at RINGS + n * RING_SPACE: descriptors, then available, then used.
const RINGS: u64 = 0x20_0000;
const RING_SPACE: u64 = 0x1_0000;
const AVAIL: u64 = 0x8000;
const USED: u64 = 0xa000;

/// A buffer of a chain: address and length.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Buf {
    Read(u64, u32),
    Write(u64, u32),
    /// A table of descriptors at this address, of this many bytes.
    Indirect(u64, u32),
}

/// A raw descriptor: address, length, flags, next.
pub(crate) type Desc = (u64, u32, u16, u16);

pub(crate) struct FakeDriver {
    pub(crate) transport: Transport,
    pub(crate) memory: Memory,
    next: Vec<u16>,
    avail: Vec<u16>,
}

impl FakeDriver {
    /// A device up to DRIVER_OK with all its queues at their largest size.
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        let mut driver = Self::cold(device);
        driver.bring_up();
        driver.work().unwrap();
        driver
    }

    /// A device nobody touched yet.
    pub(crate) fn cold(device: impl VirtioDevice + 'static) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let queues = device.queue_sizes().len();
        let transport = Transport::new(Box::new(device), memory.clone()).unwrap();
        Self {
            transport,
            memory,
            next: vec![0; queues],
            avail: vec![0; queues],
        }
    }

    pub(crate) fn bring_up(&mut self) {
        for status in [0u32, 1, 3] {
            self.set(0x70, status);
            self.work().unwrap();
        }
        // VERSION_1 only: no EVENT_IDX, so every completion interrupts.
        self.set(0x24, 1);
        self.set(0x20, 1);
        self.set(0x70, 11);
        for queue in 0..self.next.len() as u32 {
            self.set(0x30, queue);
            let max = self.get(0x34);
            self.set(0x38, max);
            let base = RINGS + u64::from(queue) * RING_SPACE;
            for (register, address) in [(0x80, base), (0x90, base + AVAIL), (0xa0, base + USED)] {
                self.set(register, address as u32);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
    }

    /// Does what the main thread would.
    pub(crate) fn work(&mut self) -> Result<(), DeviceError> {
        match self.transport.take_work() {
            Some(Work::Activate) => self.transport.activate(),
            Some(Work::Reset) => {
                self.transport.reset();
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub(crate) fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    pub(crate) fn get(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(register, &mut word);
        u32::from_le_bytes(word)
    }

    /// Writes a descriptor as it is.
    pub(crate) fn descriptor(&self, queue: usize, index: u16, desc: Desc) {
        self.table_entry(
            RINGS + queue as u64 * RING_SPACE + u64::from(index) * 16,
            desc,
        );
    }

    /// Writes a descriptor anywhere, for indirect tables.
    pub(crate) fn table_entry(&self, at: u64, (address, length, flags, next): Desc) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain available and returns its head.
    pub(crate) fn offer(&mut self, queue: usize, buffers: &[Buf]) -> u16 {
        let size = self.size(queue);
        let head = self.next[queue];
        for (n, buffer) in buffers.iter().enumerate() {
            let index = (head + n as u16) % size;
            let more = if n + 1 < buffers.len() {
                VRING_DESC_F_NEXT as u16
            } else {
                0
            };
            let (address, length, flags) = match *buffer {
                Buf::Read(address, length) => (address, length, 0),
                Buf::Write(address, length) => (address, length, VRING_DESC_F_WRITE as u16),
                Buf::Indirect(address, length) => (address, length, VRING_DESC_F_INDIRECT as u16),
            };
            self.descriptor(
                queue,
                index,
                (address, length, flags | more, (index + 1) % size),
            );
        }
        self.next[queue] = (head + buffers.len() as u16) % size;
        self.publish(queue, head);
        head
    }

    /// Puts a head into the available ring.
    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let base = RINGS + queue as u64 * RING_SPACE + AVAIL;
        let at = base + 4 + u64::from(self.avail[queue] % self.size(queue)) * 2;
        self.memory.write_obj(head, GuestAddress(at)).unwrap();
        self.set_avail_index(queue, self.avail[queue].wrapping_add(1));
    }

    pub(crate) fn set_avail_index(&mut self, queue: usize, index: u16) {
        self.avail[queue] = index;
        self.memory
            .write_obj(
                index,
                GuestAddress(RINGS + queue as u64 * RING_SPACE + AVAIL + 2),
            )
            .unwrap();
    }

    /// Kicks through the register and lets the device work as the event loop would.
    pub(crate) fn kick(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.set(QUEUE_NOTIFY, queue as u32);
        while self.transport.notify()[queue].read().is_ok() {
            self.transport.device().queue_event(queue)?;
        }
        Ok(())
    }

    /// Head and length of everything in the used ring.
    pub(crate) fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let base = RINGS + queue as u64 * RING_SPACE + USED;
        let count: u16 = self.memory.read_obj(GuestAddress(base + 2)).unwrap();
        let entry = |n: u16| base + 4 + u64::from(n % self.size(queue)) * 8;
        let word = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        (0..count)
            .map(|n| (word(entry(n)), word(entry(n) + 4)))
            .collect()
    }

    pub(crate) fn fill(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    /// Interrupts raised since the last call.
    pub(crate) fn interrupts(&self) -> u64 {
        self.transport.interrupt().line().read().unwrap_or(0)
    }

    pub(crate) fn counters(&mut self) -> Vec<(&'static str, u64)> {
        self.transport.device().counters()
    }

    fn size(&self, queue: usize) -> u16 {
        // What bring_up() chose.
        self.transport.queue_max(queue)
    }
}
