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

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn activate(&mut self, active: Activation) -> Result<(), DeviceError> {
        self.active = Some(active);
        Ok(())
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        queue::serve(active, queue, MAX_CHAINS_PER_EVENT, |chain, memory| {
            let mut random = [0; MAX_BYTES];
            let length = chain.writable_len().min(MAX_BYTES);
            fill(&mut random[..length]).map_err(DeviceError::fatal)?;
            chain.write(memory, 0, &random[..length])?;
            self.bytes += length as u64;
            Ok(Some(length as u32))
        })
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
    use crate::virtio::driver::Part::In;
    use crate::virtio::driver::{Driver, RAM, WRITE, attack};

    fn rng() -> (Rng, Driver) {
        let mut rng = Rng::default();
        let mut driver = Driver::new(&rng);
        driver.activate(&mut rng, 0).unwrap();
        (rng, driver)
    }

    #[test]
    fn every_writable_buffer_is_filled() {
        let (mut rng, mut driver) = rng();
        let (head, at) = driver.chain(0, &[In(300), In(212)]);
        rng.queue_event(0).unwrap();
        assert_eq!(driver.used(0), [(head, 512)]);
        assert!(driver.read(at[1], 212).iter().any(|byte| *byte != 0xee));
        assert_eq!(driver.interrupt.status(), 1);
    }

    #[test]
    fn a_huge_request_gets_a_page_and_a_readable_one_nothing() {
        let (mut rng, mut driver) = rng();
        driver.descriptor(0, 0, (0x10_0000, RAM as u32 - 0x10_0000), WRITE, 0);
        driver.offer(0, 0);
        driver.descriptor(0, 1, (0x10_0000, 64), 0, 0);
        driver.offer(0, 1);
        rng.queue_event(0).unwrap();
        assert_eq!(driver.used(0), [(0, MAX_BYTES as u32), (1, 0)]);
    }

    #[test]
    fn a_broken_ring_stops_the_device() {
        attack(0, 0, Rng::default);
    }
}
