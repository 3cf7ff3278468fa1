//! The lease of a stand-in: the process on the host that stands for one process of the guest.
//!
//! conmon and engines above it know a container by a process: they reap it, signal it, look at its namespaces and its
//! cgroup, and end it with SIGKILL, which nobody can relay. So a stand-in holds a connection to the supervisor as long as it lives:
//!
//! ```text
//! stand-in ── connect ──►  <sandbox>/lease.sock
//!          ── Registration as one line of JSON ──►  kept in state.json, with the pid that the kernel tells (SO_PEERCRED)
//!          ◄── "\n" ──
//!          ── end of file ──►  its process in the guest is killed, if that has not ended
//! ```

use crate::cgroup::CgroupPath;
use crate::machine::child::ProcessId;
use crate::sandbox::Sandbox;
use crate::sandbox::process::ProcessKey;
use crate::state::StandIn;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::{ContainerId, ExecId, SandboxId};
use oci_spec::runtime::Hook;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

/// The socket in the sandbox's directory.
pub const SOCKET: &str = "lease.sock";
/// Longest registration: it holds the spec's annotations and hooks, and a spec is limited to this.
const MAX_REGISTRATION: u64 = crate::spec::MAX_CONFIG_BYTES;
/// A client that connects has its registration ready, and the supervisor only writes a file before it answers.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("can't reach the supervisor of sandbox {id}")]
    Connect { id: SandboxId, source: io::Error },
    #[error("the supervisor did not take the registration of {process}")]
    Refused { process: ProcessKey },
}

/// What a stand-in says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Registration {
    pub container: ContainerId,
    /// None for the container's init process.
    pub exec: Option<ExecId>,
    /// The network namespace that the stand-in is in is the container's.
    pub own_network: bool,
    /// What is kept of the container; nothing for an exec.
    pub record: Option<OciRecord>,
}

/// What later commands need to know of a container, as it was when it was created.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OciRecord {
    /// The container's host cgroup, which was made for its stand-ins.
    pub cgroup: Option<CgroupPath>,
    pub annotations: HashMap<String, String>,
    pub poststart: Vec<Hook>,
    pub poststop: Vec<Hook>,
}

/// The stand-in's end. Dropping it, or dying, ends the process in the guest.
#[derive(Debug)]
pub struct Lease {
    _connection: UnixStream,
}

impl Lease {
    /// Registers the calling process.
    pub async fn take(
        root: &Path,
        id: &SandboxId,
        registration: &Registration,
    ) -> Result<Self, LeaseError> {
        let failed = |source| LeaseError::Connect {
            id: id.clone(),
            source,
        };
        let directory = open_directory(&root.join(id)).map_err(failed)?;
        // Through the open directory, so that the length of its path does not count.
        let path = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
        let mut connection = UnixStream::connect(path).await.map_err(failed)?;
        let mut line =
            serde_json::to_vec(registration).expect("a registration has only string keys");
        line.push(b'\n');
        let answer = async {
            connection.write_all(&line).await?;
            connection.read_u8().await
        };
        let answer = timeout(HANDSHAKE, answer).await;
        match answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(_) => Ok(Self {
                _connection: connection,
            }),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let (container, exec) = (registration.container.clone(), registration.exec.clone());
                Err(LeaseError::Refused {
                    process: ProcessKey { container, exec },
                })
            }
            Err(error) => Err(failed(error)),
        }
    }
}

fn open_directory(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(path)
}

/// The supervisor's side: takes registrations until it is dropped.
pub async fn serve(listener: UnixListener, sandbox: Sandbox) {
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                tokio::spawn(hold(connection, sandbox.clone()));
            }
            Err(error) => {
                // Out of descriptors, most likely: others have to end first.
                tracing::warn!(%error, "a stand-in could not connect");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn hold(connection: UnixStream, sandbox: Sandbox) {
    let registered = timeout(HANDSHAKE, register(connection, &sandbox)).await;
    let (mut connection, key) = match registered {
        Ok(Ok(registered)) => registered,
        Ok(Err(error)) => return tracing::warn!(%error, "a stand-in was refused"),
        Err(_) => return tracing::warn!("a stand-in connected and said nothing"),
    };
    // It has nothing more to say; what comes is its end.
    let mut byte = [0; 1];
    while connection.read(&mut byte).await.is_ok_and(|read| read > 0) {}
    sandbox.abandoned(key).await;
}

async fn register(
    connection: UnixStream,
    sandbox: &Sandbox,
) -> io::Result<(UnixStream, ProcessKey)> {
    let pid = connection.peer_cred()?.pid();
    let process = ProcessId::of(pid.ok_or_else(|| io::Error::other("the peer has no pid"))?)?;
    let mut reader = BufReader::new(connection.take(MAX_REGISTRATION));
    let mut line = String::new();
    reader.read_line(&mut line).await?;
    let registration: Registration = serde_json::from_str(&line)?;
    let key = ProcessKey {
        container: registration.container.clone(),
        exec: registration.exec.clone(),
    };
    let stand_in = StandIn {
        container: registration.container,
        exec: registration.exec,
        process,
        record: registration.record.unwrap_or_default(),
    };
    let registered = sandbox.register(stand_in, registration.own_network);
    registered.map_err(|error| io::Error::other(chain(&error)))?;
    let mut connection = reader.into_inner().into_inner();
    connection.write_all(b"\n").await?;
    Ok((connection, key))
}
