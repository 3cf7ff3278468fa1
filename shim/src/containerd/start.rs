//! `start` and `delete`: a supervisor for a new pod, or the address of the one it has; and what remains after one died.
//!
//! ```text
//! containerd ── start ──► this binary ── spawns ──► this binary, supervising, in a session of its own
//!                              │  ── stdin ──►   Order as JSON
//!                              │  ◄── stdout ──  the socket's address
//!            ◄── address ──────┘                 its log goes to the bundle's `log` fifo, which containerd reads
//! ```
//!
//! Sandboxes of one containerd namespace have a state root of their own, so ids need to be unique only there.

use super::bootstrap::{self, Args, BootstrapError, Input};
use super::options::{self, OptionsError};
use super::publisher::Publisher;
use crate::check::{NoHypervisor, choose_hypervisor};
use crate::cleanup::{self, CleanupError};
use crate::config::{Config, ConfigError};
use crate::machine::{SandboxOptions, task_socket};
use crate::network::{NamespaceId, NetworkError};
use crate::sandbox::create::SANDBOX_ANNOTATIONS;
use crate::sandbox::process::VM_DIED;
use crate::state::{self, ExitRecord, State, StateError};
use crate::supervise::{SuperviseError, supervise};
use coffer_proto::ids::{ContainerId, InvalidId, SandboxId};
use containerd_shim_protos::api::{ConnectRequest, DeleteResponse};
use containerd_shim_protos::{Client, TaskClient};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};
use protobuf::Message;
use protobuf::well_known_types::timestamp::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The hidden first word with which this binary starts itself as the supervisor.
pub const SUPERVISE: &str = "supervise";
/// The file of the bundle with the supervisor's address.
const ADDRESS: &str = "address";
/// For an answer that needs no guest; containerd gives `delete` five seconds.
const ANSWER: Duration = Duration::from_secs(2);
/// Longest answer of a supervisor that could not start.
const MAX_ANSWER: u64 = 16 << 10;

