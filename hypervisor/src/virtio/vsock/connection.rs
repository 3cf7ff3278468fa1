//! One connection between a port of the guest and a unix socket of the host.
//!
//! ```text
//! host client                                                guest program
//!   connect ──► REQUEST ──► Requested ── RESPONSE ──► Open ◄── REQUEST, RESPONSE
//!                               │ RST, no answer        │
//!                               ▼                       ├── SHUTDOWN of both by the guest, RST ──► Draining
//!                              gone                     └── host closed: SHUTDOWN of both ──► Closing ── RST ──► gone
//! ```
//!
//! In `Open` each direction ends on its own. The host's end of file becomes SHUTDOWN_SEND, a reader of the host that
//! is gone SHUTDOWN_RECEIVE; the guest's flags become shutdown(2) of the socket, once what it sent before went out.

use super::credit::{Credit, OverCredit};
use super::outbox::Outbox;
use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::{HOST_CID, volatile_io};
use bitflags::bitflags;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Names a connection among all of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub guest_port: u32,
    pub host_port: u32,
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The host's client asked; the guest was sent REQUEST, or will be, and has not answered.
    Requested,
    /// Bytes flow in the directions that nobody shut.
    Open,
    /// The host's end is closed and the guest was told so; it owes us RST. What it still sends is dropped.
    Closing,
    /// The guest is done with the connection and may use its ports again. What it sent still goes to the host.
    Draining,
}

/// Why a connection is reset.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error(transparent)]
    OverCredit(#[from] OverCredit),
    #[error("a packet with operation {op:?} in state {state:?}")]
    Unexpected { op: Option<Op>, state: State },
    #[error("the host's client can't be answered")]
    Host(#[source] io::Error),
}

bitflags! {
    /// Packets without data that the guest will get when it has a buffer.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Pending: u8 {
        const REQUEST = 1;
        const RESPONSE = 2;
        const CREDIT_UPDATE = 4;
    }
}

#[derive(Debug)]
pub struct Connection {
    pub key: Key,
    /// When the guest's answer is overdue, in the states that wait for one.
    pub deadline: Option<Instant>,
    /// Whether the muxer has it in its list of connections with packets for the guest.
    pub listed: bool,
    guest_cid: u64,
    /// The guest asked for it.
    from_guest: bool,
    socket: UnixStream,
    state: State,
    credit: Credit,
    outbox: Outbox,
    pending: Pending,
    /// The socket may hold bytes or an end. Cleared when it says otherwise; set by edge-triggered events.
    readable: bool,
    /// SHUTDOWN flags of the host's side, and those the guest knows.
    host_shut: u32,
    host_shut_told: u32,
    /// SHUTDOWN flags the guest sent.
    guest_shut: u32,
    /// CREDIT_REQUEST was sent since the guest's buffer became full.
    asked: bool,
}

impl Connection {
    /// A connection that the host's client asked for.
    pub fn from_host(guest_cid: u64, key: Key, socket: UnixStream, deadline: Instant) -> Self {
        let connection = Self::new(guest_cid, key, socket, State::Requested, Pending::REQUEST);
        Self {
            deadline: Some(deadline),
            ..connection
        }
    }

    /// A connection that the guest asked for with `request`.
    pub fn from_guest(request: &Header, key: Key, socket: UnixStream) -> Self {
        let mut connection =
            Self::new(request.src_cid, key, socket, State::Open, Pending::RESPONSE);
        connection.credit.learn(request);
        connection.from_guest = true;
        connection
    }

