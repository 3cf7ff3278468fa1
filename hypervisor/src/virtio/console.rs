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

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn activate(&mut self, active: Activation) -> Result<(), DeviceError> {
        self.active = Some(active);
        Ok(())
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut().filter(|_| queue == OUTPUT) else {
            return Ok(());
        };
        queue::serve(active, OUTPUT, MAX_CHAINS_PER_EVENT, |chain, memory| {
            let length = chain.readable_len();
            let mut text = vec![0; length.min(MAX_BYTES)];
            chain.read(memory, 0, &mut text)?;
            self.ring.push(&text);
            self.bytes += text.len() as u64;
            self.dropped += (length - text.len()) as u64;
            Ok(Some(0))
        })
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
    use crate::virtio::driver::Part::{In, Out};
    use crate::virtio::driver::{Driver, attack};
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
        let (file, mut console) = console();
        let mut driver = Driver::new(&console);
        driver.activate(&mut console, 0).unwrap();
        driver.chain(OUTPUT, &[Out(b"hello "), Out(b"world\n")]);
        console.queue_event(OUTPUT).unwrap();
        assert_eq!(read(&file).unwrap(), b"hello world\n");
        assert_eq!(driver.used(OUTPUT), [(0, 0)]);
    }

    #[test]
    fn a_flood_stays_in_the_ring_and_input_buffers_are_left_alone() {
        const FLOOD: u32 = 0x10_0000;
        let (file, mut console) = console();
        let mut driver = Driver::new(&console);
        driver.activate(&mut console, 0).unwrap();
        driver.chain(0, &[In(4096)]);
        console.queue_event(0).unwrap();
        assert_eq!(driver.used(0), []);
        driver.descriptor(OUTPUT, 0, (0x10_0000, FLOOD), 0, 0);
        for _ in 0..64 {
            driver.offer(OUTPUT, 0);
            console.queue_event(OUTPUT).unwrap();
        }
        assert_eq!(read(&file).unwrap().len(), CONSOLE_RING_BYTES);
        assert_eq!(
            console.counters(),
            [
                ("bytes", 64 * MAX_BYTES as u64),
                ("dropped", 64 * (u64::from(FLOOD) - MAX_BYTES as u64))
            ]
        );
    }

    #[test]
    fn a_broken_ring_stops_the_device() {
        attack(OUTPUT, 0, || console().1);
    }
}
