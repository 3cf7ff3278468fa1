//! All connections of one guest over one pair of queues.

use super::connection::{Connection, Key, State};
use super::limits::{ANSWER_TIMEOUT, FIRST_HOST_PORT, MAX_CONNECTIONS, MAX_RESETS};
use super::packet::{Header, Op, TYPE_STREAM};
use super::{HOST_CID, VsockError, greeting};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

/// Event tokens. A socket's is its number in `greeting` or `connections`, counted up from `FIRST_SOCKET`.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_SOCKET: u64 = 2;
/// Events taken from the kernel at once.
const EVENTS: usize = 64;

/// What went through so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes of data for the guest.
    pub rx_bytes: u64,
    pub rx_packets: u64,
    /// Bytes of data of the guest.
    pub tx_bytes: u64,
    pub tx_packets: u64,
    /// Connections that either side asked for and that came to be known to the muxer.
    pub connections: u64,
    /// RST packets for the guest.
    pub resets: u64,
    /// Packets of the guest that could not even be answered: their source is not the guest.
    pub dropped: u64,
}

impl Counters {
    /// With the names under which metrics show them.
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("rx_bytes", self.rx_bytes),
            ("rx_packets", self.rx_packets),
            ("tx_bytes", self.tx_bytes),
            ("tx_packets", self.tx_packets),
            ("connections", self.connections),
            ("resets", self.resets),
            ("dropped", self.dropped),
        ]
    }
}

/// Moves bytes between the host's sockets and packets. It never blocks, and all it waits for is behind [`Muxer::fd`].
///
/// Sockets are watched edge-triggered and what they said is kept, so one that is ready while the guest has no buffer
/// costs nothing until it has.
pub struct Muxer {
    guest_cid: u64,
    listener: UnixListener,
    /// Host ports the guest may still connect to.
    ports: HashMap<u32, UnixStream>,
    epoll: Epoll,
    timer: TimerFd,
    /// Clients of the listener that have not said which port they want.
    greeting: HashMap<u64, UnixStream>,
    connections: HashMap<u64, Connection>,
    /// The connections the guest knows.
    keys: HashMap<Key, u64>,
    /// Connections with packets for the guest, each once, in the order in which they get their turn.
    ready: VecDeque<u64>,
    /// Goes to the guest before all else.
    resets: VecDeque<Header>,
    /// When to look at which socket's deadline; in order, since all are equally long.
    deadlines: VecDeque<(Instant, u64)>,
    next_socket: u64,
    next_port: u32,
    /// The listener may have clients waiting.
    clients_wait: bool,
    dialled: Vec<u32>,
    counters: Counters,
}

impl std::fmt::Debug for Muxer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let connections = self.connections.len();
        f.debug_struct("Muxer")
            .field("guest_cid", &self.guest_cid)
            .field("connections", &connections)
            .finish()
    }
}

impl Muxer {
    /// `listener` takes clients of the host; `ports` are the host ports the guest may connect to.
    pub fn new(
        guest_cid: u64,
        listener: UnixListener,
        ports: impl IntoIterator<Item = (u32, UnixStream)>,
    ) -> Result<Self, VsockError> {
        let epoll = Epoll::new().map_err(VsockError::Setup)?;
        let timer = TimerFd::new().map_err(|error| VsockError::Setup(error.into()))?;
        listener.set_nonblocking(true).map_err(VsockError::Setup)?;
        let muxer = Self {
            guest_cid,
            listener,
            ports: ports.into_iter().collect(),
            epoll,
            timer,
            greeting: HashMap::new(),
            connections: HashMap::new(),
            keys: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: VecDeque::new(),
            next_socket: FIRST_SOCKET,
            next_port: FIRST_HOST_PORT,
            clients_wait: true,
            dialled: Vec::new(),
            counters: Counters::default(),
        };
        muxer.watch(
            muxer.listener.as_raw_fd(),
            EventSet::IN | EventSet::EDGE_TRIGGERED,
            LISTENER,
        )?;
        muxer.watch(muxer.timer.as_raw_fd(), EventSet::IN, TIMER)?;
        Ok(muxer)
    }

