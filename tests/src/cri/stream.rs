//! The CRI's streams (exec, attach, port-forward) over a WebSocket (RFC 6455) with Kubernetes' subprotocol
//! `v4.channel.k8s.io`: the first byte of each message is its channel.
//!
//! ```text
//! exec, attach     0 stdin   1 stdout   2 stderr   3 status, a JSON object at the end   4 terminal size, JSON
//! port-forward     0 data    1 error    each begins with the port as 2 bytes, little-endian
//! ```

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
pub const STATUS: u8 = 3;
pub const RESIZE: u8 = 4;

/// Longest message of a server that sends what tests ask for.
const MAX_MESSAGE: u64 = 16 << 20;
const FINAL_BINARY: u8 = 0x82;
const FINAL_CLOSE: u8 = 0x88;
const FINAL_PONG: u8 = 0x8a;
const MASKED: u8 = 0x80;

/// An open connection to the streaming server.
#[derive(Debug)]
pub struct Stream {
    reader: BufReader<TcpStream>,
}

impl Stream {
    /// Connects to a URL that the CRI gave.
    pub fn open(url: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").context("an http URL")?;
        let (address, path) = rest.split_once('/').context("a URL with a path")?;
        let mut tcp = TcpStream::connect(address).with_context(|| format!("connect to {url}"))?;
        tcp.set_read_timeout(Some(crate::PATIENCE))?;
        // The key only guards against caches; any 16 bytes in base64 do.
        write!(
            tcp,
            "GET /{path} HTTP/1.1\r\nHost: {address}\r\nOrigin: http://{address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: Y29mZmVyLWNyaS10ZXN0cw==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        )?;
        let mut reader = BufReader::new(tcp);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            ensure!(reader.read_line(&mut head)? > 0, "{url} answers {head:?}");
        }
        ensure!(head.starts_with("HTTP/1.1 101"), "{url} answers {head:?}");
        Ok(Self { reader })
    }

    pub fn send(&mut self, channel: u8, data: &[u8]) -> Result<()> {
        self.send_frame(FINAL_BINARY, &[&[channel], data].concat())
    }

    fn send_frame(&mut self, kind: u8, payload: &[u8]) -> Result<()> {
        let mut frame = vec![kind];
        match u16::try_from(payload.len())? {
            short @ 0..=125 => frame.push(MASKED | short.to_be_bytes()[1]),
            long => {
                frame.push(MASKED | 126);
                frame.extend(long.to_be_bytes());
            }
        }
        // A client must mask; a key of zeros leaves the payload as it is.
        frame.extend([0; 4]);
        frame.extend_from_slice(payload);
        Ok(self.reader.get_mut().write_all(&frame)?)
    }

    /// The next message with its channel; None when the server has closed.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            let mut head = [0; 2];
            match self.reader.read_exact(&mut head) {
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
                read => read?,
            }
            let length = match head[1] {
                126 => u64::from(u16::from_be_bytes(self.array()?)),
                127 => u64::from_be_bytes(self.array()?),
                short => u64::from(short),
            };
            ensure!(length <= MAX_MESSAGE, "a message of {length} bytes");
            let mut payload = vec![0; usize::try_from(length)?];
            self.reader.read_exact(&mut payload)?;
            match head[0] & 0x0f {
                1 | 2 if payload.is_empty() => {}
                1 | 2 => return Ok(Some((payload.remove(0), payload))),
                8 => return Ok(None),
                9 => self.send_frame(FINAL_PONG, &payload)?,
                10 => {}
                other => bail!("a frame of type {other}"),
            }
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Collects a channel until it contains `wanted`.
    pub fn read_until(&mut self, channel: u8, wanted: &str) -> Result<String> {
        let mut seen = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&seen);
            if text.contains(wanted) {
                return Ok(text.into_owned());
            }
            match self.receive()? {
                Some((from, data)) if from == channel => seen.extend_from_slice(&data),
                Some(_) => {}
                None => bail!("closed after {text:?}, without {wanted:?}"),
            }
        }
    }

    /// All that comes until the server closes: stdout, stderr and the exit code.
    pub fn finish(mut self) -> Result<(String, String, i64)> {
        let mut channels = [const { Vec::new() }; 4];
        while let Some((channel, data)) = self.receive()? {
            if let Some(seen) = channels.get_mut(usize::from(channel)) {
                seen.extend_from_slice(&data);
            }
        }
        let [_, stdout, stderr, status] = channels;
        let status: Value = serde_json::from_slice(&status).context("the status channel")?;
        let code = match status["status"].as_str() {
            Some("Success") => 0,
            _ => status["details"]["causes"][0]["message"]
                .as_str()
                .and_then(|code| code.parse().ok())
                .with_context(|| format!("no exit code in {status}"))?,
        };
        Ok((String::from_utf8(stdout)?, String::from_utf8(stderr)?, code))
    }

    /// Says that no more will be sent.
    pub fn close(&mut self) -> Result<()> {
        self.send_frame(FINAL_CLOSE, &[])
    }
}
