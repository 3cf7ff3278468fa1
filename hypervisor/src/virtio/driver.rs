//! The guest's side of the queues, for tests: a driver over plain memory that can keep the rules and break each.

use super::Memory;
use super::device::{Activation, DeviceError, Interrupt, VirtioDevice};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// RAM of the test machine.
pub(super) const RAM: usize = 4 << 20;
/// Each queue has this much for its rings, from address 0.
const RINGS: u64 = 0x8000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
/// Buffers are handed out from here.
const BUFFERS: u64 = 1 << 20;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part<'a> {
    /// Readable by the device, with this content.
    Out(&'a [u8]),
    /// Writable by the device, this long.
    In(u32),
}

#[derive(Debug)]
struct Ring {
    size: u16,
    free: u16,
    avail: u16,
    seen: u16,
}

/// A driver with the queues of one device.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) memory: Memory,
    pub(super) interrupt: Interrupt,
    rings: Vec<Ring>,
    kicks: Vec<EventFd>,
    next_buffer: u64,
}

impl Driver {
    pub(super) fn new(device: &impl VirtioDevice) -> Self {
        Self::with_memory(
            device,
            Memory::from_ranges(&[(GuestAddress(0), RAM)]).unwrap(),
        )
    }

    pub(super) fn with_memory(device: &impl VirtioDevice, memory: Memory) -> Self {
        let ring = |size: &u16| Ring {
            size: *size,
            free: 0,
            avail: 0,
            seen: 0,
        };
        let rings: Vec<_> = device.queue_sizes().iter().map(ring).collect();
        let kicks = rings
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .collect();
        Self {
            memory,
            interrupt: Interrupt::new().unwrap(),
            rings,
            kicks,
            next_buffer: BUFFERS,
        }
    }

    /// Sets DRIVER_OK with these features beside VERSION_1.
    pub(super) fn activate(
        &mut self,
        device: &mut impl VirtioDevice,
        features: u64,
    ) -> Result<(), DeviceError> {
        device.activate(self.activation(features))
    }

    /// What a device gets at DRIVER_OK.
    pub(super) fn activation(&mut self, features: u64) -> Activation {
        let queues = (0..self.rings.len())
            .map(|queue| self.queue(queue))
            .collect();
        let kick = |kick: &EventFd| kick.try_clone().unwrap();
        Activation {
            memory: self.memory.clone(),
            queues,
            notify: self.kicks.iter().map(kick).collect(),
            interrupt: self.interrupt.clone(),
            features,
        }
    }

    /// The device's side of a queue whose rings are empty again.
    pub(super) fn queue(&mut self, index: usize) -> Queue {
        let ring = &mut self.rings[index];
        (ring.free, ring.avail, ring.seen) = (0, 0, 0);
        let [descriptors, available, used] = ring_addresses(index);
        self.memory
            .write_slice(&[0; RINGS as usize], GuestAddress(descriptors.into()))
            .unwrap();
        let mut queue = Queue::new(ring.size).unwrap();
        queue.set_desc_table_address(Some(descriptors), None);
        queue.set_avail_ring_address(Some(available), None);
        queue.set_used_ring_address(Some(used), None);
        queue.set_ready(true);
        queue
    }

    /// Writes a descriptor as it is.
    pub(super) fn descriptor(
        &self,
        queue: usize,
        index: u16,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        self.descriptor_at(
            queue as u64 * RINGS + u64::from(index) * 16,
            (address, length),
            flags,
            next,
        );
    }

    /// Writes a descriptor anywhere, for indirect tables.
    pub(super) fn descriptor_at(
        &self,
        at: u64,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain available that begins at descriptor `head`.
    pub(super) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let base = queue as u64 * RINGS + AVAIL;
        let slot = base + 4 + 2 * u64::from(ring.avail % ring.size);
        ring.avail = ring.avail.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory
            .write_obj(ring.avail, GuestAddress(base + 2))
            .unwrap();
    }

    /// Moves the available index by `count` without offering anything.
    pub(super) fn jump(&mut self, queue: usize, count: u16) {
        let ring = &mut self.rings[queue];
        ring.avail = ring.avail.wrapping_add(count);
        self.memory
            .write_obj(ring.avail, GuestAddress(queue as u64 * RINGS + AVAIL + 2))
            .unwrap();
    }

    /// Offers a proper chain; gives its head and the address of each buffer.
    pub(super) fn chain(&mut self, queue: usize, parts: &[Part<'_>]) -> (u16, Vec<u64>) {
        let ring = &mut self.rings[queue];
        let (size, head) = (ring.size, ring.free);
        ring.free = (head + parts.len() as u16) % size;
        let mut addresses = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            let index = (head + at as u16) % size;
            let (address, length, flags) = match part {
                Part::Out(content) => (self.buffer(content), content.len() as u32, 0),
                Part::In(length) => (self.buffer(&vec![0xee; *length as usize]), *length, WRITE),
            };
            let more = if at + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(
                queue,
                index,
                (address, length),
                flags | more,
                (index + 1) % size,
            );
            addresses.push(address);
        }
        self.offer(queue, head);
        (head, addresses)
    }

    /// Puts bytes into fresh memory.
    pub(super) fn buffer(&mut self, content: &[u8]) -> u64 {
        if self.next_buffer as usize + content.len() > RAM {
            self.next_buffer = BUFFERS;
        }
        let address = self.next_buffer;
        self.memory
            .write_slice(content, GuestAddress(address))
            .unwrap();
        self.next_buffer += (content.len() as u64).next_multiple_of(16);
        address
    }