/// Why containerd did not get what it asked for.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    #[error(transparent)]
    Id(#[from] InvalidId),
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Hypervisor(#[from] NoHypervisor),
    #[error("can't read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} can't be parsed")]
    Spec {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("can't start the supervisor")]
    Spawn(#[source] io::Error),
    #[error("the supervisor did not start: {0}")]
    Supervisor(String),
    #[error("can't write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Supervise(#[from] SuperviseError),
    #[error(transparent)]
    Cleanup(#[from] CleanupError),
}

/// What the supervisor is told by the process that starts it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    options: SandboxOptions,
    events_address: String,
}

/// `start`, run in the bundle: gives the bytes to print.
pub fn start(args: &Args, stdin: &[u8], ttrpc_address: &str) -> Result<Vec<u8>, StartError> {
    let input = Input::read(args, stdin, ttrpc_address)?;
    let bundle = Path::new(".");
    if let Some(address) = options::sandbox_address(input.options.as_ref()) {
        write_address(bundle, &address)?;
        return Ok(bootstrap::answer(input.dialect, &address));
    }
    let mut config = options::config(input.options.as_ref())?;
    config.root = namespace_root(&config.root, &args.namespace)?;
    config.debug |= args.debug || input.debug;
    let id = sandbox_of(&config.root, bundle, &args.id)?;
    let socket = task_socket(&config.root, &id);
    if id.as_str() != args.id && UnixStream::connect(&socket).is_ok() {
        // A container of a pod that runs: its supervisor takes it.
        let address = format!("unix://{}", socket.display());
        write_address(bundle, &address)?;
        return Ok(bootstrap::answer(input.dialect, &address));
    }
    cleanup_after_a_crash(&config.root, &id, &socket)?;
    let choice = choose_hypervisor(config.hypervisor, &config.libexec())?;
    let order = Order {
        options: SandboxOptions {
            namespace: args.namespace.clone(),
            joins_cgroup: true,
            ..config.sandbox(id, choice.hypervisor)
        },
        events_address: input.events_address,
    };
    let address = spawn_supervisor(bundle, &order)?;
    write_address(bundle, &address)?;
    Ok(bootstrap::answer(input.dialect, &address))
}

fn namespace_root(root: &Path, namespace: &str) -> Result<PathBuf, StartError> {
    // A namespace has the form of an id, so it is one path component.
    Ok(root.join(SandboxId::new(namespace)?))
}

/// The part of a spec that says where a container belongs.
#[derive(Deserialize)]
struct Belongings {
    #[serde(default)]
    annotations: HashMap<String, String>,
    #[serde(default)]
    linux: Linux,
}

#[derive(Default, Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Vec<LinuxNamespace>,
}

/// The sandbox that a container belongs to: its pod by its annotations; that of the container whose network it joins (docker's
/// `--network container:NAME`); its own otherwise.
fn sandbox_of(root: &Path, bundle: &Path, id: &str) -> Result<SandboxId, StartError> {
    let path = bundle.join("config.json");
    let text = match fs::read(&path) {
        Ok(text) => text,
        // A sandbox of the Sandbox API: it is described later, and by something else.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(SandboxId::new(id)?),
        Err(source) => return Err(StartError::Read { path, source }),
    };
    let spec: Belongings =
        serde_json::from_slice(&text).map_err(|source| StartError::Spec { path, source })?;
    let mut names = SANDBOX_ANNOTATIONS.iter();
    if let Some(named) = names.find_map(|name| spec.annotations.get(*name)) {
        return Ok(SandboxId::new(named)?);
    }
    let mut namespaces = spec.linux.namespaces.iter();
    let network = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    let path = network.and_then(|network| network.path().as_deref());
    let joined = match path.filter(|path| !path.as_os_str().is_empty()) {
        Some(path) => state::sandbox_in(root, NamespaceId::of_pod(path)?)?,
        None => None,
    };
    Ok(joined.map_or_else(|| SandboxId::new(id), Ok)?)
}

/// A supervisor of this name that was killed, and that nobody deleted, is no reason to fail.
fn cleanup_after_a_crash(root: &Path, id: &SandboxId, socket: &Path) -> Result<(), StartError> {
    let Some(state) = State::load(root, id).map_err(CleanupError::from)? else {
        return Ok(());
    };
    if state.supervisor.is_alive() && answers(socket) {
        return Ok(());
    }
    Ok(cleanup::cleanup(root, id)?)
}

/// Whether a supervisor serves there. One that was killed a moment ago still accepts connections until the kernel has
/// taken it apart, but it breaks them; one that only takes its time counts as alive, for its pod may be.
fn answers(socket: &Path) -> bool {
    if UnixStream::connect(socket).is_err() {
        return false;
    }
    let Ok(client) = Client::connect(&format!("unix://{}", socket.display())) else {
        return false;
    };
    let deadline = i64::try_from(ANSWER.as_nanos()).unwrap_or(i64::MAX);
    let (since, nobody) = (Instant::now(), ConnectRequest::new());
    match TaskClient::new(client).connect(ttrpc::context::with_timeout(deadline), &nobody) {
        // A refusal is an answer too.
        Ok(_) | Err(ttrpc::Error::RpcStatus(_)) => true,
        Err(_) => since.elapsed() >= ANSWER,
    }
}

fn spawn_supervisor(bundle: &Path, order: &Order) -> Result<String, StartError> {
    let program = std::env::current_exe().map_err(StartError::Spawn)?;
    let mut command = Command::new(program);
    command.arg(SUPERVISE).current_dir("/");
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log_of(bundle));
    let mut child = command.spawn().map_err(StartError::Spawn)?;
    let json = serde_json::to_vec(order).expect("an order has only string keys");
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&json).map_err(StartError::Spawn)?;
    }
    let mut answer = String::new();
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout.take(MAX_ANSWER));
        lines.read_line(&mut answer).map_err(StartError::Spawn)?;
    }
    let answer = answer.trim_end();
    if answer.starts_with("unix://") {
        return Ok(answer.to_owned());
    }
    // It has ended; nobody else would reap it.
    let _ = child.wait();
    Err(StartError::Supervisor(answer.to_owned()))
}

/// The fifo from which containerd copies a shim's log. Opened for both ways, so that neither side's absence matters.
fn log_of(bundle: &Path) -> Stdio {
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"));
    fifo.map_or_else(|_| Stdio::null(), Stdio::from)
}

/// CRI-O and containerd 1.x look for the address here after a restart.
fn write_address(bundle: &Path, address: &str) -> Result<(), StartError> {
    let path = bundle.join(ADDRESS);
    fs::write(&path, address).map_err(|source| StartError::Write { path, source })
}

