//! A process's standard streams: what the caller named on one side ([`endpoint`]), vsock connections to the agent on the other.
//!
//! ```text
//! stdin fifo  ──► pump ──► connection ──► agent ──► process
//! stdout fifo ◄── pump ◄── connection ◄── agent ◄── process
//! ```
//!
//! Bytes are raw and a pump holds one buffer, so a reader that is slow slows the process.

pub mod endpoint;
mod logger;

pub use endpoint::Endpoints;

use crate::sandbox::process::ProcessKey;
use coffer_proto::limits::STREAM_PORT;
use coffer_proto::stream::{ATTACHED, Hello, Stream};
use endpoint::{EndpointError, Sink, Source};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// The socket of the VM's vsock in the sandbox's directory.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// What a pump holds at most. Larger brings no more throughput than the fifo below takes.
const PUMP_BYTES: usize = 128 << 10;
/// "OK 4294967295\n" and some.
const MAX_CONNECT_ANSWER: usize = 32;
/// For the handshake of one stream, on hardware.
const ATTACH: Duration = Duration::from_secs(5);

/// Why a stream could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error("can't connect {stream} with the agent")]
    Connect {
        stream: &'static str,
        source: io::Error,
    },
    #[error("the agent refused to attach {stream}")]
    Refused { stream: &'static str },
    #[error("the agent did not attach {stream} within {deadline:?}")]
    Deadline {
        stream: &'static str,
        deadline: Duration,
    },
}

/// Makes connections into one VM.
#[derive(Debug)]
pub struct Dialer {
    /// The sandbox's directory: sockets are reached through it, whatever the length of its path.
    dir: OwnedFd,
    deadline: Duration,
}

impl Dialer {
    /// `dir` holds [`VSOCK_SOCKET`].
    pub fn new(dir: &Path, slowness: u32) -> io::Result<Self> {
        let dir = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(dir)?;
        Ok(Self {
            dir: dir.into(),
            deadline: ATTACH * slowness,
        })
    }

    async fn attach(&self, key: &ProcessKey, stream: Stream) -> Result<UnixStream, StdioError> {
        let name = name(stream);
        let hello = Hello::Stdio {
            container_id: key.container.to_string(),
            exec_id: key
                .exec
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            stream,
        };
        match timeout(self.deadline, self.shake_hands(&hello)).await {
            Ok(Ok(Some(connection))) => Ok(connection),
            Ok(Ok(None)) => Err(StdioError::Refused { stream: name }),
            Ok(Err(source)) => Err(StdioError::Connect {
                stream: name,
                source,
            }),
            Err(_) => Err(StdioError::Deadline {
                stream: name,
                deadline: self.deadline,
            }),
        }
    }

    /// A connection to `to`, an address of the guest's loopback. None: nobody listens there.
    pub async fn forward(&self, to: SocketAddr) -> io::Result<Option<UnixStream>> {
        timeout(self.deadline, self.shake_hands(&Hello::Forward { to })).await?
    }

    /// A connection on which the DNS queries come that containers send to `at`, an address of the guest's loopback. None: somebody
    /// in the guest has that address.
    pub async fn resolve(&self, at: SocketAddr) -> io::Result<Option<UnixStream>> {
        timeout(self.deadline, self.shake_hands(&Hello::Resolve { at })).await?
    }

    /// None: the agent knows no such stream.
    async fn shake_hands(&self, hello: &Hello) -> io::Result<Option<UnixStream>> {
        let mut connection = UnixStream::connect(socket_in(&self.dir, VSOCK_SOCKET)).await?;
        connection
            .write_all(format!("CONNECT {STREAM_PORT}\n").as_bytes())
            .await?;
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            if answer.len() == MAX_CONNECT_ANSWER {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the answer to CONNECT is too long",
                ));
            }
            // Byte by byte: what follows the line belongs to the stream.
            answer.push(connection.read_u8().await?);
        }
        if !answer.starts_with(b"OK ") {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                "the answer to CONNECT is not OK",
            ));
        }
        connection.write_all(&hello.encode()).await?;
        Ok((connection.read_u8().await? == ATTACHED).then_some(connection))
    }
}

