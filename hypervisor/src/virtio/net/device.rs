//! The network interface as the guest sees it.

use super::tap::Tap;
use super::used::Used;
use super::{
    HEADER, MAX_FRAME, MAX_FRAMES_PER_EVENT, MIN_FRAME, NUM_BUFFERS, NetError, QUEUE_SIZE, RX, TX,
    offload,
};
use crate::virtio::device::{copy_config, with_active};
use crate::virtio::queue::{self, Chain, MAX_CHAINS_PER_EVENT};
use crate::virtio::{Activation, DeviceError, VirtioDevice};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::QueueT;
use vmm_sys_util::epoll::EventSet;

/// Bytes of `struct virtio_net_config` up to `status`.
const CONFIG: usize = 8;

/// A network slot.
#[derive(Debug)]
pub struct Net {
    mac: [u8; 6],
    /// Kept after it failed, because the event loop still watches it; the next one takes its place.
    tap: Option<Tap>,
    /// There is a tap and it works.
    up: bool,
    offloads: u64,
    active: Option<Activation>,
    rx: Receive,
    /// The tap took no more, and says when it does.
    tx_blocked: bool,
    counters: Counters,
}

/// The receive direction between two events.
struct Receive {
    /// The frame at hand.
    frame: Box<[u8]>,
    /// Its length; 0 for none.
    length: usize,
    /// Chains taken for it so far: those of a frame must all be at hand before it is delivered.
    chains: Vec<Chain>,
    used: Used,
}

impl fmt::Debug for Receive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receive")
            .field("length", &self.length)
            .field("chains", &self.chains.len())
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Counters {
    rx_frames: u64,
    rx_bytes: u64,
    tx_frames: u64,
    tx_bytes: u64,
    /// Both directions: no tap, no room, or refused by the tap.
    dropped: u64,
}

/// What became of a received frame.
#[derive(Debug, PartialEq, Eq)]
enum Delivery {
    Done,
    /// The guest must offer more chains first.
    NoRoom,
}

impl Net {
    /// A slot with its tap, or an empty one.
    pub fn new(mac: [u8; 6], tap: Option<OwnedFd>) -> Result<Self, NetError> {
        let tap = tap.map(Tap::new).transpose()?;
        let mut offloads = offload::COMMON;
        if let Some(tap) = &tap {
            if tap
                .set_offloads(offload::tap_flags(offload::COMMON | offload::USO))
                .is_ok()
            {
                offloads |= offload::USO;
            }
            tap.set_offloads(0)?;
        }
        let rx = Receive {
            frame: vec![0; MAX_FRAME].into_boxed_slice(),
            length: 0,
            chains: Vec::new(),
            used: Used::default(),
        };
        Ok(Self {
            mac,
            up: tap.is_some(),
            tap,
            offloads,
            active: None,
            rx,
            tx_blocked: false,
            counters: Counters::default(),
        })
    }

    /// The guest sees the link come up.
    pub fn attach_tap(&mut self, tap: OwnedFd) -> Result<(), NetError> {
        let tap = Tap::new(tap)?;
        tap.set_offloads(
            self.active
                .as_ref()
                .map_or(0, |active| offload::tap_flags(active.features)),
        )?;
        self.link(Some(tap));
        Ok(())
    }

    /// The guest sees the link go down.
    pub fn detach_tap(&mut self) {
        self.link(None);
    }

    fn link(&mut self, tap: Option<Tap>) {
        self.up = tap.is_some();
        self.tap = tap;
        self.rx.length = 0;
        self.tx_blocked = false;
        if let Some(active) = &self.active {
            active.interrupt.signal_config();
        }
    }

