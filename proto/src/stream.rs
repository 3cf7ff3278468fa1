//! One stdio stream is one vsock connection, and its bytes are raw.
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

use serde::{Deserialize, Serialize};

/// Longest JSON of a [`Hello`]: three names of 76 characters and their keys fit many times.
pub const MAX_HELLO: usize = 1024;
/// Answer to a hello that was taken.
pub const ATTACHED: u8 = 0;
/// Answer to a hello that names no such stream, or one that is attached already.
pub const REFUSED: u8 = 1;

/// Names the stream which the connection will carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    pub container_id: String,
    /// Empty for the container's init process.
    pub exec_id: String,
    pub stream: Stream,
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
        let json = serde_json::to_vec(self).expect("strings and an enum always serialise");
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
        let hello = Hello {
            container_id: "c".into(),
            exec_id: String::new(),
            stream: Stream::Stderr,
        };
        let wire = hello.encode();
        assert_eq!(
            usize::from(u16::from_le_bytes([wire[0], wire[1]])),
            wire.len() - 2
        );
        assert_eq!(Hello::decode(&wire[2..]).unwrap(), hello);
    }
}
