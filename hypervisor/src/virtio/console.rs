//! Console device (virtio 1.2, section 5.3), one port: what the guest writes goes to the console ring, and nothing
//! ever comes in.

use super::queue::{self, MAX_CHAINS_PER_EVENT};
use super::{Activation, DeviceError, VirtioDevice};
use crate::bus::SharedRing;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

/// Queue 0 would carry input; queue 1 is output.
const OUTPUT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];
/// Bytes taken of one buffer chain. Linux sends a page at most; a chain that says 4 GiB must not hold up the loop.
const MAX_BYTES: usize = 16 << 10;

/// The device.
#[derive(Debug)]
pub struct Console {
    ring: SharedRing,
    active: Option<Activation>,
    bytes: u64,
    dropped: u64,
}

impl Console {
    pub fn new(ring: SharedRing) -> Self {
        Self {
            ring,
            active: None,
            bytes: 0,
            dropped: 0,
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, active: Activation) -> Result<(), DeviceError> {
        self.active = Some(active);
        Ok(())
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let ring = &mut active.queues[OUTPUT];
        if queue != OUTPUT || !virtio_queue::QueueT::ready(ring) {
            return Ok(());
        }
        for taken in 0.. {
            if taken == MAX_CHAINS_PER_EVENT {
                // Full means pending, which is what it should be.
                let _ = active.notify[OUTPUT].write(1);
                break;
            }
            let Some(chain) = queue::pop(ring, &active.memory)? else {
                if queue::rearm(ring, &active.memory)? {
                    continue;
                }
                break;
            };
            let length = chain.readable_len();
            let mut text = vec![0; length.min(MAX_BYTES)];
            chain.read(&active.memory, 0, &mut text)?;
            self.ring.push(&text);
            self.bytes += text.len() as u64;
            self.dropped += (length - text.len()) as u64;
            queue::push(ring, &active.memory, chain.head, 0)?;
        }
        queue::notify(ring, &active.memory, &active.interrupt)?;
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("bytes", self.bytes), ("dropped", self.dropped)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::ConsoleRing;
    use crate::virtio::fake_driver::{Buf, FakeDriver};
    use coffer_proto::limits::CONSOLE_RING_BYTES;
    use coffer_proto::vmm::console::{FILE_BYTES, read};
    use std::sync::{Arc, Mutex};

    fn console() -> (std::fs::File, Console) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(FILE_BYTES as u64).unwrap();
        let ring = ConsoleRing::new(file.try_clone().unwrap()).unwrap();
        (file, Console::new(SharedRing(Arc::new(Mutex::new(ring)))))
    }

    #[test]
    fn output_of_several_buffers_is_one_text() {
        let (file, console) = console();
        let mut driver = FakeDriver::new(console);
        driver.fill(0x8000, b"hello ");
        driver.fill(0x9000, b"world\n");
        driver.offer(OUTPUT, &[Buf::Read(0x8000, 6), Buf::Read(0x9000, 6)]);
        driver.kick(OUTPUT).unwrap();
        assert_eq!(read(&file).unwrap(), b"hello world\n");
        assert_eq!(driver.used(OUTPUT), [(0, 0)]);
    }

    #[test]
    fn a_flood_stays_in_the_ring_and_input_buffers_are_left_alone() {
        let (file, console) = console();
        let mut driver = FakeDriver::new(console);
        driver.offer(0, &[Buf::Write(0x8000, 4096)]);
        driver.kick(0).unwrap();
        assert_eq!(driver.used(0), []);
        for _ in 0..64 {
            driver.offer(OUTPUT, &[Buf::Read(0x1_0000, 0x10_0000)]);
            driver.kick(OUTPUT).unwrap();
        }
        assert_eq!(read(&file).unwrap().len(), CONSOLE_RING_BYTES);
        let counters = driver.counters();
        assert_eq!(
            counters,
            [
                ("bytes", 64 * MAX_BYTES as u64),
                ("dropped", 64 * (0x10_0000 - MAX_BYTES as u64))
            ]
        );
    }
}
