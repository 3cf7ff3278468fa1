//! What a client of the host says first: which port of the guest it wants.

use super::limits::MAX_GREETING;
use super::volatile_io;
use std::io;
use std::os::unix::net::UnixStream;

/// The port of a `CONNECT <port>\n`, which is taken from the socket; what follows it stays. None: it is no such line.
/// An error of kind `WouldBlock`: the line has not come whole.
pub(super) fn read(client: &UnixStream) -> io::Result<Option<u32>> {
    let mut line = [0; MAX_GREETING];
    let available = volatile_io::receive_bytes(client, &mut line, true)?;
    let Some(length) = line[..available].iter().position(|byte| *byte == b'\n') else {
        let may_come = available > 0 && available < MAX_GREETING;
        return if may_come {
            Err(io::ErrorKind::WouldBlock.into())
        } else {
            Ok(None)
        };
    };
    volatile_io::receive_bytes(client, &mut line[..=length], false)?;
    let port = std::str::from_utf8(&line[..length])
        .ok()
        .and_then(|text| text.strip_prefix("CONNECT "));
    Ok(port.and_then(|port| port.parse().ok()))
}