/// The state root and the sandbox that `start` chose for this bundle: `delete` is not told the handler's options.
fn sandbox_at(bundle: &Path) -> Option<(PathBuf, SandboxId)> {
    let address = fs::read_to_string(bundle.join(ADDRESS)).ok()?;
    let dir = Path::new(address.strip_prefix("unix://")?).parent()?;
    let id = SandboxId::new(dir.file_name()?.to_str()?).ok()?;
    Some((dir.parent()?.to_owned(), id))
}

/// The supervisor itself: reads its [`Order`] from standard input and serves until its sandbox is deleted.
pub async fn serve() -> Result<(), StartError> {
    let result = async {
        let order: Order = serde_json::from_reader(io::stdin()).map_err(|source| {
            let path = PathBuf::from("standard input");
            StartError::Spec { path, source }
        })?;
        let publisher = Publisher::new(&order.events_address, &order.options.namespace);
        Ok(supervise(order.options, Some(Stdout), Some(publisher)).await?)
    };
    let result: Result<(), StartError> = result.await;
    if let Err(error) = &result {
        let _ = writeln!(io::stdout(), "{}", coffer_proto::error_chain::chain(error));
    }
    result
}

/// Standard output until the address is written; then /dev/null, so that the reader sees its end.
#[derive(Debug)]
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stdout().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

impl Drop for Stdout {
    fn drop(&mut self) {
        let _ = io::stdout().flush();
        if let Ok(null) = File::options().write(true).open("/dev/null") {
            let _ = nix::unistd::dup2_stdout(null);
        }
    }
}

/// `delete`: the supervisor is gone or never was. Cleans up and gives the DeleteResponse to print.
pub fn delete(args: &Args) -> Result<Vec<u8>, StartError> {
    let bundle = if args.bundle.is_empty() {
        Path::new(".")
    } else {
        Path::new(&args.bundle)
    };
    let (root, id) = match sandbox_at(bundle) {
        Some(known) => known,
        None => {
            let root = namespace_root(&Config::load(None)?.root, &args.namespace)?;
            let id = sandbox_of(&root, bundle, &args.id);
            let id = id.or_else(|_| SandboxId::new(args.id.clone()))?;
            (root, id)
        }
    };
    let state = State::load(&root, &id).map_err(CleanupError::from)?;
    if !answers(&task_socket(&root, &id)) {
        cleanup::cleanup(&root, &id)?;
    }
    cleanup::unmount(&bundle.join("rootfs"))?;
    let container = ContainerId::new(args.id.clone())?;
    let pid = state.as_ref().and_then(|state| state.hypervisor);
    let exit = state.and_then(|mut state| state.containers.remove(&container)?.exit);
    let exit = exit.unwrap_or_else(|| ExitRecord {
        status: VM_DIED,
        at: SystemTime::now(),
        reason: None,
        oom_killed: false,
    });
    let response = DeleteResponse {
        pid: pid.map_or(0, |process| process.pid.unsigned_abs()),
        exit_status: exit.status,
        exited_at: Some(timestamp(exit.at)).into(),
        ..Default::default()
    };
    Ok(response
        .write_to_bytes()
        .expect("a message in memory can be written"))
}

fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().cast_signed(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_finds_its_pod_by_either_annotation() {
        let bundle = tempfile::tempdir().unwrap();
        let of = |json: &str| {
            fs::write(bundle.path().join("config.json"), json).unwrap();
            sandbox_of(bundle.path(), bundle.path(), "own").map(String::from)
        };
        assert_eq!(of("{}").unwrap(), "own");
        assert_eq!(
            of(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#).unwrap(),
            "pod"
        );
        assert_eq!(
            of(r#"{"annotations":{"io.kubernetes.cri-o.SandboxID":"pod"}}"#).unwrap(),
            "pod"
        );
        assert!(of(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"../x"}}"#).is_err());
        let hosts = r#"{"linux":{"namespaces":[{"type":"network","path":"/proc/self/ns/net"}]}}"#;
        assert!(of(hosts).unwrap_err().to_string().contains("is the host's"));
    }

    #[test]
    fn a_sandbox_of_the_sandbox_api_has_no_spec() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(
            String::from(sandbox_of(bundle.path(), bundle.path(), "own").unwrap()),
            "own"
        );
    }

    #[test]
    fn delete_finds_the_root_that_start_used() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(sandbox_at(bundle.path()), None);
        write_address(bundle.path(), "unix:///other/ns/pod/task.sock").unwrap();
        let pod = SandboxId::new("pod").unwrap();
        assert_eq!(
            sandbox_at(bundle.path()),
            Some((PathBuf::from("/other/ns"), pod))
        );
    }
}