    /// Moves frames from the tap to the guest until either has no more, or the turn is over.
    fn receive(&mut self, active: &mut Activation) -> Result<(), DeviceError> {
        for _ in 0..MAX_FRAMES_PER_EVENT {
            if self.rx.length == 0 && !self.read_frame(active) {
                return self.interrupt_rx(active);
            }
            if self.deliver(active)? == Delivery::NoRoom {
                // True: chains came between the last look and asking for a kick.
                if !queue::rearm(&mut active.queues[RX], &active.memory)? {
                    return self.interrupt_rx(active);
                }
            }
        }
        // More may wait. Come back after the other devices had their turn.
        active.notify[RX].write(1).map_err(DeviceError::fatal)?;
        self.interrupt_rx(active)
    }

    /// Takes the next frame from the tap. False: there is none.
    fn read_frame(&mut self, active: &Activation) -> bool {
        let Some(tap) = self.tap.as_ref().filter(|_| self.up) else {
            return false;
        };
        loop {
            match tap.receive(&mut self.rx.frame) {
                Ok(length) if length >= HEADER => {
                    self.rx.length = length;
                    return true;
                }
                Ok(_) => self.counters.dropped += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The tap was deleted, for example with its network namespace.
                Err(_) => {
                    self.up = false;
                    active.interrupt.signal_config();
                    return false;
                }
            }
        }
    }

    /// Copies the frame at hand into chains of the guest.
    fn deliver(&mut self, active: &mut Activation) -> Result<Delivery, DeviceError> {
        let merge = active.negotiated(VIRTIO_NET_F_MRG_RXBUF);
        let (rx, queue) = (&mut self.rx, &mut active.queues[RX]);
        let most = if merge { usize::from(queue.size()) } else { 1 };
        while room(&rx.chains) < rx.length {
            if rx.chains.len() >= most {
                // It can't fit whatever the guest does. The chains serve the next frame.
                rx.length = 0;
                self.counters.dropped += 1;
                return Ok(Delivery::Done);
            }
            let Some(chain) = queue::pop(queue, &active.memory)? else {
                return Ok(Delivery::NoRoom);
            };
            let (head, have) = (chain.head, chain.writable_len());
            if have < HEADER {
                return Err(DeviceError::hostile(NetError::SmallBuffer { head, have }));
            }
            rx.chains.push(chain);
        }
        let mut rest = &mut rx.frame[..rx.length];
        let count = chains_for(&rx.chains, rest.len());
        rest[NUM_BUFFERS].copy_from_slice(&(count as u16).to_le_bytes());
        let mut used = Vec::with_capacity(count);
        for chain in rx.chains.drain(..count) {
            let (part, tail) = rest.split_at_mut(chain.writable_len().min(rest.len()));
            chain.write(&active.memory, 0, part)?;
            used.push((chain.head, part.len() as u32));
            rest = tail;
        }
        Used::push(queue, &active.memory, &used)?;
        self.counters.rx_frames += 1;
        self.counters.rx_bytes += (rx.length - HEADER) as u64;
        rx.length = 0;
        Ok(Delivery::Done)
    }

    fn interrupt_rx(&mut self, active: &Activation) -> Result<(), DeviceError> {
        if self
            .rx
            .used
            .wants_interrupt(&active.queues[RX], &active.memory)?
        {
            active.interrupt.signal_queue();
        }
        Ok(())
    }

    /// Moves frames from the guest to the tap until either wants no more, or the turn is over.
    fn transmit(&mut self, active: &mut Activation) -> Result<(), DeviceError> {
        let mut any = false;
        for _ in 0..MAX_CHAINS_PER_EVENT {
            let next = active.queues[TX].next_avail();
            let Some(chain) = queue::pop(&mut active.queues[TX], &active.memory)? else {
                if queue::rearm(&mut active.queues[TX], &active.memory)? {
                    continue;
                }
                return interrupt_tx(active, any);
            };
            if !self.send(&chain, active) {
                // The tap is full. It becomes writable again, and this chain is then the first.
                active.queues[TX].set_next_avail(next);
                self.tx_blocked = true;
                return interrupt_tx(active, any);
            }
            queue::push(&mut active.queues[TX], &active.memory, chain.head, 0)?;
            any = true;
        }
        // More may wait. Come back after the other devices had their turn.
        active.notify[TX].write(1).map_err(DeviceError::fatal)?;
        interrupt_tx(active, any)
    }