    pub(super) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Chains that came back since the last call: head and written length.
    pub(super) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let base = queue as u64 * RINGS + USED;
        let end: u16 = self.memory.read_obj(GuestAddress(base + 2)).unwrap();
        let mut used = Vec::new();
        while ring.seen != end {
            let entry = base + 4 + 8 * u64::from(ring.seen % ring.size);
            let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
            used.push((
                head as u16,
                self.memory.read_obj(GuestAddress(entry + 4)).unwrap(),
            ));
            ring.seen = ring.seen.wrapping_add(1);
        }
        used
    }

    /// Whether the device kicked itself, because more work waits.
    pub(super) fn kicked(&self, queue: usize) -> bool {
        self.kicks[queue].read().is_ok()
    }
}

/// Where descriptor table, available ring and used ring of a queue are.
pub(super) fn ring_addresses(queue: usize) -> [u32; 3] {
    let base = queue as u64 * RINGS;
    [base, base + AVAIL, base + USED].map(|address| address as u32)
}

/// Prepares one queue.
pub(super) type Attack = fn(&mut Driver, usize);

/// Ways to break the rules of a queue, whatever the device. Each leaves something available.
pub(super) const ATTACKS: [(&str, Attack); 18] = [
    ("a chain that is a cycle", |driver, queue| {
        driver.descriptor(queue, 0, (BUFFERS, 16), NEXT, 1);
        driver.descriptor(queue, 1, (BUFFERS, 16), NEXT, 0);
        driver.offer(queue, 0);
    }),
    ("a next index out of range", |driver, queue| {
        driver.descriptor(queue, 0, (BUFFERS, 16), NEXT, u16::MAX);
        driver.offer(queue, 0);
    }),
    ("a next index that is the queue's size", |driver, queue| {
        let size = driver.rings[queue].size;
        driver.descriptor(queue, 0, (BUFFERS, 16), NEXT, size);
        driver.offer(queue, 0);
    }),
    ("a head out of range", |driver, queue| {
        driver.offer(queue, u16::MAX);
    }),
    ("a head that is the queue's size", |driver, queue| {
        driver.offer(queue, driver.rings[queue].size);
    }),
    ("an available index too far ahead", |driver, queue| {
        driver.jump(queue, 0x8000);
    }),
    ("an available index one too far ahead", |driver, queue| {
        driver.jump(queue, driver.rings[queue].size + 1);
    }),
    ("a buffer beyond RAM", |driver, queue| {
        driver.descriptor(queue, 0, (RAM as u64 - 8, 16), 0, 0);
        driver.offer(queue, 0);
    }),
    (
        "a buffer that wraps around the address space",
        |driver, queue| {
            driver.descriptor(queue, 0, (u64::MAX - 8, 64), WRITE, 0);
            driver.offer(queue, 0);
        },
    ),
    ("a buffer of 4 GiB", |driver, queue| {
        driver.descriptor(queue, 0, (0, u32::MAX), WRITE, 0);
        driver.offer(queue, 0);
    }),
    ("a readable buffer after a writable one", |driver, queue| {
        driver.descriptor(queue, 0, (BUFFERS, 64), WRITE | NEXT, 1);
        driver.descriptor(queue, 1, (BUFFERS, 64), 0, 0);
        driver.offer(queue, 0);
    }),
    (
        "an indirect table inside an indirect table",
        |driver, queue| {
            driver.descriptor(queue, 0, (BUFFERS, 16), INDIRECT, 0);
            driver.descriptor_at(BUFFERS, (BUFFERS, 16), INDIRECT, 0);
            driver.offer(queue, 0);
        },
    ),
    ("an indirect table beyond RAM", |driver, queue| {
        driver.descriptor(queue, 0, (RAM as u64, 32), INDIRECT, 0);
        driver.offer(queue, 0);
    }),
    (
        "an indirect table that wraps around the address space",
        |driver, queue| {
            driver.descriptor(queue, 0, (u64::MAX - 7, 16), INDIRECT, 0);
            driver.offer(queue, 0);
        },
    ),
    (
        "an indirect table in the hole below 4 GiB",
        |driver, queue| {
            driver.descriptor(queue, 0, (0xc000_0000, 16), INDIRECT, 0);
            driver.offer(queue, 0);
        },
    ),
    ("an empty indirect table", |driver, queue| {
        driver.descriptor(queue, 0, (BUFFERS, 0), INDIRECT, 0);
        driver.offer(queue, 0);
    }),
    (
        "an indirect table longer than the queue",
        |driver, queue| {
            for index in 0..1024 {
                driver.descriptor_at(
                    BUFFERS + u64::from(index) * 16,
                    (BUFFERS, 1),
                    NEXT,
                    index + 1,
                );
            }
            driver.descriptor(queue, 0, (BUFFERS, 1024 * 16), INDIRECT, 0);
            driver.offer(queue, 0);
        },
    ),
    ("an indirect table of an odd length", |driver, queue| {
        driver.descriptor(queue, 0, (BUFFERS, 17), INDIRECT, 0);
        driver.offer(queue, 0);
    }),
];

/// Runs every attack on a fresh device and demands that the device stops with [`DeviceError::Hostile`], then works
/// again after a reset.
pub(super) fn attack<D: VirtioDevice>(queue: usize, features: u64, make: impl Fn() -> D) {
    for (name, attack) in ATTACKS {
        let mut device = make();
        let mut driver = Driver::new(&device);
        driver.activate(&mut device, features).unwrap();
        attack(&mut driver, queue);
        let outcome = device.queue_event(queue);
        assert!(
            matches!(outcome, Err(DeviceError::Hostile(_))),
            "{name}: {outcome:?}"
        );
        assert!(driver.used(queue).is_empty(), "{name}");
        device.reset();
        driver.activate(&mut device, features).unwrap();
        device.queue_event(queue).unwrap();
        assert!(driver.memory.check_range(GuestAddress(0), RAM));
    }
}
