//! The device of coffer-vmm.

use super::{Muxer, QUEUES, RX_QUEUE, TX_QUEUE, queues};
use crate::virtio::queue;
use crate::virtio::{Activation, DeviceError, VirtioDevice};
use std::os::fd::RawFd;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::QueueT;
use vmm_sys_util::epoll::EventSet;

/// Entries of each queue. Linux posts a 4 KiB buffer for each rx entry: 1 MiB of the guest's memory.
pub const QUEUE_SIZE: u16 = 256;

/// A virtio-vsock device (type 19).
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    active: Option<Activation>,
}

impl Vsock {
    pub fn new(guest_cid: u64, muxer: Muxer) -> Self {
        Self {
            guest_cid,
            muxer,
            active: None,
        }
    }

    /// Moves packets both ways. Answers to the guest's packets are given in the same pass.
    fn exchange(&mut self) -> Result<(), DeviceError> {
        let Some(Activation {
            memory,
            queues,
            notify,
            interrupt,
            ..
        }) = &mut self.active
        else {
            return Ok(());
        };
        let [rx, tx, ..] = &mut queues[..] else {
            return Ok(());
        };
        if !rx.ready() || !tx.ready() {
            return Ok(());
        }
        let done = queues::exchange(&mut self.muxer, rx, tx, memory)?;
        for (index, queue, progress) in [(RX_QUEUE, rx, done.rx), (TX_QUEUE, tx, done.tx)] {
            if progress.used {
                queue::notify(queue, memory, interrupt)?;
            }
            if progress.more {
                // A full counter (EAGAIN) means that the kick is pending already.
                let _ = notify[index].write(1);
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    /// `guest_cid`, a little-endian u64 (virtio 1.2, 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
            .unwrap_or_default();
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
    }

    fn activate(&mut self, active: Activation) -> Result<(), DeviceError> {
        self.active = Some(active);
        self.exchange()
    }

    fn queue_event(&mut self, _queue: usize) -> Result<(), DeviceError> {
        self.exchange()
    }

    fn sources(&self) -> Vec<(RawFd, EventSet, u16)> {
        vec![(self.muxer.fd(), EventSet::IN, 0)]
    }

    fn source_event(&mut self, _token: u16, _set: EventSet) -> Result<(), DeviceError> {
        self.muxer.poll().map_err(DeviceError::fatal)?;
        self.exchange()
    }

    fn reset(&mut self) {
        self.active = None;
        self.muxer.reset();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.muxer.counters().named().into()
    }
}
