//! Which blocks are plugged. Knows the rules of section 5.15.6, and nothing of queues or of the host's memory.

use super::BLOCK;
use std::ops::Range;
use vm_memory::GuestAddress;

/// What the driver asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Span),
    Unplug(Span),
    UnplugAll,
    State(Span),
    /// A type that this version of virtio does not have.
    Unknown(u16),
}

/// Blocks as the driver names them: anything at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) address: u64,
    pub(super) blocks: u16,
}

/// What it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Ack,
    /// More than the host wants plugged.
    Nack,
    /// Blocks that are not there, or that are not in the state that the request is for.
    Error,
    Is(State),
}

/// The state of a range of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

impl Request {
    /// Bytes of a request.
    pub(super) const SIZE: usize = 24;

    pub(super) fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        let [
            t0,
            t1,
            _,
            _,
            _,
            _,
            _,
            _,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            n0,
            n1,
            ..,
        ] = *bytes;
        let span = Span {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            blocks: u16::from_le_bytes([n0, n1]),
        };
        match u16::from_le_bytes([t0, t1]) {
            0 => Self::Plug(span),
            1 => Self::Unplug(span),
            2 => Self::UnplugAll,
            3 => Self::State(span),
            other => Self::Unknown(other),
        }
    }
}

impl Answer {
    /// Bytes of an answer.
    pub(super) const SIZE: usize = 10;

    pub(super) fn bytes(self) -> [u8; Self::SIZE] {
        let (kind, state) = match self {
            Self::Ack | Self::Is(State::Plugged) => (0, 0),
            Self::Is(State::Unplugged) => (0, 1),
            Self::Is(State::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

/// The blocks of the device. Sizes are in blocks.
#[derive(Debug)]
pub(super) struct Blocks {
    start: GuestAddress,
    plugged: Vec<bool>,
    /// How many of them are.
    count: usize,
    /// How many the host wants to be.
    requested: usize,
    /// The driver may use those before this one. Never falls: blocks beyond a smaller request may still be plugged.
    usable: usize,
}

impl Blocks {
    /// `count` unplugged blocks at `start`.
    pub(super) fn new(start: GuestAddress, count: usize) -> Self {
        Self {
            start,
            plugged: vec![false; count],
            count: 0,
            requested: 0,
            usable: 0,
        }
    }

    /// Asks for `requested` plugged blocks, among the first `usable`.
    pub(super) fn request(&mut self, requested: usize, usable: usize) {
        self.usable = usable.min(self.plugged.len()).max(self.usable);
        self.requested = requested.min(self.usable);
    }

    /// Bytes that are plugged.
    pub(super) fn plugged(&self) -> u64 {
        bytes(self.count)
    }

    /// Bytes that the host wants to be plugged.
    pub(super) fn requested(&self) -> u64 {
        bytes(self.requested)
    }

    /// `struct virtio_mem_config`.
    pub(super) fn config(&self) -> [u8; 56] {
        let words = [
            BLOCK,
            // Node, which the guest reads only where ACPI is offered.
            0,
            self.start.0,
            bytes(self.plugged.len()),
            bytes(self.usable),
            self.plugged(),
            self.requested(),
        ];
        let mut config = [0; 56];
        for (field, word) in config.chunks_exact_mut(8).zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        config
    }

    /// Carries a request out. Gives the answer, and the memory that nobody needs from now on.
    pub(super) fn serve(&mut self, request: Request) -> (Answer, Option<(GuestAddress, u64)>) {
        match request {
            Request::Plug(span) => (self.plug(span), None),
            Request::Unplug(span) => match self.range(span) {
                Some(range) if self.state(range.clone()) == State::Plugged => {
                    (Answer::Ack, Some(self.unplug(range)))
                }
                _ => (Answer::Error, None),
            },
            Request::UnplugAll => (Answer::Ack, Some(self.unplug(0..self.usable))),
            Request::State(span) => {
                let state = self.range(span).map(|range| self.state(range));
                (state.map_or(Answer::Error, Answer::Is), None)
            }
            Request::Unknown(_) => (Answer::Error, None),
        }
    }

    fn plug(&mut self, span: Span) -> Answer {
        let Some(range) = self.range(span) else {
            return Answer::Error;
        };
        if self.state(range.clone()) != State::Unplugged {
            return Answer::Error;
        }
        if self.count + range.len() > self.requested {
            return Answer::Nack;
        }
        self.count += range.len();
        self.plugged[range].fill(true);
        Answer::Ack
    }

    fn unplug(&mut self, range: Range<usize>) -> (GuestAddress, u64) {
        let memory = (
            GuestAddress(self.start.0 + bytes(range.start)),
            bytes(range.len()),
        );
        let blocks = &mut self.plugged[range];
        self.count -= blocks.iter().filter(|plugged| **plugged).count();
        blocks.fill(false);
        memory
    }

    /// The blocks of a span, if it has any and all may be used.
    fn range(&self, span: Span) -> Option<Range<usize>> {
        let offset = span.address.checked_sub(self.start.0)?;
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(span.blocks.into())?;
        let fits = offset % BLOCK == 0 && first < end && end <= self.usable;
        fits.then_some(first..end)
    }

    fn state(&self, range: Range<usize>) -> State {
        let blocks = &self.plugged[range];
        if blocks.iter().all(|plugged| *plugged) {
            State::Plugged
        } else if blocks.contains(&true) {
            State::Mixed
        } else {
            State::Unplugged
        }
    }
}

fn bytes(blocks: usize) -> u64 {
    blocks as u64 * BLOCK
}
