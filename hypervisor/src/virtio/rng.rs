//! Entropy device (virtio 1.2, section 5.4): fills every buffer from the host's getrandom(2).

use super::queue::{self, MAX_CHAINS_PER_EVENT};
use super::{Activation, DeviceError, VirtioDevice};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

/// Most bytes one request gets; Linux asks for 64 at a time. The driver may ask for 4 GiB and gets this.
const MAX_BYTES: usize = 4096;
const QUEUE_SIZES: [u16; 1] = [64];

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    active: Option<Activation>,
    bytes: u64,
}

impl VirtioDevice for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
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

    fn queue_event(&mut self, _queue: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let ring = &mut active.queues[0];
        if !virtio_queue::QueueT::ready(ring) {
            return Ok(());
        }
        for taken in 0.. {
            if taken == MAX_CHAINS_PER_EVENT {
                // Full means pending, which is what it should be.
                let _ = active.notify[0].write(1);
                break;
            }
            let Some(chain) = queue::pop(ring, &active.memory)? else {
                if queue::rearm(ring, &active.memory)? {
                    continue;
                }
                break;
            };
            let mut random = [0; MAX_BYTES];
            let length = chain.writable_len().min(MAX_BYTES);
            fill(&mut random[..length]).map_err(DeviceError::fatal)?;
            chain.write(&active.memory, 0, &random[..length])?;
            queue::push(ring, &active.memory, chain.head, length as u32)?;
            self.bytes += length as u64;
        }
        queue::notify(ring, &active.memory, &active.interrupt)?;
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("bytes", self.bytes)]
    }
}

#[allow(unsafe_code)]
fn fill(mut buffer: &mut [u8]) -> std::io::Result<()> {
    while !buffer.is_empty() {
        // SAFETY: the kernel writes at most `len` bytes to a buffer of that length.
        let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => buffer = &mut buffer[got..],
            Err(_) => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::fake_driver::{Buf, FakeDriver};

    #[test]
    fn every_writable_buffer_is_filled() {
        let mut driver = FakeDriver::new(Rng::default());
        driver.offer(0, &[Buf::Write(0x8000, 300), Buf::Write(0x9000, 212)]);
        driver.kick(0).unwrap();
        assert_eq!(driver.used(0), [(0, 512)]);
        assert!(driver.bytes(0x9000, 212).iter().any(|byte| *byte != 0));
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn a_huge_request_gets_a_page_and_a_readable_one_nothing() {
        let mut driver = FakeDriver::new(Rng::default());
        driver.offer(0, &[Buf::Write(0x8000, 0x10_0000)]);
        driver.offer(0, &[Buf::Read(0x8000, 64)]);
        driver.kick(0).unwrap();
        assert_eq!(driver.used(0), [(0, MAX_BYTES as u32), (1, 0)]);
    }

    #[test]
    fn a_chain_that_is_broken_stops_the_device() {
        let mut driver = FakeDriver::new(Rng::default());
        driver.offer(0, &[Buf::Write(u64::MAX - 8, 64)]);
        assert!(matches!(driver.kick(0), Err(DeviceError::Hostile(_))));
        assert_eq!(driver.used(0), []);
    }
}