    fn new(guest_cid: u64, key: Key, socket: UnixStream, state: State, pending: Pending) -> Self {
        Self {
            key,
            deadline: None,
            listed: false,
            guest_cid,
            from_guest: false,
            socket,
            state,
            credit: Credit::default(),
            outbox: Outbox::default(),
            pending,
            readable: true,
            host_shut: 0,
            host_shut_told: 0,
            guest_shut: 0,
            asked: false,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// The guest asked for it, and nothing went through yet.
    pub fn is_untouched(&self) -> bool {
        self.from_guest && self.credit.is_fresh() && self.guest_shut | self.host_shut == 0
    }

    pub fn into_socket(self) -> UnixStream {
        self.socket
    }

    /// Nothing is left to do on either side.
    pub fn is_done(&self) -> bool {
        self.state == State::Draining && self.outbox.is_empty()
    }

    /// A packet of the guest, with as much data as its header says. RST is not for here: see [`Self::leave`].
    pub fn take(&mut self, header: &Header, data: &[VolatileSlice<'_>]) -> Result<(), Broken> {
        self.credit.learn(header);
        self.asked &= self.credit.available() == 0;
        match (header.op, self.state) {
            (Some(Op::Response), State::Requested) => self.open(),
            (Some(Op::Rw), State::Open | State::Closing)
                if self.guest_shut & SHUTDOWN_SEND == 0 =>
            {
                self.forward(header.len, data)
            }
            (Some(Op::CreditUpdate), _) => Ok(()),
            (Some(Op::CreditRequest), _) => {
                self.pending |= Pending::CREDIT_UPDATE;
                Ok(())
            }
            (Some(Op::Shutdown), State::Open | State::Closing) => {
                self.shut_by_guest(header.flags);
                Ok(())
            }
            (op, state) => Err(Broken::Unexpected { op, state }),
        }
    }

    /// The guest has no part in the connection any more.
    pub fn leave(&mut self) {
        self.state = State::Draining;
        self.deadline = None;
    }

    fn open(&mut self) -> Result<(), Broken> {
        let answer = format!("OK {}\n", self.key.host_port);
        // The socket is new and its buffer empty, so it takes the line whole or is broken.
        volatile_io::send_bytes(&self.socket, answer.as_bytes()).map_err(Broken::Host)?;
        self.state = State::Open;
        self.deadline = None;
        Ok(())
    }

    fn forward(&mut self, length: u32, data: &[VolatileSlice<'_>]) -> Result<(), Broken> {
        self.credit.receive(length)?;
        let mut sent = 0;
        if self.host_shut & SHUTDOWN_RECEIVE == 0 && self.outbox.is_empty() && length > 0 {
            match volatile_io::send(&self.socket, data) {
                Ok(count) => sent = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.stop_writing(),
            }
        }
        if self.host_shut & SHUTDOWN_RECEIVE != 0 {
            self.consume(length as usize);
        } else {
            self.outbox.push(data, sent);
            self.consume(sent);
        }
        Ok(())
    }

    fn consume(&mut self, count: usize) {
        self.credit
            .consume(u32::try_from(count).expect("at most the buffer of a connection"));
        if self.credit.update_is_due() {
            self.pending |= Pending::CREDIT_UPDATE;
        }
    }

    fn shut_by_guest(&mut self, flags: u32) {
        self.guest_shut |= flags & SHUTDOWN_BOTH;
        if self.guest_shut == SHUTDOWN_BOTH {
            self.leave();
            return;
        }
        // Errors mean that the other end is closed already, of which the socket's events tell.
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 {
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        if self.guest_shut & SHUTDOWN_SEND != 0 && self.outbox.is_empty() {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// The socket's events, edge-triggered.
    pub fn socket_event(&mut self, events: EventSet) {
        self.readable = true;
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.stop_writing();
        } else if events.contains(EventSet::OUT) {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.outbox.is_empty() {
            return;
        }
        match self.outbox.flush(&self.socket) {
            Ok(count) => self.consume(count),
            Err(_) => return self.stop_writing(),
        }
        if self.outbox.is_empty() && self.guest_shut & SHUTDOWN_SEND != 0 {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// Nobody reads at the host any more; what it wrote before still goes to the guest.
    fn stop_writing(&mut self) {
        let lost = std::mem::take(&mut self.outbox);
        self.consume(lost.len());
        self.host_shut |= SHUTDOWN_RECEIVE;
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 {
            self.host_shut |= SHUTDOWN_SEND;
        }
    }

    /// Whether [`Self::fill`] would give a packet, as far as can be known without asking the socket.
    pub fn has_packet(&self) -> bool {
        match self.state {
            State::Draining => false,
            State::Requested | State::Closing => !self.pending.is_empty(),
            State::Open => {
                !self.pending.is_empty()
                    || self.host_shut != self.host_shut_told
                    || self.may_read() && (self.credit.available() > 0 || !self.asked)
            }
        }
    }

    fn may_read(&self) -> bool {
        self.state == State::Open
            && self.readable
            && self.host_shut & SHUTDOWN_SEND == 0
            && self.guest_shut & SHUTDOWN_RECEIVE == 0
    }

    /// The next packet for the guest, its data written into `room`, which is not empty.
    ///
    /// Order: the handshake, data, then what has no data. Data carries news of credit with it.
    pub fn fill(&mut self, room: &[VolatileSlice<'_>]) -> Option<Header> {
        if !self.has_packet() {
            return None;
        }
        if self.pending.contains(Pending::REQUEST) {
            self.pending.remove(Pending::REQUEST);
            return Some(self.header(Op::Request));
        }
        if self.pending.contains(Pending::RESPONSE) {
            self.pending.remove(Pending::RESPONSE);
            return Some(self.header(Op::Response));
        }
        if self.may_read()
            && let Some(header) = self.read(room)
        {
            return Some(header);
        }
        if self.state == State::Open && self.host_shut != self.host_shut_told {
            self.host_shut_told = self.host_shut;
            if self.host_shut == SHUTDOWN_BOTH {
                self.state = State::Closing;
            }
            return Some(Header {
                flags: self.host_shut,
                ..self.header(Op::Shutdown)
            });
        }
        self.pending
            .contains(Pending::CREDIT_UPDATE)
            .then(|| self.header(Op::CreditUpdate))
    }

    fn read(&mut self, room: &[VolatileSlice<'_>]) -> Option<Header> {
        let credit = self.credit.available();
        if credit == 0 {
            let ask = !std::mem::replace(&mut self.asked, true);
            return ask.then(|| self.header(Op::CreditRequest));
        }
        match volatile_io::receive(&self.socket, &first(room, credit as usize)) {
            Ok(0) => self.host_shut |= SHUTDOWN_SEND,
            Ok(count) => {
                let len = u32::try_from(count).expect("at most the credit");
                self.credit.send(len);
                return Some(Header {
                    len,
                    ..self.header(Op::Rw)
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            // The client closed its end with bytes unread in it.
            Err(_) => {
                self.stop_writing();
                self.host_shut |= SHUTDOWN_SEND;
            }
        }
        None
    }

    fn header(&mut self, op: Op) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.tell();
        self.pending.remove(Pending::CREDIT_UPDATE);
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// The RST that ends this connection for the guest.
    pub fn reset(&mut self) -> Header {
        self.header(Op::Rst)
    }
}

/// The first `length` bytes of `room`.
fn first<'a>(room: &[VolatileSlice<'a>], mut length: usize) -> Vec<VolatileSlice<'a>> {
    let mut parts = Vec::with_capacity(room.len());
    for slice in room {
        if length == 0 {
            break;
        }
        let take = slice.len().min(length);
        parts.push(slice.subslice(0, take).expect("within the slice"));
        length -= take;
    }
    parts
}
