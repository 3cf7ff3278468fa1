//! DNS queries of containers for a resolver that is on the host.
//!
//! An engine that answers its containers at an address of their loopback (docker: 127.0.0.11) does so in their network namespace on
//! the host. The guest's loopback is another one, so the agent takes the queries there and passes them on.
//!
//! ```text
//! container ── UDP ──► agent ══ vsock ══► supervisor ── UDP ──► resolver
//! ```
//!
//! On the connection a message has its length before it, as in DNS over TCP (RFC 1035, 4.2.2), in both directions. Queries of
//! several clients may have the same id, so each gets one of the agent's on its way.

use coffer_proto::stream::{ATTACHED, REFUSED};
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::net::UdpSocket;

/// Queries that wait for their answer; of more, the oldest is forgotten, and its client asks again.
const MAX_QUERIES: usize = 256;
/// A message begins with its id, and its header has twelve bytes (RFC 1035, 4.1.1).
const HEADER_BYTES: usize = 12;
/// The longest that a frame, or a datagram, can be.
const MAX_MESSAGE: usize = u16::MAX as usize;

/// Takes queries at `at`, an address of the loopback, until `host` closes the connection.
pub async fn serve<C>(mut host: C, at: SocketAddr)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let socket = match UdpSocket::bind(at).await {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!("no resolver at {at}: {error}");
            let _ = host.write_all(&[REFUSED]).await;
            return;
        }
    };
    if host.write_all(&[ATTACHED]).await.is_err() {
        return;
    }
    let (from_host, to_host) = split(host);
    let pending = Mutex::default();
    // Either ends with the connection.
    tokio::select! {
        _ = ask(&socket, to_host, &pending) => {}
        _ = answer(&socket, from_host, &pending) => {}
    }
}

async fn ask(
    socket: &UdpSocket,
    mut host: impl AsyncWrite + Unpin,
    pending: &Mutex<Pending>,
) -> io::Result<()> {
    let mut message = vec![0; MAX_MESSAGE];
    loop {
        // An error here is one of an answer that was sent before: its client is gone.
        let Ok((length, client)) = socket.recv_from(&mut message).await else {
            continue;
        };
        if length < HEADER_BYTES {
            continue;
        }
        let id = [message[0], message[1]];
        let own = lock(pending).add(Query { client, id });
        message[..2].copy_from_slice(&own.to_be_bytes());
        host.write_u16(length as u16).await?;
        host.write_all(&message[..length]).await?;
        host.flush().await?;
    }
}

async fn answer(
    socket: &UdpSocket,
    mut host: impl AsyncRead + Unpin,
    pending: &Mutex<Pending>,
) -> io::Result<()> {
    loop {
        let mut message = vec![0; usize::from(host.read_u16().await?)];
        host.read_exact(&mut message).await?;
        let Some(own) = message.first_chunk().copied().map(u16::from_be_bytes) else {
            continue;
        };
        let asked = lock(pending).take(own);
        if let Some(Query { client, id }) = asked {
            message[..2].copy_from_slice(&id);
            let _ = socket.send_to(&message, client).await;
        }
    }
}

fn lock(pending: &Mutex<Pending>) -> std::sync::MutexGuard<'_, Pending> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who asked, and under which id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Query {
    client: SocketAddr,
    id: [u8; 2],
}

/// Queries without an answer, by the id that the agent gave them: its place is the id modulo their number.
#[derive(Debug)]
struct Pending {
    next: u16,
    queries: Vec<Option<(u16, Query)>>,
}

impl Default for Pending {
    fn default() -> Self {
        Self {
            next: 0,
            queries: vec![None; MAX_QUERIES],
        }
    }
}

impl Pending {
    fn add(&mut self, query: Query) -> u16 {
        let own = self.next;
        self.next = own.wrapping_add(1);
        self.queries[usize::from(own) % MAX_QUERIES] = Some((own, query));
        own
    }

    /// None for an answer that comes too late, or twice.
    fn take(&mut self, own: u16) -> Option<Query> {
        let place = &mut self.queries[usize::from(own) % MAX_QUERIES];
        let (_, query) = place.take_if(|(id, _)| *id == own)?;
        Some(query)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    const AT: &str = "127.9.9.9:5353";

    fn message(id: u16, text: &str) -> Vec<u8> {
        [&id.to_be_bytes(), &[0; 10][..], text.as_bytes()].concat()
    }

    async fn read(host: &mut UnixStream) -> Vec<u8> {
        let mut frame = vec![0; usize::from(host.read_u16().await.unwrap())];
        host.read_exact(&mut frame).await.unwrap();
        frame
    }

    #[tokio::test]
    async fn answers_reach_the_client_that_asked_under_its_own_id() {
        let at: SocketAddr = AT.parse().unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let serving = tokio::spawn(serve(guest, at));
        assert_eq!(host.read_u8().await.unwrap(), ATTACHED);
        let mut clients = Vec::new();
        for text in ["one", "two"] {
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.send_to(b"short", at).await.unwrap();
            client.send_to(&message(7, text), at).await.unwrap();
            let query = read(&mut host).await;
            assert_eq!(&query[12..], text.as_bytes());
            clients.push((client, query));
        }
        assert_ne!(clients[0].1[..2], clients[1].1[..2], "same id for two");
        // The second first, and once more at the end, which nobody waits for.
        for i in [1, 0, 1] {
            let answer = &clients[i].1;
            host.write_u16(answer.len() as u16).await.unwrap();
            host.write_all(answer).await.unwrap();
        }
        for ((client, _), text) in clients.iter().zip(["one", "two"]) {
            let mut got = [0; 64];
            let length = client.recv(&mut got).await.unwrap();
            assert_eq!(got[..length], message(7, text));
        }
        drop(host);
        serving.await.unwrap();
    }

    #[test]
    fn the_oldest_query_is_forgotten() {
        let query = |id: u8| Query {
            client: AT.parse().unwrap(),
            id: [0, id],
        };
        let mut pending = Pending::default();
        let first = pending.add(query(1));
        assert_eq!(pending.take(first), Some(query(1)));
        assert_eq!(pending.take(first), None);
        let old = pending.add(query(2));
        let newer: Vec<_> = (0..MAX_QUERIES).map(|_| pending.add(query(3))).collect();
        assert_eq!(pending.take(old), None);
        assert_eq!(pending.take(newer[0]), Some(query(3)));
    }
}
