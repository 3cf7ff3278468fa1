//! A guest that does what the input says.
//!
//! The input is a program: one byte chooses an operation, the bytes after it are its operands, and the end of the input
//! is the end of the guest. Most operands fall into the small RAM and the queues' rings, some lie far outside, so a
//! mutation that changes one thing keeps the rest of a request in order.

use crate::input::Input;
use coffer_hypervisor::virtio::{Activation, DeviceError, Interrupt, Memory, VirtioDevice};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const RAM: usize = 1 << 20;
/// Each queue's rings, from address 0.
const RINGS: u64 = 0x8000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
/// Operations of one guest; the fuzzer gains nothing from longer ones.
pub(crate) const MAX_OPERATIONS: usize = 256;

impl Input<'_> {
    /// An address: in RAM, at its end, or anywhere.
    fn address(&mut self) -> Option<u64> {
        match self.byte()? {
            255 => self.long(),
            254 => Some(RAM as u64 - u64::from(self.byte()?)),
            page => Some(u64::from(page) << 12 | u64::from(self.word()?)),
        }
    }

    /// A length: small, or anything.
    fn length(&mut self) -> Option<u32> {
        match self.word()? {
            word @ 0xfff0.. => Some((self.long()? >> (word & 15)) as u32),
            word => Some(u32::from(word)),
        }
    }
}

/// A device and the guest that drives it.
pub(crate) struct Guest<D> {
    pub(crate) device: D,
    pub(crate) memory: Memory,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
    avail: Vec<u16>,
    free: Vec<u16>,
    running: bool,
}

impl<D: VirtioDevice> Guest<D> {
    pub(crate) fn new(device: D) -> Self {
        let queues = device.queue_sizes().len();
        let memory = Memory::from_ranges(&[(GuestAddress(0), RAM)]).expect("a mebibyte");
        let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        Self {
            device,
            memory,
            interrupt: Interrupt::new().expect("an eventfd"),
            kicks: (0..queues).map(|_| event()).collect(),
            avail: vec![0; queues],
            free: vec![0; queues],
            running: false,
        }
    }

    fn start(&mut self, features: u64) {
        let sizes = self.device.queue_sizes().to_vec();
        let queues = sizes.iter().enumerate().map(|(index, size)| {
            let base = (RINGS * index as u64) as u32;
            let mut queue = Queue::new(*size).expect("the device's own size");
            queue.set_desc_table_address(Some(base), None);
            queue.set_avail_ring_address(Some(base + AVAIL as u32), None);
            queue.set_used_ring_address(Some(base + USED as u32), None);
            queue.set_event_idx(features & 1 << 29 != 0);
            queue.set_ready(true);
            queue
        });
        let active = Activation {
            memory: self.memory.clone(),
            queues: queues.collect(),
            notify: self
                .kicks
                .iter()
                .map(|kick| kick.try_clone().expect("an eventfd"))
                .collect(),
            interrupt: self.interrupt.clone(),
            features,
        };
        self.avail.fill(0);
        self.free.fill(0);
        let rings = vec![0; self.kicks.len() * RINGS as usize];
        self.memory
            .write_slice(&rings, GuestAddress(0))
            .expect("RAM");
        self.running = self.device.activate(active).is_ok();
    }

    /// What the event loop does with an error of the device.
    fn outcome(&mut self, result: Result<(), DeviceError>) {
        match result {
            Ok(()) => {}
            Err(DeviceError::Hostile(_)) => {
                self.device.reset();
                self.running = false;
            }
            Err(DeviceError::Fatal(cause)) => {
                panic!("a guest must not be able to end the VM: {cause}")
            }
        }
    }

    /// Runs the whole input. `outside` is what else can happen to the device, beside its guest.
    pub(crate) fn run(&mut self, input: &mut Input<'_>, mut outside: impl FnMut(&mut D, u8)) {
        self.start(self.device.features());
        for _ in 0..MAX_OPERATIONS {
            if self.step(input, &mut outside).is_none() {
                break;
            }
        }
        self.device.reset();
    }

