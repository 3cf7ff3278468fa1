//! Standard streams: each is one vsock connection of the host, and its bytes are raw. The handshake is in
//! [`coffer_proto::stream`]. Connections to the guest's loopback come in the same way and are for [`crate::forward`], and one
//! that answers DNS queries for [`crate::resolver`].
//!
//! ```text
//! host ── vsock ──► stdin   connection ─► pipe    the host's shutdown closes the pipe
//! host ◄── vsock ── stdout  connection ◄─ pipe    the pipe's end of file shuts the connection down
//! ```
//!
//! Nothing is lost: an output ends with the end of file of its pipe, which comes after the last byte of the last process that
//! holds it, however long the process that got it first is gone. Nobody buffers more than one read ([`COPY_BYTES`]): a side
//! that stops reading stops the other by the pipe's or vsock's own flow control.

use crate::forward;
use crate::process::ProcessId;
use crate::resolver;
use crate::sandbox::Sandbox;
use coffer_proto::error_chain::chain;
use coffer_proto::limits::STREAM_PORT;
use coffer_proto::stream::{ATTACHED, Hello, MAX_HELLO, REFUSED, Stream};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

/// One read and write. Larger than this gains nothing: it is what vsock sends in one packet.
const COPY_BYTES: usize = 64 << 10;
/// The host sends its hello with the connection; one that does not is of no use.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// After `CloseStdin`, input that was sent before may still be under way on its own connection. It ends when the host shuts
/// it down, or when nothing came for this long.
const STDIN_LINGER: Duration = Duration::from_millis(500);
/// Pause after a failed accept, which for a bound listener means that descriptors or memory are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The socket to which the host brings its streams.
#[derive(Debug)]
pub struct Listener(VsockListener);

