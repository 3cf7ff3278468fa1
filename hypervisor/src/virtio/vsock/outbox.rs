//! Bytes of the guest that the host socket did not take yet.

use super::volatile_io;
use std::io;
use std::os::unix::net::UnixStream;
use vm_memory::VolatileSlice;

/// A first-in first-out buffer. It is as large as its content and holds no memory while empty; credit bounds it to
/// [`super::limits::BUFFER`].
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    /// Bytes at the front that went out.
    gone: usize,
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes that have not gone out.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.gone
    }

    /// Appends `data` without its first `skip` bytes.
    pub fn push(&mut self, data: &[VolatileSlice<'_>], mut skip: usize) {
        self.compact();
        for slice in data {
            let Ok(rest) = slice.offset(skip.min(slice.len())) else {
                continue;
            };
            skip -= skip.min(slice.len());
            let end = self.bytes.len();
            self.bytes.resize(end + rest.len(), 0);
            rest.copy_to(&mut self.bytes[end..]);
        }
    }

    /// Writes what the socket takes. Returns how many bytes that were.
    pub fn flush(&mut self, socket: &UnixStream) -> io::Result<usize> {
        let start = self.gone;
        while self.gone < self.bytes.len() {
            match volatile_io::send_bytes(socket, &self.bytes[self.gone..]) {
                Ok(sent) => self.gone += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let flushed = self.gone - start;
        if self.gone == self.bytes.len() {
            *self = Self::default();
        }
        Ok(flushed)
    }

    /// Moves what is left to the front when at least half is gone, so that each byte moves at most once on average.
    fn compact(&mut self) {
        if self.gone > self.bytes.len() / 2 {
            self.bytes.drain(..self.gone);
            self.gone = 0;
        }
    }
}
