//! The supervisor's life: from an empty directory to an empty directory.
//!
//! A signal can end it while an engine still knows containers that `coffer delete` has to take away. Of such a sandbox the state stays until then, as if the
//! supervisor had died; nothing else does.

use crate::cleanup::{self, CleanupError};
use crate::containerd::publisher::{FLUSH_DEADLINE, Publisher};
use crate::lease;
use crate::machine::child::ProcessId;
use crate::machine::{SandboxOptions, task_socket};
use crate::oom_score;
use crate::sandbox::Sandbox;
use crate::state::{State, StateError, StateFile};
use crate::task::TaskService;
use crate::task::events::publish;
use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::time::{interval, timeout};

/// A supervisor without a container ends after this: its caller died before it could say so.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
const IDLE_CHECK: Duration = Duration::from_secs(5);
/// For the events of the last container to reach containerd.
const EVENTS_LEFT: Duration = FLUSH_DEADLINE;
/// Longest path of a unix socket, without the final NUL (`sun_path` of unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Why there is no supervisor.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    #[error("sandbox {id} exists already in {root}")]
    Exists { id: String, root: PathBuf },
    #[error("can't create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("the socket path {path} is longer than {MAX_SOCKET_PATH} bytes; choose a shorter root")]
    SocketPath { path: PathBuf },
    #[error("can't serve on {path}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("can't serve the Task API")]
    Serve(#[source] ttrpc::Error),
    #[error("can't read the own process's start time")]
    Process(#[source] io::Error),
    #[error("can't wait for signals")]
    Signals(#[source] io::Error),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("can't remove the sandbox")]
    Cleanup(#[from] CleanupError),
}

/// What ended a supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Its callers have deleted all they had made, or made nothing.
    InOrder,
    /// Somebody ends the service, or the host goes down.
    Signal,
}

/// Serves one sandbox until it is deleted, and leaves nothing of it.
///
/// When callers can connect, the socket's address (`unix://…` and a newline) is written to `ready`, which is then closed. `publisher`
/// is None where nobody wants events.
pub async fn supervise(
    options: SandboxOptions,
    ready: Option<impl Write>,
    publisher: Option<Publisher>,
) -> Result<(), SuperviseError> {
    let (root, id) = (options.root.clone(), options.id.clone());
    oom_score::spare_this_process();
    let state = claim(&options)?;
    let served = serve(options, state, ready, publisher).await;
    let awaited =
        || State::load(&root, &id).is_ok_and(|left| left.is_some_and(|state| state.is_awaited()));
    if matches!(served, Ok(End::Signal)) && awaited() {
        return Ok(());
    }
    let cleaned = tokio::task::spawn_blocking(move || cleanup::cleanup(&root, &id)).await;
    served?;
    Ok(cleaned.unwrap_or(Ok(()))?)
}

/// Takes the sandbox's name by making its directory.
fn claim(options: &SandboxOptions) -> Result<StateFile, SuperviseError> {
    let (root, dir) = (&options.root, options.dir());
    let create = |path: &PathBuf, source| SuperviseError::Create {
        path: path.clone(),
        source,
    };
    // The longer name of the two sockets.
    let socket = dir.join(lease::SOCKET);
    if socket.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(SuperviseError::SocketPath { path: socket });
    }
    let supervisor = ProcessId::current().map_err(SuperviseError::Process)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(root)
        .map_err(|source| create(root, source))?;
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(SuperviseError::Exists {
                id: options.id.to_string(),
                root: root.clone(),
            });
        }
        made => made.map_err(|source| create(&dir, source))?,
    }
    StateFile::create(State::new(options.clone(), supervisor)).map_err(|error| {
        // Nothing else is in there yet.
        let _ = fs::remove_dir_all(&dir);
        error.into()
    })
}

async fn serve(
    options: SandboxOptions,
    state: StateFile,
    ready: Option<impl Write>,
    publisher: Option<Publisher>,
) -> Result<End, SuperviseError> {
    let path = task_socket(&options.root, &options.id);
    let options_dir = options.dir();
    let listener = UnixListener::bind(&path).map_err(|source| SuperviseError::Socket {
        path: path.clone(),
        source,
    })?;
    let stand_ins = options_dir.join(lease::SOCKET);
    let stand_ins = UnixListener::bind(&stand_ins).map_err(|source| SuperviseError::Socket {
        path: stand_ins,
        source,
    })?;
    let mut terminate = signal(SignalKind::terminate()).map_err(SuperviseError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(SuperviseError::Signals)?;

    let no_events = publisher.as_ref().is_some_and(Publisher::is_silent);
    let (events, mut source) = mpsc::unbounded_channel();
    let publishing = tokio::spawn(async move {
        // Without a publisher the source closes here, and events go nowhere.
        let Some(publisher) = publisher else { return };
        while let Some(event) = source.recv().await {
            publish(&publisher, event);
        }
        publisher.flush().await;
    });
    let sandbox = Sandbox::new(options, state, events);
    let leases = tokio::spawn(lease::serve(stand_ins, sandbox.clone()));
    let end = Arc::new(Notify::new());
    let services = TaskService::new(sandbox.clone(), no_events, end.clone()).services();
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener.into())
        .register_service(services);
    server.start().await.map_err(SuperviseError::Serve)?;
    if let Some(mut ready) = ready {
        // A caller that does not read it any more is gone; the idle limit ends us then.
        let _ = writeln!(ready, "unix://{}", path.display());
    }

    let mut idle_check = interval(IDLE_CHECK);
    let ended = loop {
        tokio::select! {
            () = end.notified() => break End::InOrder,
            _ = terminate.recv() => break End::Signal,
            _ = interrupt.recv() => break End::Signal,
            _ = idle_check.tick() => {
                if sandbox.idle().await.is_some_and(|idle| idle > IDLE_LIMIT) {
                    tracing::info!("no container for {IDLE_LIMIT:?}");
                    sandbox.stop("it had no container").await;
                    break End::InOrder;
                }
            }
        }
    };
    if ended == End::Signal {
        sandbox.stop("the supervisor was told to end").await;
    }
    if let Err(error) = server.shutdown().await {
        tracing::debug!(%error, "the Task API did not close in order");
    }
    leases.abort();
    drop((server, sandbox));
    let _ = timeout(EVENTS_LEFT, publishing).await;
    Ok(ended)
}
