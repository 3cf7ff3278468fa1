//! virtio-net over a tap device (virtio 1.2, section 5.1).
//!
//! ```text
//! queue 0  receive    writable buffers that wait for frames
//! queue 1  transmit   readable: one frame in each chain
//! ```
//!
//! Every frame, in both directions, begins with `struct virtio_net_hdr_v1`: 12 bytes that say where a checksum is still
//! to be filled in and how a large frame is to be cut. The tap speaks the same header (IFF_VNET_HDR, TUNSETVNETHDRSZ),
//! so frames pass as they are and up to 64 KiB at a time; what the guest can take is told to the tap with
//! TUNSETOFFLOAD when the driver has negotiated.
//!
//! - Receive: a frame is read into one host buffer and copied into as many chains as it needs (MRG_RXBUF); their number
//!   stands in the header, and they are published together ([`used`]). A frame that finds too few chains waits in the
//!   host buffer, and the tap is not read meanwhile: its queue fills, and the kernel drops as a full wire would.
//! - Transmit: the chain's memory goes to the tap with one `writev`. The kernel checks the header.
//! - The tap can come late, go, and come back ([`VirtioDevice::set_backend`](super::VirtioDevice::set_backend)); the
//!   guest sees the link go up and down. Without a tap, frames of the guest are dropped as on a pulled cable.
//!
//! The tap is watched edge-triggered, so a frame that waits for the guest wakes nobody; whoever stops early kicks
//! itself.

mod device;
mod offload;
mod tap;
mod used;

#[cfg(test)]
mod tests;

pub use device::Net;

use std::io;

const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;

/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// Where the header holds the number of chains of a received frame.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// The longest frame: header, Ethernet header with two VLAN tags, and the largest IP packet.
const MAX_FRAME: usize = HEADER + 14 + 8 + 65_535;
/// The shortest: a header and an Ethernet header. The tap refuses less.
const MIN_FRAME: usize = HEADER + 14;
/// Frames received in one go, so that a flood does not starve other devices.
const MAX_FRAMES_PER_EVENT: usize = 256;

/// What can go wrong with a tap, or be wrong with how the guest drives the device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("can't ask the tap for its flags")]
    NotATap(#[source] io::Error),
    #[error(
        "the tap has flags {0:#x}: it must be opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR and one queue"
    )]
    TapFlags(i32),
    #[error("can't set the tap's virtio header to {HEADER} bytes")]
    HeaderSize(#[source] io::Error),
    #[error("the tap refuses the offloads {offloads:#x} which the guest negotiated")]
    Offload { offloads: u32, source: io::Error },
    #[error("can't make the tap non-blocking")]
    NonBlocking(#[source] io::Error),
    #[error("the receive buffer at {head} has {have} bytes, less than the header's {HEADER}")]
    SmallBuffer { head: u16, have: usize },
}