/// A path to a socket in an open directory, short enough for `sun_path` wherever the directory is.
pub fn socket_in(dir: &OwnedFd, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}

fn name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdin => "stdin",
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    }
}

/// The running pumps of one process. Dropping it stops them and closes the host's ends.
#[derive(Debug)]
pub struct ProcessIo {
    stdin: Option<JoinHandle<()>>,
    hold: Option<OwnedFd>,
    outputs: Vec<JoinHandle<()>>,
    /// Outputs that may still bring something.
    flowing: watch::Receiver<usize>,
}

impl ProcessIo {
    /// Connects every endpoint with the process's stream in the agent, which must know the process already.
    pub async fn attach(
        endpoints: Endpoints,
        dialer: &Dialer,
        key: &ProcessKey,
    ) -> Result<Self, StdioError> {
        let flowing = watch::Sender::new(0);
        let mut io = Self {
            stdin: None,
            hold: None,
            outputs: Vec::new(),
            flowing: flowing.subscribe(),
        };
        for (sink, stream) in [
            (endpoints.stdout, Stream::Stdout),
            (endpoints.stderr, Stream::Stderr),
        ] {
            let Some(sink) = sink else { continue };
            let connection = dialer.attach(key, stream).await?;
            flowing.send_modify(|n| *n += 1);
            let flowing = flowing.clone();
            io.outputs.push(tokio::spawn(async move {
                pump_out(connection, sink).await;
                flowing.send_modify(|n| *n -= 1);
            }));
        }
        if let Some(logger) = endpoints.logger {
            tokio::spawn(logger.end_after(io.drained()));
        }
        if let Some(source) = endpoints.stdin {
            let connection = dialer.attach(key, Stream::Stdin).await?;
            match source {
                Source::Fifo { reader, hold } => {
                    io.hold = Some(hold);
                    io.stdin = Some(tokio::spawn(pump_in(reader, connection)));
                }
                Source::File(file) => io.stdin = Some(tokio::spawn(pump_in(file, connection))),
            }
        }
        Ok(io)
    }

    /// A process all of whose streams are /dev/null.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self {
            stdin: None,
            hold: None,
            outputs: Vec::new(),
            flowing: watch::Sender::new(0).subscribe(),
        }
    }

    /// CloseIO: the input ends after what the fifo holds and once no other writer has it open. May be repeated.
    pub fn close_stdin(&mut self) {
        self.hold = None;
    }

    /// The process has ended: nobody reads its input any more.
    pub fn stop_stdin(&mut self) {
        self.hold = None;
        if let Some(task) = self.stdin.take() {
            task.abort();
        }
    }

    /// Resolves when every output has ended and been written.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut flowing = self.flowing.clone();
        async move {
            // An error means that the pumps were dropped, which is an end as well.
            let _ = flowing.wait_for(|n| *n == 0).await;
        }
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        self.stop_stdin();
        for task in &self.outputs {
            task.abort();
        }
    }
}

async fn pump_out(mut connection: UnixStream, sink: Sink) {
    let result = match sink {
        Sink::Fifo(mut fifo) => pump(&mut connection, &mut fifo).await,
        Sink::File(mut file) => pump(&mut connection, &mut file).await,
    };
    if let Err(error) = result {
        // A reset is how the VM's death looks from here, and that has its own message.
        tracing::debug!(%error, "an output stream broke");
    }
}

async fn pump_in(mut source: impl AsyncRead + Unpin, mut connection: UnixStream) {
    let result = pump(&mut source, &mut connection).await;
    // For the agent this is the end of the input.
    let _ = connection.shutdown().await;
    match result {
        Ok(()) => wait_for_close(connection).await,
        Err(error) => tracing::debug!(%error, "an input stream broke"),
    }
}

/// Keeps the half-closed connection: closing it would reset what is still under way to the process.
async fn wait_for_close(mut connection: UnixStream) {
    let mut byte = [0; 1];
    let _ = connection.read(&mut byte).await;
}

async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut buffer = vec![0; PUMP_BYTES];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.flush().await;
        }
        to.write_all(&buffer[..length]).await?;
    }
}

#[cfg(test)]
mod tests;
