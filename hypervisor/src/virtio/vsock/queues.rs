//! Packets between the muxer and a pair of virtqueues.

use super::Muxer;
use super::packet::{HEADER_BYTES, Header};
use crate::virtio::Memory;
use crate::virtio::queue::{self, MAX_CHAINS_PER_EVENT, QueueError};
use virtio_queue::{Queue, QueueT};

/// What a pass over a queue did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Buffers were given back: the driver may have to be interrupted.
    pub used: bool,
    /// There is more to do, after others had their turn.
    pub more: bool,
}

/// What a pass over both queues did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Exchange {
    pub rx: Progress,
    pub tx: Progress,
}

/// Takes packets of the guest and gives it those for it, a bounded number each.
pub fn exchange(
    muxer: &mut Muxer,
    rx: &mut Queue,
    tx: &mut Queue,
    memory: &Memory,
) -> Result<Exchange, QueueError> {
    let mut done = Exchange {
        tx: transmit(muxer, tx, memory)?,
        ..Exchange::default()
    };
    let paused = !muxer.accepts_packets();
    done.rx = receive(muxer, rx, memory)?;
    done.tx.more |= paused && muxer.accepts_packets();
    Ok(done)
}

/// Takes packets of the guest from the tx queue. Stops, without asking for a kick, while the muxer has too many answers
/// waiting for a buffer of the guest.
fn transmit(muxer: &mut Muxer, queue: &mut Queue, memory: &Memory) -> Result<Progress, QueueError> {
    let mut progress = Progress::default();
    for _ in 0..MAX_CHAINS_PER_EVENT {
        if !muxer.accepts_packets() {
            return Ok(progress);
        }
        let Some(chain) = queue::pop(queue, memory)? else {
            if queue::rearm(queue, memory)? {
                continue;
            }
            return Ok(progress);
        };
        let mut bytes = [0; HEADER_BYTES];
        chain.read(memory, 0, &mut bytes)?;
        let header = Header::from_bytes(&bytes);
        muxer.take_packet(
            &header,
            &chain.readable_slices(memory, HEADER_BYTES, header.len as usize),
        );
        queue::push(queue, memory, chain.head, 0)?;
        progress.used = true;
    }
    progress.more = true;
    Ok(progress)
}

/// Puts packets for the guest into the buffers of the rx queue.
fn receive(muxer: &mut Muxer, queue: &mut Queue, memory: &Memory) -> Result<Progress, QueueError> {
    let mut progress = Progress::default();
    for _ in 0..MAX_CHAINS_PER_EVENT {
        if !muxer.has_packets() {
            return Ok(progress);
        }
        let Some(chain) = queue::pop(queue, memory)? else {
            if queue::rearm(queue, memory)? {
                continue;
            }
            return Ok(progress);
        };
        let have = chain.writable_len();
        let want = HEADER_BYTES + 1;
        if have < want {
            return Err(QueueError::Short {
                head: chain.head,
                have,
                want,
            });
        }
        let Some(header) =
            muxer.next_packet(&chain.writable_slices(memory, HEADER_BYTES, have - HEADER_BYTES))
        else {
            // What looked like a packet was none: the buffer is for the next one.
            queue.set_next_avail(queue.next_avail().wrapping_sub(1));
            return Ok(progress);
        };
        chain.write(memory, 0, &header.to_bytes())?;
        let length = u32::try_from(HEADER_BYTES).expect("44") + header.len;
        queue::push(queue, memory, chain.head, length)?;
        progress.used = true;
    }
    progress.more = true;
    Ok(progress)
}
