//! The muxer against a guest that is played by the test, packet by packet.

mod flow;
mod hostile;

use super::limits::{ANSWER_TIMEOUT, BUFFER, CREDIT_THRESHOLD, MAX_CONNECTIONS, MAX_RESETS};
use super::packet::{HEADER_BYTES, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::{HOST_CID, Header, Muxer, Op};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;

const CID: u64 = 3;
const HOME: u32 = 17;
const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

struct World {
    muxer: Muxer,
    directory: tempfile::TempDir,
    /// The host's end of the connection that the guest may make to port HOME.
    home: UnixStream,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let (home, ours) = UnixStream::pair().unwrap();
        home.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let muxer = Muxer::new(CID, listener, [(HOME, ours)]).unwrap();
        Self {
            muxer,
            directory,
            home,
        }
    }

    /// A client of the listener that says `greeting`.
    fn client(&self, greeting: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        client.write_all(greeting.as_bytes()).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        client
    }

    /// A connection from the host to the guest's port 5, open on both sides, and the host's port.
    fn open(&mut self) -> (UnixStream, u32) {
        let mut client = self.client("CONNECT 5\n");
        self.muxer.poll().unwrap();
        let (request, _) = self.receive().unwrap();
        assert_eq!((request.op, request.dst_port), (Some(Op::Request), 5));
        self.send(
            Header {
                op: Some(Op::Response),
                ..packet(5, request.src_port)
            },
            b"",
        );
        let mut answer = vec![0; format!("OK {}\n", request.src_port).len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, format!("OK {}\n", request.src_port).as_bytes());
        (client, request.src_port)
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let mut data = data.to_vec();
        self.muxer
            .take_packet(&header, &[VolatileSlice::from(&mut data[..])]);
    }

    fn send_data(&mut self, host_port: u32, data: &[u8]) {
        self.send(
            Header {
                len: data.len() as u32,
                ..packet(5, host_port)
            },
            data,
        );
    }

    /// The guest ends one direction of a connection, or both.
    fn shut_down(&mut self, host_port: u32, flags: u32) {
        let header = Header {
            op: Some(Op::Shutdown),
            flags,
            ..packet(5, host_port)
        };
        self.send(header, b"");
    }

    /// The next packet in a buffer as Linux posts it.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut room = vec![0; 4096 - HEADER_BYTES];
        let header = self
            .muxer
            .next_packet(&[VolatileSlice::from(&mut room[..])])?;
        assert_eq!(
            (header.src_cid, header.dst_cid, header.kind),
            (HOST_CID, CID, TYPE_STREAM)
        );
        room.truncate(header.len as usize);
        Some((header, room))
    }

    /// What the guest gets next after the host's sockets were looked at.
    fn poll_op(&mut self) -> Option<Op> {
        self.muxer.poll().unwrap();
        self.receive().and_then(|(header, _)| header.op)
    }

    /// Whether a thread that sleeps on the muxer would wake up.
    fn wants_poll(&self) -> bool {
        // SAFETY: the muxer outlives the descriptor.
        #[allow(unsafe_code)]
        let fd = unsafe { BorrowedFd::borrow_raw(self.muxer.fd()) };
        poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }
}

/// An RW packet of the guest with nothing in it, and plenty of room at the guest.
fn packet(guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len: 0,
        kind: TYPE_STREAM,
        op: Some(Op::Rw),
        flags: 0,
        buf_alloc: 256 << 10,
        fwd_cnt: 0,
    }
}

fn request(host_port: u32) -> Header {
    Header {
        op: Some(Op::Request),
        ..packet(5, host_port)
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
