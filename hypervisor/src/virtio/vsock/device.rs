//! The device of coffer-vmm.

use super::{Muxer, QUEUES, RX_QUEUE, TX_QUEUE, queues};
use crate::virtio::device::copy_config;
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

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    /// `guest_cid`, a little-endian u64 (virtio 1.2, 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.guest_cid.to_le_bytes(), offset, data);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::Part::{In, Out};
    use crate::virtio::driver::{Driver, attack};
    use crate::virtio::vsock::packet::{HEADER_BYTES, TYPE_STREAM};
    use crate::virtio::vsock::{HOST_CID, Header, Op};
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    const CID: u64 = 3;
    const HOME: u32 = 17;

    /// A device, and the host's end of the connection that the guest may make.
    fn device() -> (Vsock, UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let (home, ours) = UnixStream::pair().unwrap();
        let mut client = UnixStream::connect(directory.path().join("vsock")).unwrap();
        client.write_all(b"CONNECT 5\n").unwrap();
        (
            Vsock::new(CID, Muxer::new(CID, listener, [(HOME, ours)]).unwrap()),
            home,
        )
    }

    fn header(op: Op, len: u32) -> [u8; HEADER_BYTES] {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: 5,
            dst_port: HOME,
            len,
            kind: TYPE_STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        };
        header.to_bytes()
    }

    fn answer(driver: &Driver, address: u64) -> Header {
        Header::from_bytes(&driver.read(address, HEADER_BYTES).try_into().unwrap())
    }

    #[test]
    fn a_connection_of_the_guest_goes_through_the_queues() {
        let (mut device, mut home) = device();
        let mut driver = Driver::new(&device);
        driver.activate(&mut device, 0).unwrap();
        let (_, buffers) = driver.chain(RX_QUEUE, &[In(64), In(4096)]);
        driver.chain(TX_QUEUE, &[Out(&header(Op::Request, 0))]);
        device.queue_event(TX_QUEUE).unwrap();
        assert_eq!(answer(&driver, buffers[0]).op, Some(Op::Response));
        assert_eq!(driver.used(RX_QUEUE)[0].1 as usize, HEADER_BYTES);

        // Header and data in one buffer, then the data in two.
        driver.chain(TX_QUEUE, &[Out(&[&header(Op::Rw, 3)[..], b"abc"].concat())]);
        driver.chain(
            TX_QUEUE,
            &[Out(&header(Op::Rw, 6)), Out(b"def"), Out(b"ghi")],
        );
        device.queue_event(TX_QUEUE).unwrap();
        let mut text = [0; 9];
        home.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"abcdefghi");

        home.write_all(&[7; 100]).unwrap();
        let (head, buffers) = driver.chain(RX_QUEUE, &[In(64), In(4096)]);
        device.source_event(0, EventSet::IN).unwrap();
        let rw = answer(&driver, buffers[0]);
        assert_eq!((rw.op, rw.len, rw.fwd_cnt), (Some(Op::Rw), 100, 9));
        assert_eq!(driver.read(buffers[0] + 44, 20), [7; 20]);
        assert_eq!(driver.read(buffers[1], 80), [7; 80]);
        assert_eq!(driver.used(RX_QUEUE), [(head, 144)]);
        assert_eq!(device.counters()[0], ("rx_bytes", 100));
    }

    #[test]
    fn a_packet_longer_than_its_chain_resets_the_connection() {
        let (mut device, mut home) = device();
        let mut driver = Driver::new(&device);
        driver.activate(&mut device, 0).unwrap();
        driver.chain(TX_QUEUE, &[Out(&header(Op::Request, 0))]);
        driver.chain(TX_QUEUE, &[Out(&header(Op::Rw, 1000)), Out(b"few")]);
        let (_, buffers) = driver.chain(RX_QUEUE, &[In(4096)]);
        device.queue_event(TX_QUEUE).unwrap();
        assert_eq!(answer(&driver, buffers[0]).op, Some(Op::Rst));
        assert_eq!(home.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn buffers_too_small_for_a_header_stop_the_device() {
        let (mut device, _home) = device();
        let mut driver = Driver::new(&device);
        driver.activate(&mut device, 0).unwrap();
        driver.chain(TX_QUEUE, &[Out(&[0; HEADER_BYTES - 1])]);
        assert!(matches!(
            device.queue_event(TX_QUEUE),
            Err(DeviceError::Hostile(_))
        ));
        device.reset();
        driver.activate(&mut device, 0).unwrap();
        driver.chain(TX_QUEUE, &[Out(&header(Op::CreditRequest, 0))]);
        driver.chain(RX_QUEUE, &[In(HEADER_BYTES as u32)]);
        assert!(matches!(
            device.queue_event(RX_QUEUE),
            Err(DeviceError::Hostile(_))
        ));
    }

    #[test]
    fn answers_that_wait_for_buffers_hold_the_guest_back() {
        let (mut device, _home) = device();
        let mut driver = Driver::new(&device);
        driver.activate(&mut device, 0).unwrap();
        let closed = Header {
            dst_port: 99,
            ..Header::from_bytes(&header(Op::Request, 0))
        }
        .to_bytes();
        let mut taken = 0;
        for _ in 0..4 {
            for _ in 0..128 {
                driver.chain(TX_QUEUE, &[Out(&closed)]);
            }
            device.queue_event(TX_QUEUE).unwrap();
            taken += driver.used(TX_QUEUE).len();
            if taken < 256 {
                assert_eq!(taken % 128, 0);
            } else {
                break;
            }
        }
        assert_eq!(taken, 256, "as many as may wait");
        driver.chain(TX_QUEUE, &[Out(&closed)]);
        device.queue_event(TX_QUEUE).unwrap();
        assert!(driver.used(TX_QUEUE).is_empty());
        driver.chain(RX_QUEUE, &[In(64)]);
        device.queue_event(RX_QUEUE).unwrap();
        assert!(driver.kicked(TX_QUEUE), "there is room again");
        device.queue_event(TX_QUEUE).unwrap();
        assert_eq!(driver.used(TX_QUEUE).len(), 1);
    }

    #[test]
    fn the_configuration_is_the_context_id() {
        let (device, _home) = device();
        let mut config = [0; 12];
        device.read_config(0, &mut config);
        assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut end = [0xff; 4];
        device.read_config(6, &mut end);
        device.read_config(u64::MAX, &mut end);
        assert_eq!(end, [0, 0, 0xff, 0xff]);
    }

    #[test]
    fn broken_queues_stop_the_device_and_a_reset_heals_it() {
        attack(TX_QUEUE, 0, || device().0);
        // The rx queue is only looked at for a packet: a client of the host waits for the guest.
        attack(RX_QUEUE, 0, || {
            let mut device = device().0;
            device.muxer.poll().unwrap();
            assert!(device.muxer.has_packets());
            device
        });
    }
}