    /// Sends one frame. False: try later. A frame that can't be sent is dropped, as a wire does.
    fn send(&mut self, chain: &Chain, active: &Activation) -> bool {
        let length = chain.readable_len();
        let sent = match &self.tap {
            Some(tap) if (MIN_FRAME..=MAX_FRAME).contains(&length) => {
                tap.send(&chain.readable_slices(&active.memory, 0, length))
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        };
        match sent {
            Ok(()) => {
                self.counters.tx_frames += 1;
                self.counters.tx_bytes += (length - HEADER) as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(_) => self.counters.dropped += 1,
        }
        true
    }
}

fn interrupt_tx(active: &mut Activation, wanted: bool) -> Result<(), DeviceError> {
    if wanted {
        queue::notify(&mut active.queues[TX], &active.memory, &active.interrupt)?;
    }
    Ok(())
}

/// Bytes that fit into the chains.
fn room(chains: &[Chain]) -> usize {
    chains.iter().map(Chain::writable_len).sum()
}

/// How many of the chains a frame of this length needs. They have room for it.
fn chains_for(chains: &[Chain], length: usize) -> usize {
    let mut room = 0;
    let fits = |chain: &Chain| {
        room += chain.writable_len();
        room >= length
    };
    chains
        .iter()
        .position(fits)
        .map_or(chains.len(), |last| last + 1)
}

impl VirtioDevice for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.offloads
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.up {
            VIRTIO_NET_S_LINK_UP as u8
        } else {
            0
        };
        let [a, b, c, d, e, f] = self.mac;
        let config: [u8; CONFIG] = [a, b, c, d, e, f, status, 0];
        copy_config(&config, offset, data);
    }

    fn activate(&mut self, active: Activation) -> Result<(), DeviceError> {
        if let Some(tap) = self.tap.as_ref().filter(|_| self.up) {
            tap.set_offloads(offload::tap_flags(active.features))
                .map_err(DeviceError::fatal)?;
        }
        self.active = Some(active);
        Ok(())
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        let work = if queue == RX {
            Self::receive
        } else {
            Self::transmit
        };
        with_active(self, |net| &mut net.active, work)
    }

    fn sources(&self) -> Vec<(RawFd, EventSet, u16)> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        self.tap
            .iter()
            .map(|tap| (tap.as_raw_fd(), events, 0))
            .collect()
    }

    fn source_event(&mut self, _token: u16, set: EventSet) -> Result<(), DeviceError> {
        with_active(
            self,
            |net| &mut net.active,
            |net, active| {
                if net.tx_blocked && set.contains(EventSet::OUT) {
                    net.tx_blocked = false;
                    net.transmit(active)?;
                }
                net.receive(active)
            },
        )
    }

    fn reset(&mut self) {
        self.active = None;
        self.tx_blocked = false;
        self.rx.length = 0;
        self.rx.chains.clear();
        self.rx.used = Used::default();
        self.up = self.up
            && self
                .tap
                .as_ref()
                .is_some_and(|tap| tap.set_offloads(0).is_ok());
    }

    fn set_backend(&mut self, backend: Option<OwnedFd>) -> Result<(), DeviceError> {
        match backend {
            Some(tap) => self.attach_tap(tap).map_err(DeviceError::fatal),
            None => {
                self.detach_tap();
                Ok(())
            }
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.counters;
        vec![
            ("rx_frames", c.rx_frames),
            ("rx_bytes", c.rx_bytes),
            ("tx_frames", c.tx_frames),
            ("tx_bytes", c.tx_bytes),
            ("dropped", c.dropped),
        ]
    }
}
