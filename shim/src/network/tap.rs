//! Opening a tap device (linux/if_tun.h).
#![allow(unsafe_code)]

use super::NetworkError;
use nix::errno::Errno;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Makes a tap of this name in the thread's network namespace. It is not persistent: it goes with its last fd.
pub(super) fn open(name: &str) -> Result<OwnedFd, NetworkError> {
    let fail = |source| NetworkError::Tap {
        name: name.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(fail)?;
    if name.len() >= libc::IFNAMSIZ {
        return Err(fail(io::ErrorKind::InvalidFilename.into()));
    }
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the fd is /dev/net/tun and the request a whole, zero-terminated ifreq, which TUNSETIFF reads and writes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    Errno::result(result).map_err(|e| fail(e.into()))?;
    // struct virtio_net_hdr_v1, what a virtio 1.x device speaks.
    let header: libc::c_int = 12;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    let result = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETVNETHDRSZ as _,
            &raw const header,
        )
    };
    Errno::result(result).map_err(|e| fail(e.into()))?;
    Ok(file.into())
}
