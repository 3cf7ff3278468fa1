//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): the registers of one device.
//!
//! The driver brings a device up in a fixed order, and a register can be written only while it is its turn:
//!
//! ```text
//! reset ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK ─► (NEEDS_RESET) ─► reset
//!                           │            │             │
//!                  features ┘     queues ┘      frozen ┘  only notify, interrupt ack and configuration space
//! ```
//!
//! What is written out of turn is ignored and counted. Queue addresses are checked against RAM once, at DRIVER_OK, and
//! the device gets copies, so nothing the guest writes afterwards can move a ring (CVE-2026-5747 was that).
//!
//! Register accesses come on vCPU threads. Only activation and reset touch the device's working parts, and those belong to
//! the main thread: a vCPU leaves them as [`Work`] and waits in [`super::slot::Slot::write`] until the main loop has done it.

use super::{Activation, DeviceError, Interrupt, Memory, VirtioDevice};
use bitflags::bitflags;
use std::io;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CFFR");
/// The queue notification register, which each queue's ioeventfd watches.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Configuration space begins here.
const CONFIG_SPACE: u64 = 0x100;
/// What the transport itself offers.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Register offsets of section 4.2.2.
pub(super) mod register {
    pub(super) const MAGIC_VALUE: u64 = 0x00;
    pub(super) const VERSION: u64 = 0x04;
    pub(super) const DEVICE_ID: u64 = 0x08;
    pub(super) const VENDOR_ID: u64 = 0x0c;
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(super) const QUEUE_SEL: u64 = 0x30;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x34;
    pub(super) const QUEUE_NUM: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(in crate::virtio) const INTERRUPT_STATUS: u64 = 0x60;
    pub(in crate::virtio) const INTERRUPT_ACK: u64 = 0x64;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x80;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub(super) const SHM_LEN_LOW: u64 = 0xb0;
    pub(super) const SHM_BASE_HIGH: u64 = 0xbc;
    pub(super) const CONFIG_GENERATION: u64 = 0xfc;
}

bitflags! {
    /// Device status field, section 2.1.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Status: u32 {
        const ACKNOWLEDGE = 1;
        const DRIVER = 2;
        const DRIVER_OK = 4;
        const FEATURES_OK = 8;
        const DEVICE_NEEDS_RESET = 64;
        const FAILED = 128;
    }
}

/// What only the main thread may do for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Activate,
    Reset,
}

/// One queue's registers while the driver sets it up.
#[derive(Debug, Clone, Copy)]
struct QueueRegisters {
    max: u16,
    size: u16,
    ready: bool,
    /// Descriptor table, driver (available) ring, device (used) ring.
    addresses: [u64; 3],
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            ready: false,
            addresses: [0; 3],
        }
    }
}

/// A device behind its registers.
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    interrupt: Interrupt,
    notify: Vec<EventFd>,
    queues: Vec<QueueRegisters>,
    status: Status,
    active: bool,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    work: Option<Work>,
    rejected: u64,
}