/// The listener could not be made.
#[derive(Debug, thiserror::Error)]
#[error("can't listen on vsock port {STREAM_PORT:#x} for stdio streams")]
pub struct ListenError(#[source] io::Error);

/// Why a connection did not become a stream.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    #[error("no hello came within {HELLO_DEADLINE:?}")]
    Late,
    #[error("the connection ended within its hello")]
    Read(#[source] io::Error),
    #[error("a hello of {0} bytes is longer than {MAX_HELLO}")]
    TooLong(usize),
    #[error("the hello can't be parsed")]
    Malformed(#[source] serde_json::Error),
    #[error("the hello's name is not valid")]
    Name(#[source] coffer_proto::ids::InvalidId),
    #[error("{0} is not on the loopback")]
    Address(SocketAddr),
}

impl Listener {
    /// Listens; connections wait in the kernel until [`Listener::serve`].
    pub fn bind() -> Result<Self, ListenError> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))
            .map(Self)
            .map_err(ListenError)
    }

    /// Takes streams for ever.
    pub async fn serve(self, sandbox: Arc<Sandbox>) {
        loop {
            match self.0.accept().await {
                // A container reaches this port through vsock's loopback. Stdio is the host's alone.
                Ok((_, peer)) if peer.cid() != VMADDR_CID_HOST => {}
                Ok((connection, _)) => {
                    tokio::spawn(serve_connection(connection, sandbox.clone()));
                }
                Err(error) => {
                    tracing::warn!("can't accept a stdio stream: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Serves one connection of the host, from its hello to its end.
async fn serve_connection<C>(mut connection: C, sandbox: Arc<Sandbox>)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let asked = timeout(HELLO_DEADLINE, read_hello(&mut connection)).await;
    let (process, stream) = match asked.unwrap_or(Err(HelloError::Late)) {
        Ok(Asked::Stdio(process, stream)) => (process, stream),
        Ok(Asked::Forward(to)) => return forward::serve(connection, to).await,
        Ok(Asked::Resolve(at)) => return resolver::serve(connection, at).await,
        Err(error) => return refuse(connection, chain(&error)).await,
    };
    match sandbox.attach(&process, stream) {
        // An error means that the host closed its end: the pipe closes with it, and the writer gets its SIGPIPE.
        Ok(end) => drop(end.carry(&mut connection).await),
        Err(error) => refuse(connection, chain(&error)).await,
    }
}

async fn refuse<C: AsyncWrite + Unpin>(mut connection: C, reason: String) {
    tracing::warn!("refused a stdio stream: {reason}");
    let _ = connection.write_all(&[REFUSED]).await;
}

/// A hello that was checked.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Stdio(ProcessId, Stream),
    Forward(SocketAddr),
    Resolve(SocketAddr),
}

async fn read_hello<C: AsyncRead + Unpin>(connection: &mut C) -> Result<Asked, HelloError> {
    let length = usize::from(connection.read_u16_le().await.map_err(HelloError::Read)?);
    if length > MAX_HELLO {
        return Err(HelloError::TooLong(length));
    }
    let mut json = vec![0; length];
    connection
        .read_exact(&mut json)
        .await
        .map_err(HelloError::Read)?;
    match Hello::decode(&json).map_err(HelloError::Malformed)? {
        Hello::Stdio {
            container_id,
            exec_id,
            stream,
        } => {
            let process = ProcessId::new(&container_id, &exec_id).map_err(HelloError::Name)?;
            Ok(Asked::Stdio(process, stream))
        }
        Hello::Forward { to } if to.ip().is_loopback() => Ok(Asked::Forward(to)),
        Hello::Resolve { at } if at.ip().is_loopback() => Ok(Asked::Resolve(at)),
        Hello::Forward { to: address } | Hello::Resolve { at: address } => {
            Err(HelloError::Address(address))
        }
    }
}

/// The agent's end of one stream of a process, free to be carried by one connection. A terminal's master is an input and
/// an output at once, and is a pipe's like for both.
#[derive(Debug)]
pub enum StreamEnd {
    /// The process reads what is written here.
    Input {
        to: pipe::Sender,
        closing: watch::Receiver<bool>,
    },
    /// What the process writes is read here.
    Output(pipe::Receiver),
}

impl StreamEnd {
    async fn carry<C: AsyncRead + AsyncWrite + Unpin>(self, connection: &mut C) -> io::Result<()> {
        connection.write_all(&[ATTACHED]).await?;
        match self {
            Self::Input { to, closing } => carry_input(connection, to, closing).await,
            Self::Output(from) => carry_output(connection, from).await,
        }
    }
}

/// Copies until the host ends the stream, `closing` turns true and what was sent has come, or nobody can read the pipe any more.
async fn carry_input<C>(
    connection: &mut C,
    mut to: pipe::Sender,
    mut closing: watch::Receiver<bool>,
) -> io::Result<()>
where
    C: AsyncRead + Unpin,
{
    let mut buffer = Vec::with_capacity(COPY_BYTES);
    loop {
        buffer.clear();
        tokio::select! {
            count = connection.read_buf(&mut buffer) => if count? == 0 { return Ok(()) },
            () = quiet_after_closing(&mut closing) => return Ok(()),
            // Linux reports an error on a pipe without readers.
            _ = to.ready(Interest::ERROR) => return Ok(()),
        }
        to.write_all(&buffer).await?;
    }
}

async fn quiet_after_closing(closing: &mut watch::Receiver<bool>) {
    // The sender lives as long as the process is known; afterwards there is nothing to wait for.
    let _ = closing.wait_for(|closing| *closing).await;
    sleep(STDIN_LINGER).await;
}

/// Copies until the end of file, then tells it the host and waits until the host has taken everything.
async fn carry_output<C>(connection: &mut C, mut from: pipe::Receiver) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let mut buffer = Vec::with_capacity(COPY_BYTES);
    loop {
        buffer.clear();
        match from.read_buf(&mut buffer).await {
            Ok(0) => break,
            Ok(_) => connection.write_all(&buffer).await?,
            // How a terminal's master says that no process has the terminal open any more.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
            Err(error) => return Err(error),
        }
    }
    connection.shutdown().await?;
    // The host closes when it has read the end. Until then the connection stays, and with it what is under way.
    while connection.read_buf(&mut buffer).await? > 0 {
        buffer.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    fn input(to: pipe::Sender) -> (StreamEnd, watch::Sender<bool>) {
        let (close, closing) = watch::channel(false);
        (StreamEnd::Input { to, closing }, close)
    }

    fn carry(end: StreamEnd) -> (UnixStream, tokio::task::JoinHandle<io::Result<()>>) {
        let (host, mut guest) = UnixStream::pair().unwrap();
        (
            host,
            tokio::spawn(async move { end.carry(&mut guest).await }),
        )
    }

    async fn attached(host: &mut UnixStream) {
        assert_eq!(host.read_u8().await.unwrap(), ATTACHED);
    }

    #[tokio::test]
    async fn a_hello_names_the_stream() {
        let hello = Hello::Stdio {
            container_id: "c".into(),
            exec_id: "e".into(),
            stream: Stream::Stdout,
        };
        let asked = read_hello(&mut &hello.encode()[..]).await.unwrap();
        let process = ProcessId::new("c", "e").unwrap();
        assert_eq!(asked, Asked::Stdio(process, Stream::Stdout));
    }

    #[tokio::test]
    async fn bad_hellos_are_refused() {
        let with_length =
            |json: &[u8]| [&u16::try_from(json.len()).unwrap().to_le_bytes()[..], json].concat();
        let case = async |bytes: Vec<u8>| read_hello(&mut &bytes[..]).await.unwrap_err();
        assert!(matches!(
            case(vec![0xff, 0xff]).await,
            HelloError::TooLong(0xffff)
        ));
        assert!(matches!(case(vec![9, 0, b'{']).await, HelloError::Read(_)));
        assert!(matches!(
            case(with_length(b"{}")).await,
            HelloError::Malformed(_)
        ));
        let name = br#"{"stdio":{"container_id":"../c","exec_id":"","stream":"stdin"}}"#;
        assert!(matches!(case(with_length(name)).await, HelloError::Name(_)));
        for address in [
            &br#"{"forward":{"to":"10.0.0.1:80"}}"#[..],
            br#"{"resolve":{"at":"0.0.0.0:53"}}"#,
        ] {
            assert!(matches!(
                case(with_length(address)).await,
                HelloError::Address(_)
            ));
        }
    }

    #[tokio::test]
    async fn output_arrives_whole_after_the_writer_is_gone() {
        let (mut to, from) = pipe::pipe().unwrap();
        let (mut host, carried) = carry(StreamEnd::Output(from));
        attached(&mut host).await;
        let sent: Vec<u8> = (0..1_000_003u32)
            .map(|n| n.to_le_bytes()[n as usize % 3])
            .collect();
        let writer = tokio::spawn({
            let sent = sent.clone();
            async move { to.write_all(&sent).await.unwrap() }
        });
        let mut got = Vec::new();
        host.read_to_end(&mut got).await.unwrap();
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
        drop(host);
        writer.await.unwrap();
        carried.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_end_of_input_closes_the_pipe_after_the_last_byte() {
        let (to, mut from) = pipe::pipe().unwrap();
        let (end, _close) = input(to);
        let (mut host, carried) = carry(end);
        attached(&mut host).await;
        host.write_all(b"last words").await.unwrap();
        host.shutdown().await.unwrap();
        let mut got = String::new();
        from.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "last words");
        carried.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn closing_stdin_lets_what_was_sent_pass() {
        let (to, mut from) = pipe::pipe().unwrap();
        let (end, close) = input(to);
        let (mut host, _carried) = carry(end);
        attached(&mut host).await;
        close.send_replace(true);
        host.write_all(b"under way").await.unwrap();
        let mut got = String::new();
        from.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "under way");
    }

    #[tokio::test]
    async fn input_ends_when_nobody_reads() {
        let (to, from) = pipe::pipe().unwrap();
        let (end, _close) = input(to);
        let (mut host, carried) = carry(end);
        attached(&mut host).await;
        drop(from);
        carried.await.unwrap().unwrap();
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0, "the host learns it");
    }
}
