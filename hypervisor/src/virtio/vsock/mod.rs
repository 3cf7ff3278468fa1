//! virtio-vsock (virtio 1.2, section 5.10): stream sockets between guest and host, without any network.
//!
//! The host side is unix sockets which the shim hands over, so the host needs no vsock of its own and context ids need
//! not be unique:
//!
//! ```text
//!  shim ── unix listener ──► Muxer ◄── rx, tx queues ──► guest driver ── AF_VSOCK ── agent
//!       ── HostPort socket ─►
//! ```
//!
//! - **Host to guest**: a client of the listener writes `CONNECT <port>\n`; the guest gets a REQUEST from a host port of
//!   2^30 and above. Its RESPONSE is told to the client as `OK <host port>\n`, its RST by closing the socket.
//! - **Guest to host**: only to the host ports of the configuration, each once; the connection then is the socket that
//!   came with it. An attempt that the guest gave up before any byte went through does not count. Everything else is
//!   answered with RST.
//!
//! A packet is a 44-byte header ([`Header`]) and, for RW, data. Each side counts what it received and what it
//! consumed, and never sends more than the other has room for ([`Credit`]). Either side may say SHUTDOWN for one
//! direction or both; RST ends a connection, and acknowledges a SHUTDOWN of both directions.
//!
//! [`Muxer`] knows packets and sockets and no queue; [`queues`] moves packets between it and a pair of virtqueues.
//! Two transports use them: [`Vsock`], the device of coffer-vmm, and `crate::qemu::vsock`, a vhost-user backend.
//!
//! Everything in a packet is the guest's choice. Rules it breaks cost it the connection concerned, never more than
//! [`limits`] says of memory, and never a loop of ours: a packet is answered at most once.

mod connection;
mod credit;
mod device;
mod greeting;
mod muxer;
mod outbox;
mod packet;
pub mod queues;
mod volatile_io;

#[cfg(test)]
mod tests;

pub use credit::Credit;
pub use device::Vsock;
pub use muxer::{Counters, Muxer};
pub use packet::{Header, Op};

use std::io;

/// The host's context id (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;
/// Index of the queue with packets for the guest.
pub const RX_QUEUE: usize = 0;
/// Index of the queue with packets of the guest.
pub const TX_QUEUE: usize = 1;
/// With the queue of events for the guest, of which there are none before the first restored snapshot.
pub const QUEUES: usize = 3;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone and the context id may have changed; said after a
/// snapshot was restored.
pub const TRANSPORT_RESET: u32 = 0;

/// Bounds of what one guest can make us hold.
pub mod limits {
    use std::time::Duration;

    /// Connections in any state, as in Firecracker: 64 containers with three streams and 20 execs fit many times.
    pub const MAX_CONNECTIONS: usize = 1023;
    /// What a connection holds for a host reader that doesn't read: four of Linux's largest packets, so that the
    /// guest keeps sending while a credit update is under way.
    pub const BUFFER: u32 = 256 << 10;
    /// The guest is told of free space when it knows of less than this.
    pub const CREDIT_THRESHOLD: u32 = BUFFER / 2;
    /// Resets that wait for a buffer of the guest. With more, packets of the guest stay in its queue.
    pub const MAX_RESETS: usize = 256;
    /// How long a host client may take for its `CONNECT` line, and a guest for the answer to REQUEST and to SHUTDOWN.
    /// Long enough for a guest under software emulation on a busy machine.
    pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
    /// Longest `CONNECT <port>\n` is 19 bytes; a line that is longer than this is none.
    pub const MAX_GREETING: usize = 32;
    /// First port for connections of the host; the guest's programs use lower ones.
    pub const FIRST_HOST_PORT: u32 = 1 << 30;
}

/// The muxer can't work: the host's fault, not the guest's.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    #[error("can't set up the event descriptors of vsock")]
    Setup(#[source] io::Error),
    #[error("can't watch a vsock socket")]
    Watch(#[source] io::Error),
    #[error("can't wait for vsock sockets")]
    Wait(#[source] io::Error),
}
