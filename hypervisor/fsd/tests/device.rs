//! coffer-vmm's virtio-fs device with coffer-fsd behind it: the whole path of a file to the guest but the guest itself.
//! Needs root.

mod server;

use coffer_hypervisor::virtio::fs::Fs;
use coffer_hypervisor::virtio::{Activation, DeviceError, Interrupt, Memory, VirtioDevice};
use guest_memory::{Bytes, FileOffset, GuestAddress};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::process::Child;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const REQUEST_QUEUE: usize = 1;
const QUEUE_SIZE: u16 = 64;
/// EVENT_IDX and VERSION_1.
const FEATURES: u64 = 1 << 29 | 1 << 32;

/// Two regions with a hole between, in one memory file, as a guest with much memory has.
const REGION: usize = 1 << 20;
const SECOND: u64 = 4 << 20;
const RINGS: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Request in the first region, response in the second.
const REQUEST: u64 = 0x8_0000;
const RESPONSE: u64 = SECOND + 0x1000;
const RESPONSE_SIZE: u32 = 0x8_0000;

const ROOT: u64 = 1;
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;

struct Guest {
    fs: Fs,
    memory: Memory,
    interrupt: Interrupt,
    line: EventFd,
    kicks: Vec<EventFd>,
    sent: u16,
    server: Child,
    share: tempfile::TempDir,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn wait(fd: RawFd) {
    #[allow(unsafe_code)]
    // SAFETY: the file is open while the guest, which owns it, is borrowed by the caller.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    assert_eq!(
        poll(&mut fds, PollTimeout::from(10_000u16)),
        Ok(1),
        "nothing within 10 s"
    );
}

impl Guest {
    fn new() -> Self {
        let share = tempfile::tempdir().unwrap();
        let (server, connection) = server::serve(share.path());
        let fs = Fs::new("coffer", connection.into()).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * REGION as u64).unwrap();
        let part = |start| Some(FileOffset::new(file.try_clone().unwrap(), start));
        let memory = Memory::from_ranges_with_files([
            (GuestAddress(0), REGION, part(0)),
            (GuestAddress(SECOND), REGION, part(REGION as u64)),
        ]);
        let interrupt = Interrupt::new().unwrap();
        let line = interrupt.hand_over().unwrap();
        let kicks = (0..2)
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .collect();
        let memory = memory.unwrap();
        Self {
            fs,
            memory,
            interrupt,
            line,
            kicks,
            sent: 0,
            server,
            share,
        }
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        let queue = |index: u64| {
            let base = (RINGS * index) as u32;
            self.memory
                .write_slice(&[0; RINGS as usize], GuestAddress(RINGS * index))
                .unwrap();
            let mut queue = Queue::new(QUEUE_SIZE).unwrap();
            queue.set_desc_table_address(Some(base), None);
            queue.set_avail_ring_address(Some(base + AVAIL as u32), None);
            queue.set_used_ring_address(Some(base + USED as u32), None);
            queue.set_event_idx(true);
            queue.set_ready(true);
            queue
        };
        self.sent = 0;
        let active = Activation {
            memory: self.memory.clone(),
            queues: vec![queue(0), queue(1)],
            notify: self
                .kicks
                .iter()
                .map(|kick| kick.try_clone().unwrap())
                .collect(),
            interrupt: self.interrupt.clone(),
            features: FEATURES,
        };
        self.fs.activate(active)?;
        let mut body = [0; 64];
        body[..4].copy_from_slice(&7u32.to_le_bytes());
        body[4..8].copy_from_slice(&38u32.to_le_bytes());
        self.request(INIT, 0, &body).unwrap();
        Ok(())
    }

    /// One FUSE request: the body of the reply, or the errno.
    fn request(&mut self, operation: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut message = (40 + body.len() as u32).to_le_bytes().to_vec();
        message.extend(operation.to_le_bytes());
        message.extend(u64::from(self.sent + 1).to_le_bytes());
        message.extend(node.to_le_bytes());
        message.resize(40, 0);
        message.extend(body);
        self.memory
            .write_slice(&message, GuestAddress(REQUEST))
            .unwrap();
        self.descriptor(0, REQUEST, message.len() as u32, 1, 1);
        self.descriptor(1, RESPONSE, RESPONSE_SIZE, 2, 0);
        let avail = RINGS + AVAIL;
        let slot = avail + 4 + 2 * u64::from(self.sent % QUEUE_SIZE);
        self.memory.write_obj(0u16, GuestAddress(slot)).unwrap();
        // Interrupt me when this one is used.
        let event = avail + 4 + 2 * u64::from(QUEUE_SIZE);
        self.memory
            .write_obj(self.sent, GuestAddress(event))
            .unwrap();
        self.sent += 1;
        self.memory
            .write_obj(self.sent, GuestAddress(avail + 2))
            .unwrap();
        self.kicks[REQUEST_QUEUE].write(1).unwrap();

        wait(self.line.as_raw_fd());
        self.line.read().unwrap();
        let used: u16 = self
            .memory
            .read_obj(GuestAddress(RINGS + USED + 2))
            .unwrap();
        assert_eq!(used, self.sent);
        let length: u32 = self.memory.read_obj(GuestAddress(RESPONSE)).unwrap();
        let error: i32 = self.memory.read_obj(GuestAddress(RESPONSE + 4)).unwrap();
        let mut reply = vec![0; length as usize - 16];
        self.memory
            .read_slice(&mut reply, GuestAddress(RESPONSE + 16))
            .unwrap();
        if error == 0 { Ok(reply) } else { Err(-error) }
    }

    fn descriptor(&self, index: u64, address: u64, length: u32, flags: u16, next: u16) {
        let at = RINGS + 16 * index;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn read_file(&mut self, name: &str, length: u32) -> Result<Vec<u8>, i32> {
        let entry = self.request(LOOKUP, ROOT, &[name.as_bytes(), &[0]].concat())?;
        let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
        let handle = self.request(OPEN, node, &[0; 8])?[..8].to_vec();
        let read = [&handle[..], &[0; 8], &length.to_le_bytes(), &[0; 20]].concat();
        self.request(READ, node, &read)
    }
}

