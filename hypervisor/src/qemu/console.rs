//! The guest's console: a socket of QEMU at one end, the ring of [`coffer_proto::vmm::console`] at the other.

use coffer_proto::limits::CONSOLE_RING_BYTES;
use coffer_proto::vmm::console::HEADER_BYTES;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

/// Writes what the guest prints into the ring.
#[derive(Debug)]
pub struct Console {
    socket: UnixStream,
    ring: File,
    written: u64,
}

impl Console {
    /// `socket` must not block.
    pub fn new(socket: UnixStream, ring: File) -> Self {
        Self {
            socket,
            ring,
            written: 0,
        }
    }

    /// Moves what is there, at most a ring full. False: QEMU closed its end.
    pub fn drain(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 16 << 10];
        for _ in 0..CONSOLE_RING_BYTES / buffer.len() {
            match self.socket.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => self.append(&buffer[..count])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Bytes first and the count last, so that a reader never counts bytes which are not there.
    fn append(&mut self, mut text: &[u8]) -> io::Result<()> {
        while !text.is_empty() {
            let at = usize::try_from(self.written % CONSOLE_RING_BYTES as u64)
                .expect("smaller than the ring");
            let (part, rest) = text.split_at(text.len().min(CONSOLE_RING_BYTES - at));
            self.ring.write_all_at(part, (HEADER_BYTES + at) as u64)?;
            self.written += part.len() as u64;
            text = rest;
        }
        self.ring.write_all_at(&self.written.to_le_bytes(), 0)
    }
}

impl AsFd for Console {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