    /// Readable when [`Self::poll`] has something to do.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Host ports the guest has connected to since the last call.
    pub fn take_dialled(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.dialled)
    }

    /// The guest's driver started anew: all connections it had are gone.
    pub fn reset(&mut self) {
        self.connections.retain(|_, connection| {
            connection.leave();
            !connection.is_done()
        });
        self.keys.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// Takes a bounded number of the sockets' events.
    pub fn poll(&mut self) -> Result<(), VsockError> {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(VsockError::Wait(error)),
        };
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.clients_wait = true,
                TIMER => {
                    let _ = self.timer.wait();
                    self.expire(Instant::now());
                }
                id => self.socket_event(id, event.event_set())?,
            }
        }
        self.accept()
    }

    fn socket_event(&mut self, id: u64, events: EventSet) -> Result<(), VsockError> {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.socket_event(events);
            self.settle(id);
        } else if self.greeting.contains_key(&id) {
            self.greet(id);
        }
        Ok(())
    }

    /// Whether a packet of the guest can be taken now. If not, [`Self::next_packet`] has to make room first.
    pub fn accepts_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Takes a packet of the guest. `data` is as long as the header says, or the packet is malformed.
    pub fn take_packet(&mut self, header: &Header, data: &[VolatileSlice<'_>]) {
        self.counters.tx_packets += 1;
        if header.src_cid != self.guest_cid {
            self.counters.dropped += 1;
            return;
        }
        let key = Key {
            guest_port: header.src_port,
            host_port: header.dst_port,
        };
        let known = self.keys.get(&key).copied();
        let whole = data.iter().map(VolatileSlice::len).sum::<usize>() == header.len as usize;
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM || !whole {
            self.refuse(header, known.filter(|_| header.dst_cid == HOST_CID));
            return;
        }
        match (header.op, known) {
            (Some(Op::Rst), Some(id)) => self.leave(id),
            (Some(Op::Rst), None) => {}
            (Some(Op::Request), None) => self.connect(header, key),
            (Some(_), Some(id)) => self.hand_over(id, header, data),
            (_, known) => self.refuse(header, known),
        }
    }

    /// Answers a packet with RST and drops the connection that it named.
    fn refuse(&mut self, header: &Header, known: Option<u64>) {
        if let Some(id) = known {
            self.drop_connection(id);
        }
        // An RST is never answered, or two sides could go on for ever.
        if header.op != Some(Op::Rst) {
            self.push_reset(header.reset());
        }
    }

    fn push_reset(&mut self, reset: Header) {
        self.counters.resets += 1;
        self.resets.push_back(reset);
    }

    /// The guest asks for a port of the host.
    fn connect(&mut self, request: &Header, key: Key) {
        let Some(socket) = self.ports.remove(&key.host_port) else {
            return self.push_reset(request.reset());
        };
        let id = self.new_socket();
        if self.watch_socket(&socket, id).is_err() {
            return self.push_reset(request.reset());
        }
        if !self.dialled.contains(&key.host_port) {
            self.dialled.push(key.host_port);
        }
        self.insert(id, Connection::from_guest(request, key, socket));
    }

    fn hand_over(&mut self, id: u64, header: &Header, data: &[VolatileSlice<'_>]) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        match connection.take(header, data) {
            Ok(()) => {
                if header.op == Some(Op::Rw) {
                    self.counters.tx_bytes += u64::from(header.len);
                }
                if connection.state() == State::Draining {
                    // SHUTDOWN of both directions: what the guest sent is with us, so it may forget the connection.
                    let reset = connection.reset();
                    self.keys.remove(&connection.key);
                    self.push_reset(reset);
                }
                self.settle(id);
            }
            Err(_) => self.abort(id),
        }
    }

    /// The guest sent RST.
    fn leave(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        self.keys.remove(&connection.key);
        if connection.is_untouched() {
            return self.take_back(id);
        }
        connection.leave();
        self.settle(id);
    }

    /// The guest gave up while it connected: Linux does after two seconds, which a busy host may take. The port stays
    /// open for its next attempt.
    fn take_back(&mut self, id: u64) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        let port = connection.key.host_port;
        let socket = connection.into_socket();
        let forget = EpollEvent::default();
        if self
            .epoll
            .ctl(ControlOperation::Delete, socket.as_raw_fd(), forget)
            .is_ok()
        {
            self.ports.insert(port, socket);
        }
    }

    /// Resets a connection from our side.
    fn abort(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let reset = connection.reset();
            self.push_reset(reset);
        }
        self.drop_connection(id);
    }

    fn drop_connection(&mut self, id: u64) {
        if let Some(connection) = self.connections.remove(&id)
            && self.keys.get(&connection.key) == Some(&id)
        {
            self.keys.remove(&connection.key);
        }
        if self.clients_wait {
            // There is room for one now; the timer makes the caller poll.
            self.arm(Instant::now());
        }
    }

    fn insert(&mut self, id: u64, connection: Connection) {
        self.counters.connections += 1;
        self.keys.insert(connection.key, id);
        self.connections.insert(id, connection);
        self.settle(id);
    }

    /// After anything happened to a connection: lists it when it has packets, forgets it when it is done.
    fn settle(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if connection.is_done() {
            self.drop_connection(id);
        } else if connection.has_packet() && !connection.listed {
            connection.listed = true;
            self.ready.push_back(id);
        }
    }

    /// Whether [`Self::next_packet`] may have a packet.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest. Its data, if any, is written into `room`, which must not be empty. The
    /// connections take turns, packet by packet.
    pub fn next_packet(&mut self, room: &[VolatileSlice<'_>]) -> Option<Header> {
        let packet = self
            .resets
            .pop_front()
            .or_else(|| self.next_of_connections(room))?;
        self.counters.rx_packets += 1;
        self.counters.rx_bytes += u64::from(packet.len);
        Some(packet)
    }

    fn next_of_connections(&mut self, room: &[VolatileSlice<'_>]) -> Option<Header> {
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.listed = false;
            let packet = connection.fill(room);
            if connection.state() == State::Closing && connection.deadline.is_none() {
                let deadline = Instant::now() + ANSWER_TIMEOUT;
                connection.deadline = Some(deadline);
                self.expect(deadline, id);
            }
            self.settle(id);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    fn accept(&mut self) -> Result<(), VsockError> {
        while self.clients_wait && self.connections.len() + self.greeting.len() < MAX_CONNECTIONS {
            let client = match self.listener.accept() {
                Ok((client, _)) => client,
                Err(error) => {
                    // Other errors (no files left) may pass: the next event brings us back here.
                    self.clients_wait = error.kind() != io::ErrorKind::WouldBlock;
                    break;
                }
            };
            let id = self.new_socket();
            self.watch_socket(&client, id)?;
            self.greeting.insert(id, client);
            self.expect(Instant::now() + ANSWER_TIMEOUT, id);
            self.greet(id);
        }
        Ok(())
    }

    /// Reads `CONNECT <port>\n` if it is there.
    fn greet(&mut self, id: u64) {
        let Some(client) = self.greeting.remove(&id) else {
            return;
        };
        match greeting::read(&client) {
            Ok(Some(guest_port)) => {
                let key = Key {
                    guest_port,
                    host_port: self.free_port(guest_port),
                };
                let deadline = Instant::now() + ANSWER_TIMEOUT;
                self.expect(deadline, id);
                self.insert(
                    id,
                    Connection::from_host(self.guest_cid, key, client, deadline),
                );
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.greeting.insert(id, client);
            }
            // Not a greeting: dropping the client closes it.
            Ok(None) | Err(_) => {}
        }
    }

    /// A port of the host from which nothing is connected to this port of the guest.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_port;
            self.next_port = if host_port == u32::MAX - 1 {
                FIRST_HOST_PORT
            } else {
                host_port + 1
            };
            if !self.keys.contains_key(&Key {
                guest_port,
                host_port,
            }) {
                return host_port;
            }
        }
    }

    fn new_socket(&mut self) -> u64 {
        let id = self.next_socket;
        self.next_socket += 1;
        id
    }

    fn watch_socket(&self, socket: &UnixStream, id: u64) -> Result<(), VsockError> {
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.watch(socket.as_raw_fd(), events, id)
    }

    fn watch(&self, fd: RawFd, events: EventSet, token: u64) -> Result<(), VsockError> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
            .map_err(VsockError::Watch)
    }

    fn expect(&mut self, deadline: Instant, id: u64) {
        if self.deadlines.is_empty() {
            self.arm(deadline);
        }
        self.deadlines.push_back((deadline, id));
    }

    fn arm(&mut self, deadline: Instant) {
        // Zero would disarm it. The timer is relative and can only fail for a value out of range.
        let wait = deadline
            .saturating_duration_since(Instant::now())
            .max(std::time::Duration::from_millis(1));
        let _ = self.timer.reset(wait, None);
    }

    /// Ends what waited until `now`.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, id)) = self.deadlines.front() {
            if deadline > now {
                break;
            }
            self.deadlines.pop_front();
            self.greeting.remove(&id);
            let overdue = |connection: &Connection| {
                connection.deadline.is_some_and(|deadline| deadline <= now)
            };
            if self.connections.get(&id).is_some_and(overdue) {
                self.abort(id);
            }
        }
        if let Some((deadline, _)) = self.deadlines.front() {
            self.arm(*deadline);
        }
    }
}