impl Transport {
    /// Registers after power-on.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory) -> io::Result<Self> {
        let queues: Vec<_> = device
            .queue_sizes()
            .iter()
            .copied()
            .map(QueueRegisters::new)
            .collect();
        let notify: io::Result<Vec<_>> = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect();
        Ok(Self {
            device,
            memory,
            interrupt: Interrupt::new()?,
            notify: notify?,
            queues,
            status: Status::empty(),
            active: false,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            work: None,
            rejected: 0,
        })
    }

    pub fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut *self.device
    }

    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The kick event of each queue.
    pub fn notify(&self) -> &[EventFd] {
        &self.notify
    }

    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Writes that came out of turn.
    pub fn rejected(&self) -> u64 {
        self.rejected
    }

    pub fn status(&self) -> Status {
        self.status
    }

    fn features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// A read by the driver. Registers are 32 bits wide; only configuration space takes other sizes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG_SPACE {
            self.device.read_config(offset - CONFIG_SPACE, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.kind(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.features(), self.device_features_sel),
            register::QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.max)),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            register::INTERRUPT_STATUS => self.interrupt.status(),
            register::STATUS => self.status.bits(),
            // No device has a shared memory region: length and base read as all ones.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.interrupt.generation(),
            _ => 0,
        }
    }

    /// A write by the driver. Activation and reset are left in [`Transport::take_work`].
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG_SPACE {
            let in_turn = self.status.contains(Status::DRIVER) && !self.broken();
            if in_turn {
                self.device.write_config(offset - CONFIG_SPACE, data);
            }
            return self.count(in_turn);
        }
        let Ok(word) = <[u8; 4]>::try_from(data) else {
            return self.count(false);
        };
        let value = u32::from_le_bytes(word);
        let in_turn = match offset {
            register::DEVICE_FEATURES_SEL => store(&mut self.device_features_sel, value),
            register::DRIVER_FEATURES_SEL => store(&mut self.driver_features_sel, value),
            register::DRIVER_FEATURES => self.write_features(value),
            register::QUEUE_SEL => store(&mut self.queue_sel, value),
            register::QUEUE_NUM => self.write_queue(|queue| {
                let size = u16::try_from(value)
                    .ok()
                    .filter(|size| size.is_power_of_two() && *size <= queue.max);
                size.map(|size| queue.size = size).is_some() && !queue.ready
            }),
            register::QUEUE_READY => self.write_queue(|queue| {
                queue.ready = value & 1 == 1;
                true
            }),
            register::QUEUE_DESC_LOW..=register::QUEUE_DEVICE_HIGH => {
                self.write_address(offset, value)
            }
            QUEUE_NOTIFY => self.kick(value),
            register::INTERRUPT_ACK => {
                self.interrupt.acknowledge(value);
                true
            }
            register::STATUS => self.write_status(value),
            _ => false,
        };
        self.count(in_turn);
    }

    fn count(&mut self, in_turn: bool) {
        self.rejected += u64::from(!in_turn);
    }

    fn broken(&self) -> bool {
        self.status
            .intersects(Status::DEVICE_NEEDS_RESET | Status::FAILED)
    }

    fn write_features(&mut self, value: u32) -> bool {
        let in_turn =
            self.status == Status::ACKNOWLEDGE | Status::DRIVER && self.driver_features_sel < 2;
        if in_turn {
            let shift = self.driver_features_sel * 32;
            self.driver_features =
                self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
        }
        in_turn
    }

    /// Changes the selected queue's registers, between FEATURES_OK and DRIVER_OK only.
    fn write_queue(&mut self, change: impl FnOnce(&mut QueueRegisters) -> bool) -> bool {
        let in_turn = self.status == Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
        match self.queues.get_mut(self.queue_sel as usize) {
            Some(queue) if in_turn => {
                let mut changed = *queue;
                let taken = change(&mut changed);
                if taken {
                    *queue = changed;
                }
                taken
            }
            _ => false,
        }
    }

    fn write_address(&mut self, offset: u64, value: u32) -> bool {
        // 0x80/0x84 descriptor table, 0x90/0x94 driver ring, 0xa0/0xa4 device ring: low and high half.
        let (which, half) = ((offset - register::QUEUE_DESC_LOW) / 0x10, offset % 0x10);
        let shift = match half {
            0 => 0,
            4 => 32,
            _ => return false,
        };
        self.write_queue(|queue| {
            let address = &mut queue.addresses[which as usize];
            *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
            !queue.ready
        })
    }

    /// A kick that no ioeventfd took (KVM takes those that are written as 32 bits).
    fn kick(&self, queue: u32) -> bool {
        match self.notify.get(queue as usize) {
            // A full counter means that the kick is pending already.
            Some(event) if self.active => event.write(1).is_ok(),
            _ => false,
        }
    }

    fn write_status(&mut self, value: u32) -> bool {
        if value == 0 {
            self.work = Some(Work::Reset);
            return true;
        }
        let Some(wanted) = Status::from_bits(value & !Status::DEVICE_NEEDS_RESET.bits()) else {
            return false;
        };
        let current = self.status - Status::DEVICE_NEEDS_RESET;
        if !wanted.contains(current) {
            return false; // The driver must not clear a bit, except by reset.
        }
        let steps = [
            Status::ACKNOWLEDGE,
            Status::DRIVER,
            Status::FEATURES_OK,
            Status::DRIVER_OK,
        ];
        let next = steps.into_iter().find(|step| !current.contains(*step));
        let added = wanted - current - Status::FAILED;
        if !added.is_empty() && Some(added) != next {
            return false;
        }
        if added == Status::FEATURES_OK && !self.features_fit() {
            return true; // The driver reads FEATURES_OK back and finds it missing.
        }
        let activate = added == Status::DRIVER_OK && !self.broken();
        self.status |= wanted;
        if activate {
            self.work = Some(Work::Activate);
        }
        true
    }

    fn features_fit(&self) -> bool {
        self.driver_features & !self.features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    /// Whether the main thread has something to do.
    pub fn has_work(&self) -> bool {
        self.work.is_some()
    }

    /// What the main thread has to do now, if anything.
    pub fn take_work(&mut self) -> Option<Work> {
        self.work.take()
    }

    /// Main thread: hands memory, queues and interrupt to the device.
    pub fn activate(&mut self) -> Result<(), DeviceError> {
        let queues = self
            .queues
            .iter()
            .map(|registers| self.queue(registers))
            .collect::<Result<Vec<_>, _>>()?;
        let notify: io::Result<Vec<_>> = self.notify.iter().map(EventFd::try_clone).collect();
        self.active = true;
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            notify: notify.map_err(DeviceError::fatal)?,
            interrupt: self.interrupt.clone(),
            features: self.driver_features,
        })
    }

    fn queue(&self, registers: &QueueRegisters) -> Result<Queue, DeviceError> {
        let broken = |error| DeviceError::hostile(super::queue::QueueError::Ring(error));
        let mut queue = Queue::new(registers.max).map_err(DeviceError::fatal)?;
        if registers.ready {
            let [desc, avail, used] = registers.addresses.map(vm_memory::GuestAddress);
            queue.try_set_size(registers.size).map_err(broken)?;
            queue.try_set_desc_table_address(desc).map_err(broken)?;
            queue.try_set_avail_ring_address(avail).map_err(broken)?;
            queue.try_set_used_ring_address(used).map_err(broken)?;
            queue.set_event_idx(self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            queue.set_ready(true);
            if !queue.is_valid(&self.memory) {
                return Err(DeviceError::hostile("a ring of the queue lies outside RAM"));
            }
        }
        Ok(queue)
    }

    /// Main thread: the device and its registers are as new afterwards.
    pub fn reset(&mut self) {
        self.quiesce();
        self.status = Status::empty();
        self.interrupt.reset();
        (
            self.device_features_sel,
            self.driver_features_sel,
            self.queue_sel,
        ) = (0, 0, 0);
        self.driver_features = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max);
        }
    }

    /// Main thread: the guest broke the rules, so the device stops until the driver resets it.
    pub fn needs_reset(&mut self) {
        self.quiesce();
        self.status |= Status::DEVICE_NEEDS_RESET;
        self.interrupt.signal_config();
    }

    fn quiesce(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        for event in &self.notify {
            // Empty is what we want it to be.
            let _ = event.read();
        }
    }
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("kind", &self.device.kind())
            .field("status", &self.status)
            .finish()
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn store(register: &mut u32, value: u32) -> bool {
    *register = value;
    true
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