#[test]
fn a_file_of_the_share_reaches_guest_memory() {
    let mut guest = Guest::new();
    let content: Vec<u8> = (0..300_000u32).map(|n| (n * 7 / 8) as u8).collect();
    std::fs::write(guest.share.path().join("data"), &content).unwrap();
    guest.activate().unwrap();
    assert!(guest.fs.takes_kicks());
    assert!(guest.read_file("data", 400_000).unwrap() == content);
    assert_eq!(guest.read_file("absent", 1), Err(libc::ENOENT));
    let mut config = [0xff; 44];
    guest.fs.read_config(0, &mut config);
    assert_eq!(&config[..7], b"coffer\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
}

#[test]
fn a_reset_stops_the_rings_and_the_next_driver_starts_over() {
    let mut guest = Guest::new();
    std::fs::write(guest.share.path().join("data"), "text").unwrap();
    for _ in 0..3 {
        guest.activate().unwrap();
        assert_eq!(guest.read_file("data", 100).unwrap(), b"text");
        guest.fs.reset();
        // What a stale driver would do: kick the old ring. Nobody may answer.
        guest.kicks[REQUEST_QUEUE].write(1).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(guest.line.read().is_err());
        guest.kicks[REQUEST_QUEUE].read().unwrap();
    }
}

#[test]
fn the_end_of_coffer_fsd_ends_the_vm() {
    let mut guest = Guest::new();
    guest.activate().unwrap();
    let (socket, set, token) = guest.fs.sources()[0];
    guest
        .fs
        .source_event(token, set)
        .expect("a false alarm is no end");
    guest.server.kill().unwrap();
    wait(socket);
    let Err(DeviceError::Fatal(cause)) = guest.fs.source_event(token, set) else {
        panic!("the end was not seen")
    };
    assert_eq!(cause.to_string(), "coffer-fsd ended");
    // Nor does a later reset or driver hang on it.
    guest.fs.reset();
    assert!(guest.activate().is_err());
}

#[test]
fn memory_that_coffer_fsd_could_not_map_is_refused() {
    let mut guest = Guest::new();
    guest.memory = Memory::from_ranges(&[(GuestAddress(0), REGION)]).unwrap();
    assert!(matches!(guest.activate(), Err(DeviceError::Fatal(_))));
}