    fn step(&mut self, input: &mut Input<'_>, outside: &mut impl FnMut(&mut D, u8)) -> Option<()> {
        let operation = input.byte()?;
        let queue = usize::from(operation >> 4) % self.kicks.len();
        match operation & 15 {
            0 => self.raw_descriptor(queue, input)?,
            1 | 2 => self.chain(queue, input)?,
            3 => self.offer(queue, u16::from(input.byte()?)),
            4 => {
                self.avail[queue] = input.word()?;
                self.publish(queue);
            }
            5 => {
                let (address, length) = (input.address()?, usize::from(input.byte()? % 64));
                // Outside RAM there is nothing to write to.
                let _ = self
                    .memory
                    .write(input.take(length)?, GuestAddress(address));
            }
            6 | 7 if self.running => {
                let result = self.device.queue_event(queue);
                self.outcome(result);
            }
            8 | 9 if self.running => {
                for (_, set, token) in self.device.sources() {
                    let result = self
                        .device
                        .source_event(token, set & (EventSet::IN | EventSet::OUT));
                    self.outcome(result);
                }
            }
            10 => {
                let mut data = [0; 8];
                self.device.read_config(input.address()?, &mut data);
            }
            11 => {
                let (address, length) = (input.address()?, usize::from(input.byte()? % 9));
                self.device.write_config(address, input.take(length)?);
            }
            12 => {
                let features = input.long()? & self.device.features() | 1 << 32;
                self.device.reset();
                self.start(features | u64::from(operation >> 7) << 29);
            }
            13 => outside(&mut self.device, input.byte()?),
            _ => {}
        }
        Some(())
    }

    /// A descriptor as the input has it.
    fn raw_descriptor(&mut self, queue: usize, input: &mut Input<'_>) -> Option<()> {
        let index = u16::from(input.byte()?);
        let (address, length) = (input.address()?, input.length()?);
        self.descriptor(
            queue,
            index,
            (address, length),
            input.word()?,
            input.word()?,
        );
        Some(())
    }

    fn descriptor(
        &self,
        queue: usize,
        index: u16,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let at = RINGS * queue as u64 + 16 * u64::from(index);
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(at))
            .expect("rings are in RAM");
    }

    /// A chain that is in order, as far as its buffers are; what is in them comes with it.
    fn chain(&mut self, queue: usize, input: &mut Input<'_>) -> Option<()> {
        let shape = input.byte()?;
        let (readable, writable) = (u16::from(shape & 7), u16::from(shape >> 3 & 7));
        let size = self.device.queue_sizes()[queue];
        let head = self.free[queue];
        let count = readable + writable;
        for at in 0..count {
            let (address, length) = (input.address()?, input.length()?);
            let mut flags = u16::from(at + 1 < count);
            if at < readable {
                let content = usize::from(input.byte()? % 33);
                let _ = self
                    .memory
                    .write(input.take(content)?, GuestAddress(address));
            } else {
                flags |= 2;
            }
            let index = (head + at) % size;
            self.descriptor(queue, index, (address, length), flags, (index + 1) % size);
        }
        self.free[queue] = (head + count) % size;
        self.offer(queue, head);
        Some(())
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let size = self.device.queue_sizes()[queue];
        let slot = RINGS * queue as u64 + AVAIL + 4 + 2 * u64::from(self.avail[queue] % size);
        self.memory
            .write_obj(head, GuestAddress(slot))
            .expect("rings are in RAM");
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.publish(queue);
    }

    fn publish(&self, queue: usize) {
        let at = RINGS * queue as u64 + AVAIL + 2;
        self.memory
            .write_obj(self.avail[queue], GuestAddress(at))
            .expect("rings are in RAM");
    }
}
