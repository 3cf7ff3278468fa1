//! The device as the guest sees it, and the host's hand on it.

use super::blocks::{Answer, Blocks, Request};
use super::{BLOCK, MAX_REQUESTS_PER_EVENT, QUEUE_SIZE};
use crate::memory::{DiscardError, discard};
use crate::virtio::device::{copy_config, with_active};
use crate::virtio::queue::{self, Chain, QueueError};
use crate::virtio::{Activation, DeviceError, Interrupt, Memory, VirtioDevice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use vm_memory::GuestAddress;

/// The guest must not touch memory that is not plugged, not even to read it.
const F_UNPLUGGED_INACCESSIBLE: u32 = 1;

/// What device and host share.
#[derive(Debug)]
struct State {
    blocks: Blocks,
    /// Of the active device.
    interrupt: Option<Interrupt>,
    /// A request of the host that the guest has not fulfilled yet.
    pending: bool,
}

/// The host's side: how much is to be plugged, and how much is.
#[derive(Debug, Clone)]
pub struct Target(Arc<Mutex<State>>);

impl Target {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the guest to have `requested` bytes plugged, in the first `usable` bytes of the range. Whole blocks count.
    pub fn set(&self, requested: u64, usable: u64) {
        let mut state = self.lock();
        let blocks = |bytes: u64| usize::try_from(bytes / BLOCK).unwrap_or(usize::MAX);
        state.blocks.request(blocks(requested), blocks(usable));
        state.pending = true;
        if let Some(interrupt) = &state.interrupt {
            interrupt.signal_config();
        }
    }

    /// The bytes that are plugged, once for each call of [`Target::set`], when they are at least what was asked for.
    pub fn reached(&self) -> Option<u64> {
        let mut state = self.lock();
        let plugged = state.blocks.plugged();
        let reached = state.pending && plugged >= state.blocks.requested();
        if reached {
            state.pending = false;
        }
        reached.then_some(plugged)
    }
}

/// A virtio-mem device.
#[derive(Debug)]
pub struct Mem {
    target: Target,
    active: Option<Activation>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    unplugged_bytes: u64,
    /// Requests answered with NACK or ERROR.
    refused: u64,
    /// Ranges the host could not drop. The guest does not mind.
    failed: u64,
}

impl Mem {
    /// A device for `size` bytes at `start`, both multiples of [`BLOCK`], in guest memory as the transport hands it over.
    pub fn new(start: GuestAddress, size: u64) -> Self {
        debug_assert!(start.0.is_multiple_of(BLOCK) && size.is_multiple_of(BLOCK));
        let state = State {
            blocks: Blocks::new(start, (size / BLOCK) as usize),
            interrupt: None,
            pending: false,
        };
        Self {
            target: Target(Arc::new(Mutex::new(state))),
            active: None,
            counters: Counters::default(),
        }
    }

    pub fn target(&self) -> Target {
        self.target.clone()
    }

    fn requests(&mut self, active: &mut Activation) -> Result<(), DeviceError> {
        queue::serve(active, 0, MAX_REQUESTS_PER_EVENT, |chain, memory| {
            let answer = self.request(&chain, memory)?;
            chain.write(memory, 0, &answer.bytes())?;
            Ok(Some(Answer::SIZE as u32))
        })
    }

    fn request(&mut self, chain: &Chain, memory: &Memory) -> Result<Answer, DeviceError> {
        let mut bytes = [0; Request::SIZE];
        chain.read(memory, 0, &mut bytes)?;
        if chain.writable_len() < Answer::SIZE {
            let short = QueueError::Short {
                head: chain.head,
                have: chain.writable_len(),
                want: Answer::SIZE,
            };
            return Err(short.into());
        }
        let (answer, unneeded) = self.target.lock().blocks.serve(Request::parse(&bytes));
        if let Some((address, length)) = unneeded {
            self.drop_memory(memory, address, length)?;
        }
        self.counters.refused += u64::from(matches!(answer, Answer::Nack | Answer::Error));
        Ok(answer)
    }

    fn drop_memory(
        &mut self,
        memory: &Memory,
        address: GuestAddress,
        length: u64,
    ) -> Result<(), DeviceError> {
        match discard(memory, address, length as usize) {
            Ok(()) => self.counters.unplugged_bytes += length,
            // The pages stay with the host's process; to the guest they are gone.
            Err(DiscardError::Host { .. }) => self.counters.failed += 1,
            Err(error @ DiscardError::OutsideRam { .. }) => return Err(DeviceError::fatal(error)),
        }
        Ok(())
    }
}

impl VirtioDevice for Mem {
    fn kind(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        1 << F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.target.lock().blocks.config(), offset, data);
    }

    fn activate(&mut self, active: Activation) -> Result<(), DeviceError> {
        self.target.lock().interrupt = Some(active.interrupt.clone());
        self.active = Some(active);
        Ok(())
    }

    fn queue_event(&mut self, _queue: usize) -> Result<(), DeviceError> {
        with_active(self, |mem| &mut mem.active, Self::requests)
    }

    /// Blocks stay as they are: a driver that comes back finds in `plugged_size` what it has (section 5.15.5).
    fn reset(&mut self) {
        self.active = None;
        self.target.lock().interrupt = None;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let state = self.target.lock();
        vec![
            ("plugged_bytes", state.blocks.plugged()),
            ("requested_bytes", state.blocks.requested()),
            ("unplugged_bytes", self.counters.unplugged_bytes),
            ("refused", self.counters.refused),
            ("failed", self.counters.failed),
        ]
    }
}
