//! Requests: from a chain to something the worker can do without further checks.

use super::{CLEAR_SEGMENT, HEADER, ID_BYTES, MAX_CLEAR_SECTORS, MAX_DATA, SECTOR};
use crate::virtio::Memory;
use crate::virtio::queue::Chain;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// The last byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Failed, or not allowed, or beyond the end.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// A type this device does not know, or the file system of the host can't do.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What the guest asks for; offsets and lengths are in bytes and lie inside the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill `length` bytes of the writable part from the file.
    Read { offset: u64, length: usize },
    /// Store `length` bytes of the readable part, after the header, in the file.
    Write { offset: u64, length: usize },
    /// Make all finished writes durable.
    Flush,
    /// Zero a range; `unmap` allows a hole.
    Zero {
        offset: u64,
        length: u64,
        unmap: bool,
    },
    /// Write the serial number.
    Id,
}

/// What a request is checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
}

impl Request {
    /// Parses a chain whose writable part has a status byte. The error is the status the guest gets.
    pub(super) fn parse(chain: &Chain, memory: &Memory, limits: Limits) -> Result<Self, Status> {
        let header: [u8; HEADER] = read(chain, memory, 0)?;
        let kind = u32::from_le_bytes(header[0..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(header[8..16].try_into().expect("eight bytes"));
        let data_in = (chain.writable_len() - 1) as u64;
        let data_out = (chain.readable_len() - HEADER) as u64;
        match kind {
            VIRTIO_BLK_T_IN => {
                let (offset, length) = limits.data(sector, data_in)?;
                Ok(Self::Read { offset, length })
            }
            VIRTIO_BLK_T_OUT => {
                limits.writable()?;
                let (offset, length) = limits.data(sector, data_out)?;
                Ok(Self::Write { offset, length })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID if data_in >= ID_BYTES as u64 => Ok(Self::Id),
            VIRTIO_BLK_T_GET_ID => Err(Status::IoError),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                limits.writable()?;
                if data_out != CLEAR_SEGMENT as u64 {
                    return Err(Status::IoError);
                }
                limits.clear(kind == VIRTIO_BLK_T_DISCARD, &read(chain, memory, HEADER)?)
            }
            _ => Err(Status::Unsupported),
        }
    }
}

impl Limits {
    fn writable(self) -> Result<(), Status> {
        if self.read_only {
            Err(Status::IoError)
        } else {
            Ok(())
        }
    }

    /// Checks a range of sectors; gives the offset in bytes.
    fn range(self, sector: u64, count: u64) -> Result<u64, Status> {
        let end = sector.checked_add(count).ok_or(Status::IoError)?;
        if end > self.sectors {
            Err(Status::IoError)
        } else {
            Ok(sector * SECTOR)
        }
    }

    fn data(self, sector: u64, length: u64) -> Result<(u64, usize), Status> {
        if !length.is_multiple_of(SECTOR) || length > MAX_DATA {
            return Err(Status::IoError);
        }
        Ok((self.range(sector, length / SECTOR)?, length as usize))
    }

    /// `struct virtio_blk_discard_write_zeroes`: sector u64, number of sectors u32, flags u32.
    fn clear(self, discard: bool, segment: &[u8; CLEAR_SEGMENT]) -> Result<Request, Status> {
        let sector = u64::from_le_bytes(segment[0..8].try_into().expect("eight bytes"));
        let count = u32::from_le_bytes(segment[8..12].try_into().expect("four bytes"));
        let flags = u32::from_le_bytes(segment[12..16].try_into().expect("four bytes"));
        let known = if discard {
            0
        } else {
            VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if count > MAX_CLEAR_SECTORS {
            return Err(Status::IoError);
        }
        let offset = self.range(sector, u64::from(count))?;
        Ok(Request::Zero {
            offset,
            length: u64::from(count) * SECTOR,
            unmap: discard || flags != 0,
        })
    }
}

fn read<const N: usize>(chain: &Chain, memory: &Memory, offset: usize) -> Result<[u8; N], Status> {
    let mut bytes = [0; N];
    chain
        .read(memory, offset, &mut bytes)
        .map_err(|_| Status::IoError)?;
    Ok(bytes)
}
