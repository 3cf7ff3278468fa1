//! The way home: one vsock connection to the host, dialled by the agent, which then serves ttrpc on it.
//!
//! The VMM gives the guest exactly one connection to [`HOME_PORT`]. The agent dials only once it can serve, so
//! the shim needs no polling: the connection is the sign of readiness, its end is the sign of death, both ways.

use crate::boot;
use crate::rpc::Verbs;
use crate::sandbox::Sandbox;
use coffer_proto::agent_ttrpc::create_agent;
use coffer_proto::limits::HOME_PORT;
use futures::StreamExt as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};
use ttrpc::asynchronous::transport::Listener;

/// The VMM listens before the guest runs, so a refusal means that its device is not ready yet, for a moment.
const DIAL_DEADLINE: Duration = Duration::from_secs(10);
const DIAL_INTERVAL: Duration = Duration::from_millis(10);

/// Why there is no way home.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    #[error("can't reach the shim at vsock port {HOME_PORT:#x} within {DIAL_DEADLINE:?}")]
    Dial(#[source] io::Error),
    #[error("can't serve the shim's connection")]
    Serve(#[source] ttrpc::Error),
}

/// Dials the shim and serves it until the connection ends.
pub async fn serve(sandbox: Arc<Sandbox>) -> Result<(), HomeError> {
    let stream = dial().await?;
    sandbox.reach("home");
    serve_stream(stream, sandbox, boot::tell_ready).await
}

async fn dial() -> Result<VsockStream, HomeError> {
    let end = Instant::now() + DIAL_DEADLINE;
    loop {
        match VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, HOME_PORT)).await {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= end => return Err(HomeError::Dial(error)),
            Err(_) => sleep(DIAL_INTERVAL).await,
        }
    }
}

/// Serves one connected stream and calls `ready` as soon as requests are taken. Returns when the peer is gone.
pub async fn serve_stream<S>(
    stream: S,
    sandbox: Arc<Sandbox>,
    ready: impl FnOnce(),
) -> Result<(), HomeError>
where
    S: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
{
    let ended = Arc::new(Notify::new());
    let connection = Watched {
        stream,
        ended: ended.clone(),
    };
    // ttrpc serves listeners only: this one has a single connection and then stays silent.
    let only = futures::stream::once(async { Ok(connection) }).chain(futures::stream::pending());
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(Listener::new(only))
        .register_service(create_agent(Arc::new(Verbs::new(sandbox))));
    server.start().await.map_err(HomeError::Serve)?;
    ready();
    ended.notified().await;
    Ok(())
}

/// A stream that tells when its peer is gone; ttrpc keeps that to itself.
struct Watched<S> {
    stream: S,
    ended: Arc<Notify>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        match &polled {
            Poll::Ready(Ok(())) if buffer.filled().len() == before && buffer.remaining() > 0 => {
                self.ended.notify_one();
            }
            Poll::Ready(Err(_)) => self.ended.notify_one(),
            _ => {}
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
