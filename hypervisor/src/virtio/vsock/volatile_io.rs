//! Socket calls straight from and into guest memory, without a copy in between. None of them blocks.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use vm_memory::VolatileSlice;

/// Receives into `parts` in order. Zero: the other end sends no more (or `parts` is empty).
pub fn receive(socket: &UnixStream, parts: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = io_vectors(parts);
    let mut message = message(&mut vectors);
    // SAFETY: each vector is mapped guest memory that `parts` borrows; it may change at any time, and the kernel
    // doesn't mind.
    retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
}

/// Sends `parts` in order, as much as the socket takes.
pub fn send(socket: &UnixStream, parts: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = io_vectors(parts);
    let message = message(&mut vectors);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as in `receive`; the kernel only reads.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
}

/// Sends bytes of our own.
pub fn send_bytes(socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: pointer and length are of one slice.
    retry(|| unsafe {
        libc::send(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            flags,
        )
    })
}

/// Receives bytes of our own; with `peek` they stay in the socket.
pub fn receive_bytes(socket: &UnixStream, bytes: &mut [u8], peek: bool) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | if peek { libc::MSG_PEEK } else { 0 };
    // SAFETY: pointer and length are of one slice, which nobody else uses meanwhile.
    retry(|| unsafe {
        libc::recv(
            socket.as_raw_fd(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
            flags,
        )
    })
}

fn io_vectors(parts: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    // The pointers stay good without their guards: guest RAM is mapped for as long as `parts` borrows it.
    parts
        .iter()
        .map(|part| libc::iovec {
            iov_base: part.ptr_guard_mut().as_ptr().cast(),
            iov_len: part.len(),
        })
        .collect()
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zero is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
