//! What a virtio device is to the transport and to the event loop.
//!
//! All devices run on the main thread of the VMM. vCPU threads only read registers and configuration space; what
//! they start (activation, reset) the main thread carries out while the vCPU waits. So a device needs no lock of its
//! own and may use any system call that the main thread's seccomp filter has.

use super::Memory;
use std::error::Error;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A virtio device.
///
/// Life: created → (`activate` → `queue_event`/`source_event`… → `reset`)* → dropped. Nothing but `features`,
/// `queue_sizes`, `read_config`, `counters` and `set_backend` is called on a device that is not active.
pub trait VirtioDevice: Send {
    /// Device type of virtio 1.2, section 5.
    fn kind(&self) -> u32;

    /// Device feature bits. The transport adds VERSION_1, EVENT_IDX and INDIRECT_DESC.
    fn features(&self) -> u64 {
        0
    }

    /// Most entries of each queue; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Reads configuration space at `offset` ([`copy_config`]). Bytes beyond its end stay as they are (zero). Also runs
    /// on vCPU threads.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    /// Writes configuration space. Also runs on vCPU threads, so it only stores; a device without writable fields
    /// ignores it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready. Queue addresses are checked against guest memory already.
    fn activate(&mut self, active: Activation) -> Result<(), DeviceError>;

    /// The driver kicked this queue. The event is already drained. May be called without a kick.
    ///
    /// A device does a bounded amount of work ([`super::queue::MAX_CHAINS_PER_EVENT`]); where more is left it writes its own
    /// notify eventfd and returns, so that the others get their turn.
    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError>;

    /// Whether somebody else reads [`Activation::notify`] (a vhost-user backend does). Then `queue_event` is not called.
    fn takes_kicks(&self) -> bool {
        false
    }

    /// Host files to watch while the device is active: the file, the events, and a token of the device's choice.
    /// Asked after `activate` and after `set_backend`. A device whose set changes otherwise holds an epoll file of its own
    /// and gives that one.
    fn sources(&self) -> Vec<(RawFd, EventSet, u16)> {
        Vec::new()
    }

    /// A source of [`VirtioDevice::sources`] is ready.
    fn source_event(&mut self, _token: u16, _set: EventSet) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The driver reset the device: drop the activation, cancel what is in flight, be as new.
    fn reset(&mut self);

    /// Gives the device another backing file while the VM runs (the tap of a network slot, the content of a disk slot), or takes it away.
    fn set_backend(&mut self, _backend: Option<OwnedFd>) -> Result<(), DeviceError> {
        Err(DeviceError::fatal(
            "the device has no exchangeable backing file",
        ))
    }

    /// Counters for [`coffer_proto::vmm::Metrics::devices`], without the device's name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// What the transport hands over at DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    pub memory: Memory,
    /// All queues of the device. One the driver left out is not `ready()`.
    pub queues: Vec<Queue>,
    /// One kick event for each queue. The event loop drains it and calls `queue_event`, unless the device
    /// [takes kicks](VirtioDevice::takes_kicks) itself.
    pub notify: Vec<EventFd>,
    pub interrupt: Interrupt,
    /// What was negotiated.
    pub features: u64,
}

impl Activation {
    /// Whether the driver accepted feature bit number `bit`.
    pub fn negotiated(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// What a read of configuration space at `offset` gives, for a device whose whole space is `config`.
pub(super) fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
}

/// Runs `work` on a device and its activation, which is out of its `place` meanwhile. A device that is not active has
/// nothing to do.
pub(super) fn with_active<D>(
    device: &mut D,
    place: fn(&mut D) -> &mut Option<Activation>,
    work: impl FnOnce(&mut D, &mut Activation) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let Some(mut active) = place(device).take() else {
        return Ok(());
    };
    let done = work(device, &mut active);
    *place(device) = Some(active);
    done
}

/// `InterruptStatus` bit: the device used a buffer.
const USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit: the configuration changed.
const CONFIG_CHANGE: u32 = 2;

/// The interrupt line of one device and the registers that belong to it (virtio 1.2, 4.2.2 `InterruptStatus`,
/// `ConfigGeneration`). Clones share them.
#[derive(Debug, Clone)]
pub struct Interrupt {
    line: Arc<EventFd>,
    status: Arc<AtomicU32>,
    generation: Arc<AtomicU32>,
    /// Somebody else raises the line, so "used buffer" is always reported.
    handed_over: Arc<AtomicBool>,
}

impl Interrupt {
    /// An interrupt with a new eventfd, which becomes the irqfd of the device's line.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            line: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            status: Arc::default(),
            generation: Arc::default(),
            handed_over: Arc::default(),
        })
    }

    /// Tells the driver that a buffer was used. Ask `Queue::needs_notification` first.
    pub fn signal_queue(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that configuration space changed. Call after the change.
    pub fn signal_config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // A full counter (EAGAIN) means that the interrupt is pending already.
        let _ = self.line.write(1);
    }

    /// The line itself, for a vhost-user backend that raises it without us. From now on the status register always
    /// says "used buffer", because nobody here sees the backend's interrupts; a spurious one costs the driver nothing.
    pub fn hand_over(&self) -> std::io::Result<EventFd> {
        self.handed_over.store(true, Ordering::SeqCst);
        self.line.try_clone()
    }

    pub(crate) fn line(&self) -> &EventFd {
        &self.line
    }

    pub(crate) fn status(&self) -> u32 {
        let foreign = if self.handed_over.load(Ordering::SeqCst) {
            USED_BUFFER
        } else {
            0
        };
        self.status.load(Ordering::SeqCst) | foreign
    }

    pub(crate) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(crate) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.handed_over.store(false, Ordering::SeqCst);
    }
}

/// Why a device can't go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guest broke the rules. The device stops with DEVICE_NEEDS_RESET, told once in the log; the VM goes on.
    #[error("the guest drove the device against the rules")]
    Hostile(#[source] Box<dyn Error + Send + Sync>),
    /// The host side failed. The VM ends.
    #[error("the device failed")]
    Fatal(#[source] Box<dyn Error + Send + Sync>),
}

impl DeviceError {
    pub fn hostile(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Hostile(cause.into())
    }

    pub fn fatal(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Fatal(cause.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledged_bits_are_cleared_and_others_stay() {
        let interrupt = Interrupt::new().unwrap();
        interrupt.signal_queue();
        interrupt.signal_config();
        assert_eq!((interrupt.status(), interrupt.generation()), (3, 1));
        interrupt.acknowledge(USED_BUFFER);
        assert_eq!(interrupt.status(), CONFIG_CHANGE);
        assert_eq!(interrupt.line().read().unwrap(), 2);
    }

    #[test]
    fn a_handed_over_line_always_says_used_buffer() {
        let interrupt = Interrupt::new().unwrap();
        interrupt.hand_over().unwrap().write(1).unwrap();
        interrupt.acknowledge(3);
        assert_eq!(interrupt.status(), USED_BUFFER);
        interrupt.reset();
        assert_eq!(interrupt.status(), 0);
    }
}
