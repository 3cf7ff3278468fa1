//! The agent's end of the connection, held to what a ttrpc server may send.
//!
//! A ttrpc frame is a header of ten bytes (u32 length, u32 stream id, u8 type, u8 flags, big endian) and `length` bytes. The
//! client library would skip a frame that is too long and drop one that belongs to no call, for ever; here the
//! first such frame ends the connection, and so the sandbox.

use coffer_proto::limits::MAX_RPC_MESSAGE;
use std::collections::HashSet;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

const HEADER: usize = 10;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    length: usize,
    stream: u32,
    kind: u8,
}

/// Finds the headers in a stream of bytes that comes in pieces of any size.
#[derive(Debug, Default)]
struct Frames {
    header: Vec<u8>,
    payload_left: usize,
}

impl Frames {
    /// Takes the next piece and gives each header that it completes to `see`.
    fn feed(
        &mut self,
        mut bytes: &[u8],
        mut see: impl FnMut(Header) -> io::Result<()>,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let skipped = self.payload_left.min(bytes.len());
                self.payload_left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            let taken = (HEADER - self.header.len()).min(bytes.len());
            self.header.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if let Ok(raw) = <[u8; HEADER]>::try_from(self.header.as_slice()) {
                self.header.clear();
                let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _flags] = raw;
                let length = usize::try_from(u32::from_be_bytes([l0, l1, l2, l3]))
                    .expect("usize has 64 bits");
                see(Header {
                    length,
                    stream: u32::from_be_bytes([s0, s1, s2, s3]),
                    kind,
                })?;
                self.payload_left = length;
            }
        }
        Ok(())
    }
}

/// The connection to the agent, checked in both directions.
#[derive(Debug)]
pub struct Checked {
    stream: UnixStream,
    sent: Frames,
    received: Frames,
    /// Calls without an answer so far. One that met its deadline stays, its late answer is legal.
    open: HashSet<u32>,
}

impl Checked {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            sent: Frames::default(),
            received: Frames::default(),
            open: HashSet::new(),
        }
    }
}

fn illegal(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the agent broke the protocol: {what}"),
    )
}

impl AsyncRead for Checked {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let Self { received, open, .. } = &mut *self;
        let checked = received.feed(
            &buffer.filled()[before..],
            |Header {
                 length,
                 stream,
                 kind,
             }| {
                if length > MAX_RPC_MESSAGE {
                    return Err(illegal(&format!("a frame of {length} bytes")));
                }
                if kind != RESPONSE {
                    return Err(illegal(&format!("a frame of type {kind}")));
                }
                if !open.remove(&stream) {
                    return Err(illegal(&format!(
                        "an answer to call {stream}, which is not open"
                    )));
                }
                Ok(())
            },
        );
        Poll::Ready(checked)
    }
}

impl AsyncWrite for Checked {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let length = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        let Self { sent, open, .. } = &mut *self;
        let noted = sent.feed(&bytes[..length], |header| {
            if header.kind == REQUEST {
                open.insert(header.stream);
            }
            Ok(())
        });
        Poll::Ready(noted.map(|()| length))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_found_in_any_pieces() {
        let frame = |length: u32, stream: u32| {
            let mut bytes = [
                &length.to_be_bytes()[..],
                &stream.to_be_bytes(),
                &[RESPONSE, 0],
            ]
            .concat();
            bytes.resize(HEADER + length as usize, 0xff);
            bytes
        };
        let bytes = [frame(5, 1), frame(0, 3), frame(70, 5)].concat();
        for piece in 1..bytes.len() {
            let (mut frames, mut seen) = (Frames::default(), Vec::new());
            for part in bytes.chunks(piece) {
                frames
                    .feed(part, |header| {
                        seen.push((header.length, header.stream));
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(seen, [(5, 1), (0, 3), (70, 5)], "in pieces of {piece}");
        }
    }
}
