//! The vhost-user conversation with coffer-fsd.
//!
//! A message is a header of three native-endian u32 (request, flags, payload size), a payload, and files beside it.
//! The numbers and structures are those of the `vhost` crate. Its `Frontend` is not used because it repeats a read
//! that timed out for ever, and this conversation runs on the event loop: here every wait ends at one deadline.

use super::FsError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, VhostUserHeaderFlag, VhostUserMemory,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserU64, VhostUserVringAddr,
    VhostUserVringState,
};
use vm_memory::ByteValued;

/// Version 1 of the protocol, in the flags of every header.
const VERSION: u32 = 1;
const HEADER: usize = 12;
/// The longest answer that any request here has: two u32 or one u64.
const MAX_ANSWER: usize = 8;

/// coffer-fsd, at the other end of the socket.
#[derive(Debug)]
pub(super) struct Backend {
    socket: OwnedFd,
    /// SET_OWNER was said, which the protocol allows once.
    owner: bool,
    /// Every request asks for an answer (REPLY_ACK was negotiated).
    acknowledged: bool,
    deadline: Instant,
}

impl Backend {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            owner: false,
            acknowledged: false,
            deadline: Instant::now(),
        }
    }

    /// Starts the clock: everything until the next call must be done within `limit`.
    pub(super) fn begin(&mut self, limit: Duration) {
        self.deadline = Instant::now() + limit;
    }

    /// Settles the features: `wanted` of virtio and, with `protocol` the bit that stands for it, REPLY_ACK of the
    /// protocol. The first time this also takes the session.
    pub(super) fn negotiate(&mut self, wanted: u64, protocol: u64) -> Result<(), FsError> {
        if !self.owner {
            self.command(FrontendReq::SET_OWNER, &[], &[])?;
            self.owner = true;
        }
        let offered = self.query_u64(FrontendReq::GET_FEATURES)?;
        let needed = wanted | protocol;
        if offered & needed != needed {
            return Err(FsError::Features { offered, needed });
        }
        if !self.acknowledged {
            let extensions = self.query_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
            let reply_ack = VhostUserProtocolFeatures::REPLY_ACK.bits() & extensions;
            self.command(
                FrontendReq::SET_PROTOCOL_FEATURES,
                VhostUserU64::new(reply_ack).as_slice(),
                &[],
            )?;
            self.acknowledged = reply_ack != 0;
        }
        self.command(
            FrontendReq::SET_FEATURES,
            VhostUserU64::new(needed).as_slice(),
            &[],
        )
    }

    /// Tells where guest memory is; `files` holds the memory file of each region.
    pub(super) fn set_memory(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: &[BorrowedFd<'_>],
    ) -> Result<(), FsError> {
        if regions.is_empty() || regions.len() > MAX_ATTACHED_FD_ENTRIES {
            return Err(FsError::Regions(MAX_ATTACHED_FD_ENTRIES));
        }
        let mut payload = VhostUserMemory::new(regions.len() as u32)
            .as_slice()
            .to_vec();
        for region in regions {
            payload.extend_from_slice(region.as_slice());
        }
        self.command(FrontendReq::SET_MEM_TABLE, &payload, files)
    }

    /// Gives a queue its size, rings, start index and eventfds, and lets it run.
    pub(super) fn start_queue(
        &self,
        index: u32,
        size: u16,
        rings: &VhostUserVringAddr,
        call: BorrowedFd<'_>,
        kick: BorrowedFd<'_>,
    ) -> Result<(), FsError> {
        let state = |number: u32| VhostUserVringState::new(index, number);
        let number = VhostUserU64::new(u64::from(index));
        self.command(
            FrontendReq::SET_VRING_NUM,
            state(u32::from(size)).as_slice(),
            &[],
        )?;
        self.command(FrontendReq::SET_VRING_ADDR, rings.as_slice(), &[])?;
        self.command(FrontendReq::SET_VRING_BASE, state(0).as_slice(), &[])?;
        self.command(FrontendReq::SET_VRING_CALL, number.as_slice(), &[call])?;
        self.command(FrontendReq::SET_VRING_KICK, number.as_slice(), &[kick])?;
        self.command(FrontendReq::SET_VRING_ENABLE, state(1).as_slice(), &[])
    }

    /// Stops a queue: when the answer is there, coffer-fsd no longer touches its rings.
    pub(super) fn stop_queue(&self, index: u32) -> Result<(), FsError> {
        let state = VhostUserVringState::new(index, 0);
        self.send(FrontendReq::GET_VRING_BASE, 0, state.as_slice(), &[])?;
        self.answer(FrontendReq::GET_VRING_BASE).map(|_| ())
    }

    fn query_u64(&self, request: FrontendReq) -> Result<u64, FsError> {
        self.send(request, 0, &[], &[])?;
        self.answer(request)
    }

    /// Sends a request that has no answer of its own, and waits for its acknowledgement where there is one.
    fn command(
        &self,
        request: FrontendReq,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<(), FsError> {
        if !self.acknowledged {
            return self.send(request, 0, payload, files);
        }
        self.send(
            request,
            VhostUserHeaderFlag::NEED_REPLY.bits(),
            payload,
            files,
        )?;
        match self.answer(request)? {
            0 => Ok(()),
            code => Err(FsError::Refused { request, code }),
        }
    }

    fn send(
        &self,
        request: FrontendReq,
        flags: u32,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<(), FsError> {
        let mut message = Vec::with_capacity(HEADER + payload.len());
        for word in [u32::from(request), VERSION | flags, payload.len() as u32] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        message.extend_from_slice(payload);
        let files: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&files)];
        let mut control: &[ControlMessage<'_>] = if files.is_empty() { &[] } else { &rights };
        let mut rest = &message[..];
        while !rest.is_empty() {
            self.wait(request, PollFlags::POLLOUT)?;
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(rest)],
                control,
                flags,
                None,
            ) {
                // The files travelled with the first byte.
                Ok(count) => (rest, control) = (&rest[count..], &[]),
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => return Err(FsError::Ended),
                Err(error) => {
                    return Err(FsError::Send {
                        request,
                        source: error.into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Reads the answer to `request`: a u64, or the second word of a queue state.
    fn answer(&self, request: FrontendReq) -> Result<u64, FsError> {
        let mut header = [0; HEADER];
        self.fill(request, &mut header)?;
        let word =
            |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let (code, flags, size) = (word(0), word(4), word(8));
        if code != u32::from(request)
            || flags & VhostUserHeaderFlag::VERSION.bits() != VERSION
            || flags & VhostUserHeaderFlag::REPLY.bits() == 0
            || size as usize != MAX_ANSWER
        {
            return Err(FsError::Protocol { request });
        }
        let mut payload = [0; MAX_ANSWER];
        self.fill(request, &mut payload)?;
        Ok(u64::from_ne_bytes(payload))
    }

    fn fill(&self, request: FrontendReq, buffer: &mut [u8]) -> Result<(), FsError> {
        let mut filled = 0;
        while filled < buffer.len() {
            self.wait(request, PollFlags::POLLIN)?;
            match recv(
                self.socket.as_raw_fd(),
                &mut buffer[filled..],
                MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(0) | Err(nix::Error::ECONNRESET) => return Err(FsError::Ended),
                Ok(count) => filled += count,
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                Err(error) => {
                    return Err(FsError::Receive {
                        request,
                        source: error.into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Waits until the socket is ready, or the deadline.
    fn wait(&self, request: FrontendReq, events: PollFlags) -> Result<(), FsError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that a last fraction of a millisecond is a wait and not a spin.
        let left = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.socket.as_fd(), events)], left) {
            Ok(0) => Err(FsError::Timeout { request }),
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(FsError::Receive {
                request,
                source: io::Error::from(error),
            }),
        }
    }

    /// Whether coffer-fsd is still there, after an event on its socket outside of a conversation.
    pub(super) fn check(&self) -> Result<(), FsError> {
        let mut byte = [0];
        match recv(
            self.socket.as_raw_fd(),
            &mut byte,
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK,
        ) {
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(()),
            Ok(0) | Err(_) => Err(FsError::Ended),
            Ok(_) => Err(FsError::Unasked),
        }
    }
}

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
