//! TCP connections that the host makes to the guest's loopback, for port-forward: each is one vsock connection.
//!
//! The pod's network namespace is the guest's own, and so is its loopback.

use coffer_proto::stream::{ATTACHED, REFUSED};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// One read and write in each direction.
const COPY_BYTES: usize = 16 << 10;
/// A listener on loopback accepts at once, unless its backlog is full.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);

/// Connects `host` with `to`, an address of the loopback, until both directions have ended.
pub async fn serve<C>(mut host: C, to: SocketAddr)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let mut server = match connect(to).await {
        Ok(server) => server,
        Err(error) => {
            tracing::debug!("no connection to {to}: {error}");
            let _ = host.write_all(&[REFUSED]).await;
            return;
        }
    };
    // An error is a reset of either side; it ends the other by closing it.
    let _ = carry(&mut host, &mut server).await;
}

/// The caller's own connection was accepted already, so a refusal can't make it try the other address family. The
/// agent does that in its place: "localhost" is one name for both.
async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    match timeout(CONNECT_DEADLINE, TcpStream::connect(to)).await? {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            let other = SocketAddr::new(other_family(to.ip()), to.port());
            timeout(CONNECT_DEADLINE, TcpStream::connect(other)).await?
        }
        connected => connected,
    }
}

fn other_family(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv4Addr::LOCALHOST.into(),
    }
}

async fn carry<C>(host: &mut C, server: &mut TcpStream) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    server.set_nodelay(true)?;
    host.write_all(&[ATTACHED]).await?;
    copy_bidirectional_with_sizes(host, server, COPY_BYTES, COPY_BYTES).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;
    use tokio::net::{TcpListener, UnixStream};

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        tokio::spawn(serve(guest, listener.local_addr().unwrap()));
        let (mut server, _) = listener.accept().await.unwrap();
        assert_eq!(host.read_u8().await.unwrap(), ATTACHED);
        host.write_all(b"question").await.unwrap();
        host.shutdown().await.unwrap();
        let mut got = String::new();
        server.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "question");
        server.write_all(b"answer").await.unwrap();
        drop(server);
        got.clear();
        host.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "answer");
    }

    #[tokio::test]
    async fn the_other_family_is_tried_and_nobody_listening_is_refused() {
        let listener = TcpListener::bind("[::1]:0").await.unwrap();
        let to = (Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port()).into();
        let answer = async || {
            let (mut host, guest) = UnixStream::pair().unwrap();
            tokio::spawn(serve(guest, to));
            host.read_u8().await.unwrap()
        };
        assert_eq!(answer().await, ATTACHED);
        drop(listener);
        assert_eq!(answer().await, REFUSED);
    }
}
