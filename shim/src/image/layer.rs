//! One layer on its way from the blob to the tree: size, digest, decompression, digest again.

use super::manifest::hex;
use super::source::{Section, Source};
use super::tree::Tree;
use super::{Error, MAX_UNPACKED_BYTES, sha256_of};
use oci_spec::image::Digest;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use sha2::{Digest as _, Sha256};
use std::io::{self, BufRead, BufReader, Read};
use std::sync::atomic::AtomicBool;

/// Read size for blobs: large enough that system calls don't count.
const BUFFER_BYTES: usize = 256 << 10;

/// Where a layer is and what it has to be.
#[derive(Debug)]
pub(super) struct Layer {
    path: String,
    /// Digest and size of the file as stored. A docker archive has none; its layers are checked by `diff_id` alone.
    stored: Option<(Digest, u64)>,
    /// Digest of the plain tar.
    diff_id: Digest,
}

impl Layer {
    pub(super) fn new(
        path: String,
        stored: Option<(Digest, u64)>,
        diff_id: Digest,
    ) -> Result<Self, Error> {
        sha256_of(&diff_id)?;
        Ok(Self {
            path,
            stored,
            diff_id,
        })
    }

    /// Applies the layer to the tree. What was written is only to be trusted when this returned Ok.
    pub(super) fn unpack(
        &self,
        source: &Source,
        tree: &mut Tree,
        stop: &AtomicBool,
    ) -> Result<(), Error> {
        let section = source.required(&self.path)?;
        if let Some((_, expected)) = self.stored
            && section.size() != expected
        {
            return Err(Error::Size {
                name: self.path.clone(),
                expected,
                actual: section.size(),
            });
        }
        let read = |source| Error::Read {
            name: self.path.clone(),
            source,
        };
        let mut stored = BufReader::with_capacity(BUFFER_BYTES, Hashed::new(section));
        let mut plain = Hashed::new(
            decompress(&mut stored)
                .map_err(read)?
                .take(MAX_UNPACKED_BYTES + 1),
        );
        // A corrupt blob shows as any kind of tar or gzip error: the digests are looked at first, then the result.
        let applied = match tree.apply(&mut plain, stop) {
            Err(super::tree::Error::Stopped) => return Err(Error::Stopped),
            applied => applied,
        };
        let drained = io::copy(&mut plain, &mut io::sink());
        if plain.count > MAX_UNPACKED_BYTES {
            return Err(Error::TooLarge);
        }
        let diff_id = plain.digest();
        if let Some((expected, _)) = &self.stored {
            io::copy(&mut stored, &mut io::sink()).map_err(read)?;
            self.check(&self.path, expected, stored.into_inner().digest())?;
        }
        applied.map_err(|source| Error::Layer {
            name: self.path.clone(),
            source,
        })?;
        drained.map_err(read)?;
        self.check(
            &format!("the unpacked {}", self.path),
            &self.diff_id,
            diff_id,
        )
    }

    fn check(&self, name: &str, expected: &Digest, actual: String) -> Result<(), Error> {
        if sha256_of(expected)? != actual {
            return Err(Error::Digest {
                name: name.into(),
                expected: expected.to_string(),
                actual,
            });
        }
        Ok(())
    }
}

/// Counts and hashes what is read through it.
struct Hashed<R> {
    inner: R,
    hash: Sha256,
    count: u64,
}

impl<R> Hashed<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            count: 0,
        }
    }

    fn digest(self) -> String {
        hex(&self.hash.finalize())
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        self.count += read as u64;
        Ok(read)
    }
}

/// By magic number, since media types are often wrong about it.
fn decompress<'a>(stored: &'a mut BufReader<Hashed<Section>>) -> io::Result<Box<dyn Read + 'a>> {
    let start = stored.fill_buf()?;
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(BufReader::with_capacity(
            BUFFER_BYTES,
            flate2::bufread::MultiGzDecoder::new(stored),
        )),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            Box::new(ZstdFrames {
                source: stored,
                frame: None,
            })
        }
        [b'B', b'Z', b'h', ..] | [0xfd, b'7', b'z', b'X', ..] => {
            return Err(io::Error::other(
                "only plain, gzip and zstd layers are supported",
            ));
        }
        _ => Box::new(stored),
    })
}

/// All frames of a zstd stream, one after the other. `zstd:chunked` layers have many, and skippable ones between.
struct ZstdFrames<'a, R> {
    source: &'a mut R,
    frame: Option<FrameDecoder>,
}

impl<R: BufRead> ZstdFrames<'_, R> {
    /// Starts the next frame; false at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            let mut frame = FrameDecoder::new();
            match frame.init(&mut self.source) {
                Ok(()) => {
                    self.frame = Some(frame);
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    io::copy(
                        &mut self.source.by_ref().take(length.into()),
                        &mut io::sink(),
                    )?;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}

impl<R: BufRead> Read for ZstdFrames<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(frame) = &mut self.frame {
                while frame.can_collect() == 0 && !frame.is_finished() {
                    let one = BlockDecodingStrategy::UptoBlocks(1);
                    frame
                        .decode_blocks(&mut self.source, one)
                        .map_err(io::Error::other)?;
                }
                let read = frame.read(buffer)?;
                if read > 0 {
                    return Ok(read);
                }
                self.frame = None;
            }
            if !self.next_frame()? {
                return Ok(0);
            }
        }
    }
}
