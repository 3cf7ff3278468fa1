//! Port-forward: connections made to loopback in the pod's namespace reach the loopback of the guest.
//!
//! containerd and CRI-O serve `kubectl port-forward` by connecting to localhost within the pod's network namespace. The
//! pod's programs listen in the guest, so the supervisor takes such connections ([`super::lookup`]) and carries each
//! over a vsock connection of its own to the agent, which connects to the same address in the guest.
//!
//! All of loopback belongs to the guest: a program of the host that listens on it within the pod's namespace is not reached by
//! TCP any more.

use super::lookup::{self, LookupError, Taken};
use super::{NetworkError, in_netns};
use crate::io::Dialer;
use coffer_bpf::Link;
use coffer_proto::error_chain::chain;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Connections of one pod at once; more wait in the kernel. A browser makes six to one server.
const MAX_CONNECTIONS: usize = 256;
/// One read and write in each direction of a connection.
const COPY_BYTES: usize = 16 << 10;
/// Pause after a failed accept, which for a listener means that descriptors or memory are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a sandbox has no port-forward.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error("can't wait for connections")]
    Listener(#[source] io::Error),
}

/// Port-forward of one pod. It ends when this is dropped, with all connections.
#[derive(Debug)]
pub struct PortForward {
    _serving: JoinSet<()>,
    _link: Link,
}

impl PortForward {
    /// Takes connections to loopback in the namespace from now on. Nothing else of a pod depends on that: where this kernel
    /// can't do it, the log says why. Must be called within the runtime.
    pub async fn start(netns: &Path, dialer: Arc<Dialer>) -> Option<Self> {
        Self::try_start(netns, dialer)
            .await
            .inspect_err(|error| {
                tracing::warn!(error = chain(error), "no port-forward into the guest");
            })
            .ok()
    }

    async fn try_start(netns: &Path, dialer: Arc<Dialer>) -> Result<Self, ForwardError> {
        let Taken { listeners, link } =
            in_netns(netns, |netns| lookup::take_loopback(netns.as_fd())).await??;
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut serving = JoinSet::new();
        for listener in listeners {
            let listener = TcpListener::from_std(listener).map_err(ForwardError::Listener)?;
            serving.spawn(serve(listener, dialer.clone(), slots.clone()));
        }
        Ok(Self {
            _serving: serving,
            _link: link,
        })
    }
}

async fn serve(listener: TcpListener, dialer: Arc<Dialer>, slots: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    while let Ok(slot) = slots.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((client, _)) => drop(connections.spawn(carry(client, dialer.clone(), slot))),
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection to forward");
                sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

/// Carries one connection to its end; each direction ends by itself. What fails is a reset for the client.
async fn carry(mut client: TcpStream, dialer: Arc<Dialer>, _slot: OwnedSemaphorePermit) {
    if let Err(error) = connect(&mut client, &dialer).await {
        tracing::debug!(%error, "a forwarded connection broke");
        // Without it, closing would look like an end in order.
        let _ = client.set_zero_linger();
    }
}

async fn connect(client: &mut TcpStream, dialer: &Dialer) -> io::Result<()> {
    client.set_nodelay(true)?;
    let to = client.local_addr()?;
    let Some(mut guest) = dialer.forward(to).await? else {
        return Err(io::ErrorKind::ConnectionRefused.into());
    };
    copy_bidirectional_with_sizes(client, &mut guest, COPY_BYTES, COPY_BYTES).await?;
    Ok(())
}

/// Whether this machine can do it, tried in a namespace that is gone on return.
pub fn probe() -> Result<(), String> {
    let attempt = || {
        let unshared = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
        unshared.map_err(|error| format!("a new network namespace: {}", error.desc()))?;
        let netns = std::fs::File::open("/proc/thread-self/ns/net").map_err(|e| e.to_string())?;
        let taken = lookup::take_loopback(netns.as_fd());
        taken.map(drop).map_err(|error| chain(&error))
    };
    let thread = std::thread::spawn(attempt);
    thread
        .join()
        .unwrap_or_else(|_| Err("the test broke off".into()))
}
