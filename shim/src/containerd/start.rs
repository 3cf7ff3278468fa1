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
use super::publisher::Publisher;
use crate::check::{NoHypervisor, choose_hypervisor};
use crate::cleanup::{self, CleanupError};
use crate::config::{Config, ConfigError};
use crate::machine::{SandboxOptions, task_socket};
use crate::sandbox::create::SANDBOX_ANNOTATIONS;
use crate::sandbox::process::VM_DIED;
use crate::state::{ExitRecord, State};
use crate::supervise::{SuperviseError, supervise};
use coffer_proto::ids::{ContainerId, InvalidId, SandboxId};
use containerd_shim_protos::api::DeleteResponse;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{CodedInputStream, Message};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

/// The hidden first word with which this binary starts itself as the supervisor.
pub const SUPERVISE: &str = "supervise";
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
    Config(#[from] ConfigError),
    #[error("the runtime's options can't be parsed")]
    Options(#[source] protobuf::Error),
    #[error(transparent)]
    Hypervisor(#[from] NoHypervisor),
    #[error("can't read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} can't be parsed")]
    Spec {
        path: PathBuf,
        source: serde_json::Error,
    },
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
    namespace: String,
    events_address: String,
}

/// `start`, run in the bundle: gives the bytes to print.
pub fn start(args: &Args, stdin: &[u8], ttrpc_address: &str) -> Result<Vec<u8>, StartError> {
    let input = Input::read(args, stdin, ttrpc_address)?;
    let mut config = config_of(&input)?;
    config.root = namespace_root(&config.root, &args.namespace)?;
    config.debug |= args.debug;
    let bundle = Path::new(".");
    let id = sandbox_of(bundle, &args.id)?;
    let socket = task_socket(&config.root, &id);
    if id.as_str() != args.id && UnixStream::connect(&socket).is_ok() {
        // A container of a pod that runs: its supervisor takes it.
        let address = format!("unix://{}", socket.display());
        write_address(bundle, &address)?;
        return Ok(bootstrap::answer(input.dialect, &address));
    }
    let choice = choose_hypervisor(config.hypervisor, &config.libexec())?;
    let order = Order {
        options: config.sandbox(id, choice.hypervisor),
        namespace: args.namespace.clone(),
        events_address: input.events_address,
    };
    let address = spawn_supervisor(bundle, &order)?;
    write_address(bundle, &address)?;
    Ok(bootstrap::answer(input.dialect, &address))
}

/// The configuration file, or what the handler's options in containerd's own configuration say.
fn config_of(input: &Input) -> Result<Config, StartError> {
    let Some(options) = &input.options else {
        return Ok(Config::load(None)?);
    };
    let RuntimeOptions { path, body } =
        RuntimeOptions::parse(&options.value).map_err(StartError::Options)?;
    if !path.is_empty() {
        return Ok(Config::load(Some(Path::new(&path)))?);
    }
    if !body.is_empty() {
        return Ok(Config::parse(Path::new("containerd's options"), &body)?);
    }
    Ok(Config::load(None)?)
}

/// `runtimeoptions.v1.Options`: type_url = 1, config_path = 2, config_body = 3.
#[derive(Debug, Default, PartialEq, Eq)]
struct RuntimeOptions {
    path: String,
    body: String,
}

impl RuntimeOptions {
    fn parse(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut options = Self::default();
        let mut stream = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = stream.read_raw_tag_or_eof()? {
            match tag {
                0x12 => options.path = stream.read_string()?,
                0x1a => options.body = String::from_utf8_lossy(&stream.read_bytes()?).into_owned(),
                _ => protobuf::rt::skip_field_for_tag(tag, &mut stream)?,
            }
        }
        Ok(options)
    }
}

fn namespace_root(root: &Path, namespace: &str) -> Result<PathBuf, StartError> {
    // A namespace has the form of an id, so it is one path component.
    Ok(root.join(SandboxId::new(namespace)?))
}

/// The sandbox that a container belongs to, by its annotations; its own otherwise.
fn sandbox_of(bundle: &Path, id: &str) -> Result<SandboxId, StartError> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: HashMap<String, String>,
    }
    let path = bundle.join("config.json");
    let text = fs::read(&path).map_err(|source| StartError::Read {
        path: path.clone(),
        source,
    })?;
    let spec: Annotated =
        serde_json::from_slice(&text).map_err(|source| StartError::Spec { path, source })?;
    let named = SANDBOX_ANNOTATIONS
        .iter()
        .find_map(|name| spec.annotations.get(*name));
    Ok(SandboxId::new(named.map_or(id, String::as_str))?)
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
    let path = bundle.join("address");
    fs::write(&path, address).map_err(|source| StartError::Write { path, source })
}

/// The supervisor itself: reads its [`Order`] from standard input and serves until its sandbox is deleted.
pub async fn serve() -> Result<(), StartError> {
    let result = async {
        let order: Order = serde_json::from_reader(io::stdin()).map_err(|source| {
            let path = PathBuf::from("standard input");
            StartError::Spec { path, source }
        })?;
        let publisher = Publisher::new(&order.events_address, &order.namespace);
        Ok(supervise(order.options, Some(Stdout), Some(publisher)).await?)
    };
    let result: Result<(), StartError> = result.await;
    if let Err(error) = &result {
        let _ = writeln!(io::stdout(), "{}", crate::vmm::chain(error));
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
    let config = Config::load(None)?;
    let root = namespace_root(&config.root, &args.namespace)?;
    let bundle = if args.bundle.is_empty() {
        Path::new(".")
    } else {
        Path::new(&args.bundle)
    };
    let id = sandbox_of(bundle, &args.id).or_else(|_| SandboxId::new(args.id.clone()))?;
    let state = State::load(&root, &id).map_err(CleanupError::from)?;
    let alive = UnixStream::connect(task_socket(&root, &id)).is_ok();
    if !alive {
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
    fn options_are_a_path_or_a_body() {
        let options = |bytes: &[u8]| RuntimeOptions::parse(bytes).unwrap();
        assert_eq!(options(b"\x0a\x01t\x12\x02/c").path, "/c");
        assert_eq!(options(b"\x1a\x09vcpus = 2").body, "vcpus = 2");
        assert!(RuntimeOptions::parse(b"\x12\xff").is_err());
    }

    #[test]
    fn a_container_finds_its_pod_by_either_annotation() {
        let bundle = tempfile::tempdir().unwrap();
        let of = |json: &str| {
            fs::write(bundle.path().join("config.json"), json).unwrap();
            sandbox_of(bundle.path(), "own").map(String::from)
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
    }
}
