//! The console ring: the last [`CONSOLE_RING_BYTES`] the guest wrote, in a memory file the shim reads
//! ([`coffer_proto::vmm::console`]). A guest can write as fast and as much as it likes; it costs the host this file.

use coffer_proto::limits::CONSOLE_RING_BYTES;
use coffer_proto::vmm::console::{FILE_BYTES, HEADER_BYTES};
use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// The writing end.
#[derive(Debug)]
pub struct ConsoleRing {
    file: MmapRegion,
    written: u64,
}

impl ConsoleRing {
    /// Maps the memory file; it must have exactly the size the protocol says.
    pub fn new(file: File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        if size != FILE_BYTES as u64 {
            return Err(io::Error::other(format!(
                "the console file has {size} bytes instead of {FILE_BYTES}"
            )));
        }
        let file = MmapRegion::from_file(FileOffset::new(file, 0), FILE_BYTES)
            .map_err(io::Error::other)?;
        Ok(Self { file, written: 0 })
    }

    /// Bytes ever written.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Appends; only the last ring's worth of `data` is stored.
    pub fn push(&mut self, data: &[u8]) {
        let skip = data.len().saturating_sub(CONSOLE_RING_BYTES);
        self.written += skip as u64;
        let mut rest = &data[skip..];
        while !rest.is_empty() {
            let at = (self.written % CONSOLE_RING_BYTES as u64) as usize;
            let (part, tail) = rest.split_at(rest.len().min(CONSOLE_RING_BYTES - at));
            let ring = self.file.as_volatile_slice();
            ring.write_slice(part, HEADER_BYTES + at)
                .expect("the part ends inside the file");
            self.written += part.len() as u64;
            rest = tail;
        }
        let count = self.written.to_le();
        self.file
            .as_volatile_slice()
            .store(count, 0, Ordering::Release)
            .expect("the file begins with the count");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_proto::vmm::console;

    pub(crate) fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(FILE_BYTES as u64).unwrap();
        file
    }

    #[test]
    fn the_reader_sees_the_last_ring_of_a_flood() {
        let file = file();
        let mut ring = ConsoleRing::new(file.try_clone().unwrap()).unwrap();
        ring.push(b"hello");
        assert_eq!(console::read(&file).unwrap(), b"hello");
        let flood: Vec<u8> = (0..CONSOLE_RING_BYTES * 2 + 77).map(|n| n as u8).collect();
        ring.push(&flood);
        ring.push(b"end");
        let seen = console::read(&file).unwrap();
        assert_eq!(seen.len(), CONSOLE_RING_BYTES);
        assert_eq!(&seen[seen.len() - 3..], b"end");
        assert_eq!(
            seen[..seen.len() - 3],
            flood[flood.len() - (CONSOLE_RING_BYTES - 3)..]
        );
        assert_eq!(ring.written(), flood.len() as u64 + 8);
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        assert!(ConsoleRing::new(tempfile::tempfile().unwrap()).is_err());
    }
}
