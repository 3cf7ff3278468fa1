//! virtio-fs: the guest's window to the pod's share, served by coffer-fsd (virtio 1.2, section 5.11).
//!
//! No file data passes through this process. The device is the front end of vhost-user: it tells coffer-fsd, over a
//! unix socket, where guest memory is (the memory file), where the rings are, on which eventfd the guest kicks, and
//! which eventfd is the guest's interrupt. From then on guest and coffer-fsd talk through the rings alone.
//!
//! ```text
//! queue 0  hiprio    FORGET and INTERRUPT, which must not wait behind others
//! queue 1  request   everything else
//!
//! at DRIVER_OK:  SET_OWNER, GET_FEATURES, GET/SET_PROTOCOL_FEATURES (REPLY_ACK), SET_FEATURES, SET_MEM_TABLE,
//!                per queue SET_VRING_NUM, _ADDR, _BASE, _CALL, _KICK, _ENABLE
//! at a reset:    per queue GET_VRING_BASE, which stops it
//! ```
//!
//! coffer-fsd holds state that can't be rebuilt (which inode each node id is), so its end is the end of the VM.

mod backend;
mod device;

#[cfg(test)]
mod tests;

pub use device::Fs;

use std::io;
use std::time::Duration;
use vhost::vhost_user::message::FrontendReq;

const QUEUE_SIZE: u16 = 512;
/// hiprio and one request queue, which is what coffer-fsd serves.
const QUEUES: usize = 2;
/// Bytes of the tag in configuration space; a shorter one is padded with zeroes.
const TAG_BYTES: usize = 36;
/// How long coffer-fsd may take for everything that one activation or reset asks of it. It answers in microseconds
/// once it runs; the bound covers its start on a busy machine.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why there is no file system. All of these end the VM.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("the tag {0:?} has not 1 to {TAG_BYTES} bytes")]
    Tag(String),
    #[error("coffer-fsd ended")]
    Ended,
    #[error("coffer-fsd did not answer {request:?} in time")]
    Timeout { request: FrontendReq },
    #[error("can't send {request:?} to coffer-fsd")]
    Send {
        request: FrontendReq,
        source: io::Error,
    },
    #[error("can't read coffer-fsd's answer to {request:?}")]
    Receive {
        request: FrontendReq,
        source: io::Error,
    },
    #[error("coffer-fsd's answer to {request:?} breaks the vhost-user protocol")]
    Protocol { request: FrontendReq },
    #[error("coffer-fsd refused {request:?} with {code}")]
    Refused { request: FrontendReq, code: u64 },
    #[error("coffer-fsd offers features {offered:#x}, but {needed:#x} are needed")]
    Features { offered: u64, needed: u64 },
    #[error("coffer-fsd sent something unasked")]
    Unasked,
    #[error("guest memory at {0:#x} is not backed by a file that coffer-fsd could map")]
    PrivateMemory(u64),
    #[error("guest memory has more than {0} regions")]
    Regions(usize),
    #[error("a ring of queue {0} is not in guest memory")]
    Ring(usize),
    #[error("can't share the interrupt with coffer-fsd")]
    Interrupt(#[source] io::Error),
}
