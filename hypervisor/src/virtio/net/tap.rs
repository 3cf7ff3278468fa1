//! The host's end of the wire.

use super::{HEADER, NetError};
use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use vm_memory::VolatileSlice;

/// A tap device, opened by the shim, that speaks 12-byte virtio headers and never blocks.
#[derive(Debug)]
pub(super) struct Tap(File);

impl Tap {
    /// Takes a tap over and checks that it is one.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, NetError> {
        let tap = Self(fd.into());
        let flags = tap.flags().map_err(NetError::NotATap)?;
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & (wanted | libc::IFF_TUN | IFF_MULTI_QUEUE) != wanted {
            return Err(NetError::TapFlags(flags));
        }
        tap.set_header_size().map_err(NetError::HeaderSize)?;
        let status = fcntl(&tap.0, FcntlArg::F_GETFL)
            .map_err(|error| NetError::NonBlocking(error.into()))?;
        let status = OFlag::from_bits_retain(status) | OFlag::O_NONBLOCK;
        fcntl(&tap.0, FcntlArg::F_SETFL(status))
            .map_err(|error| NetError::NonBlocking(error.into()))?;
        Ok(tap)
    }

    #[allow(unsafe_code)]
    fn flags(&self) -> io::Result<i32> {
        // SAFETY: all zeroes is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF fills the ifreq, which outlives the call.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNGETIFF, &mut request) })?;
        // SAFETY: TUNGETIFF succeeded, so it set this member of the union.
        Ok(i32::from(unsafe { request.ifr_ifru.ifru_flags } as u16))
    }

    #[allow(unsafe_code)]
    fn set_header_size(&self) -> io::Result<()> {
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETVNETHDRSZ, &size) })
    }

    /// Tells the kernel what the guest can receive.
    #[allow(unsafe_code)]
    pub(super) fn set_offloads(&self, offloads: u32) -> Result<(), NetError> {
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        })
        .map_err(|source| NetError::Offload { offloads, source })
    }

    /// Reads one frame with its header.
    pub(super) fn receive(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(frame)
    }

    /// Sends one frame, header first.
    #[allow(unsafe_code)]
    pub(super) fn send(&self, frame: &[VolatileSlice<'_>]) -> io::Result<()> {
        let iovec = |s: &VolatileSlice<'_>| libc::iovec {
            iov_base: s.ptr_guard().as_ptr().cast_mut().cast(),
            iov_len: s.len(),
        };
        let iovecs: Vec<_> = frame.iter().map(iovec).collect();
        // SAFETY: every iovec is a part of guest memory, which stays mapped while the slices live; the kernel only reads.
        let sent = unsafe {
            libc::writev(
                self.0.as_raw_fd(),
                iovecs.as_ptr(),
                iovecs.len() as libc::c_int,
            )
        };
        // A frame is taken whole or not at all.
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
