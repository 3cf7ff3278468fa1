//! virtio devices and their transport.
//!
//! A device is a [`VirtioDevice`]: it knows its features, its configuration space and its queues, and nothing of how
//! the guest reaches it. [`mmio`] is the one transport (virtio 1.2, section 4.2); it owns the registers, hands the
//! queues over when the driver sets DRIVER_OK, and takes everything back at a reset. [`queue`] reads the rings, which
//! the guest writes, and gives a device only chains that are whole.

pub mod balloon;
pub mod block;
pub mod console;
pub mod device;
#[cfg(test)]
mod driver;
pub mod fs;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod slot;
pub mod vsock;

pub use device::{Activation, DeviceError, Interrupt, VirtioDevice};

/// Guest RAM as every device sees it.
pub type Memory = vm_memory::GuestMemoryMmap<()>;
