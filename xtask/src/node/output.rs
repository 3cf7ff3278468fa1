//! The node's output: what the command prints, closed by a mark with its exit status.
//!
//! Both come through one stream, so the status can't overtake the output, and an end of the stream without the mark
//! means that the node died.

use std::io::{ErrorKind, Read, Write};

use anyhow::{Context, Result};

/// Begins the mark; a record separator, so that hardly any output has to be held back.
const SEPARATOR: u8 = 0x1e;

/// A mark that a command can't print by accident.
#[derive(Debug)]
pub struct EndMark(Vec<u8>);

impl EndMark {
    /// `word` is unique to this run. The node prints the separator, the word, a space, the status and a newline.
    pub fn new(word: &str) -> Self {
        let mut mark = vec![SEPARATOR];
        mark.extend_from_slice(word.as_bytes());
        mark.push(b' ');
        Self(mark)
    }

    /// Copies output as it comes until the mark. `None`: the stream ended without one.
    pub fn copy(&self, mut from: impl Read, mut to: impl Write) -> Result<Option<u8>> {
        let mut held: Vec<u8> = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = match from.read(&mut buffer) {
                Ok(count) => count,
                // A QEMU that is killed resets the stream.
                Err(e) if e.kind() == ErrorKind::ConnectionReset => 0,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e).context("read the node's output"),
            };
            held.extend_from_slice(&buffer[..count]);
            if let Some((end, status)) = self.find(&held) {
                to.write_all(&held[..end])?;
                to.flush()?;
                return Ok(Some(status));
            }
            let sure = if count == 0 {
                held.len()
            } else {
                self.sure(&held)
            };
            to.write_all(&held[..sure])?;
            to.flush()?;
            held.drain(..sure);
            if count == 0 {
                return Ok(None);
            }
        }
    }

    /// Where the output ends, and the status behind it, if the whole mark is there.
    fn find(&self, held: &[u8]) -> Option<(usize, u8)> {
        let start = held
            .windows(self.0.len())
            .position(|window| window == self.0)?;
        let rest = &held[start + self.0.len()..];
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        let status = std::str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
        Some((start, status))
    }

    /// How many of the bytes are surely not part of a mark.
    fn sure(&self, held: &[u8]) -> usize {
        let separators = held
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == SEPARATOR);
        let mut candidates = separators.map(|(index, _)| index);
        let may_be_mark = |start: &usize| {
            let tail = &held[*start..];
            let common = tail.len().min(self.0.len());
            tail[..common] == self.0[..common]
        };
        candidates.find(may_be_mark).unwrap_or(held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives its bytes one at a time.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let count = self.0.len().min(1);
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn copy(stream: &[u8]) -> (Vec<u8>, Option<u8>) {
        let mark = EndMark::new("word");
        let (mut whole, mut slow) = (Vec::new(), Vec::new());
        let status = mark.copy(stream, &mut whole).unwrap();
        assert_eq!(mark.copy(Slow(stream), &mut slow).unwrap(), status);
        assert_eq!(whole, slow);
        (whole, status)
    }

    #[test]
    fn the_mark_ends_the_output_however_it_is_cut() {
        assert_eq!(
            copy(b"a\x1eb\nc\x1eword 137\n"),
            (b"a\x1eb\nc".to_vec(), Some(137))
        );
        assert_eq!(copy(b"\x1eword 0\n"), (Vec::new(), Some(0)));
    }

    #[test]
    fn a_stream_without_the_mark_is_a_dead_node() {
        assert_eq!(copy(b"some\x1ewo"), (b"some\x1ewo".to_vec(), None));
        assert_eq!(copy(b""), (Vec::new(), None));
    }
}
