//! The guest's console: a socket of QEMU at one end, the ring that the shim reads at the other.

use crate::ring::ConsoleRing;
use coffer_proto::limits::CONSOLE_RING_BYTES;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// Moves what the guest prints into the ring.
#[derive(Debug)]
pub struct Console {
    socket: UnixStream,
    ring: ConsoleRing,
}

impl Console {
    pub fn new(socket: UnixStream, ring: ConsoleRing) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, ring })
    }

    /// Moves what is there, at most a ring full. False: QEMU closed its end.
    pub fn drain(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 16 << 10];
        for _ in 0..CONSOLE_RING_BYTES / buffer.len() {
            match self.socket.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => self.ring.push(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

impl AsFd for Console {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
