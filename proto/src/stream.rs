//! One stdio stream, or one TCP connection to the guest's loopback, is one vsock connection, and its bytes are raw. So is what carries
//! the containers' DNS queries, which are framed.
//!
//! ```text
//! shim  ── connect, STREAM_PORT ──►  agent
//! shim  ── hello ─────────────────►  u16 length, then JSON of `Hello`
//! shim  ◄───────────────── status ──  one byte: 0 = attached, anything else = refused
//!       ═══════════ raw bytes ═════
//! ```
//!
//! The stream has to be attached before `StartProcess`, so nothing a process writes can be lost. For stdin the shim
//! writes and its write-side shutdown is the end of input. For stdout and stderr the agent writes, and its shutdown
//! comes after the last byte that the process, or a child that inherited the stream, wrote. With a terminal only
//! stdin and stdout exist. Back-pressure is vsock's own credit; nobody buffers more than one read.
//!
//! For a TCP connection the agent answers once it has connected, and each side's shutdown is the end of what it sends.

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Longest JSON of a [`Hello`]: three names of 76 characters and their keys fit many times.
pub const MAX_HELLO: usize = 1024;
/// Answer to a hello that was taken.
pub const ATTACHED: u8 = 0;
/// Answer to a hello that names no such stream, one that is attached already, or an address where nobody listens.
pub const REFUSED: u8 = 1;

/// What the connection will carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Hello {
    /// A standard stream of a process.
    Stdio {
        container_id: String,
        /// Empty for the container's init process.
        exec_id: String,
        stream: Stream,
    },
    /// A TCP connection to an address of the guest's loopback, 127.0.0.0/8 or ::1.
    Forward { to: SocketAddr },
    /// DNS queries that containers send to this address of the guest's loopback by UDP, and their answers. Each message has its
    /// length before it, as in DNS over TCP (RFC 1035, 4.2.2).
    Resolve { at: SocketAddr },
}

/// Which of a process's standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    Stdin,
    Stdout,
    Stderr,
}

impl Hello {
    /// The bytes to send: length and JSON.
    pub fn encode(&self) -> Vec<u8> {
        let json = serde_json::to_vec(self).expect("strings, enums and addresses always serialise");
        let length = u16::try_from(json.len()).expect("ids are at most 76 characters");
        [&length.to_le_bytes()[..], &json].concat()
    }

    /// Parses the JSON that followed the length.
    pub fn decode(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_survives_the_wire() {
        let stdio = Hello::Stdio {
            container_id: "c".into(),
            exec_id: String::new(),
            stream: Stream::Stderr,
        };
        let forward = Hello::Forward {
            to: "[::1]:80".parse().unwrap(),
        };
        let resolve = Hello::Resolve {
            at: "127.0.0.11:53".parse().unwrap(),
        };
        for hello in [stdio, forward, resolve] {
            let wire = hello.encode();
            assert_eq!(
                usize::from(u16::from_le_bytes([wire[0], wire[1]])),
                wire.len() - 2
            );
            assert_eq!(Hello::decode(&wire[2..]).unwrap(), hello);
        }
    }
}
