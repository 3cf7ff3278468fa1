//! `containerd-shim-coffer-v2` as containerd runs it, with this test in containerd's place: the words of its command line,
//! a client of its services, and a taker of its events.

use crate::task::Task;
use crate::{Finished, Test, finish_with_input, product};
use async_trait::async_trait;
use containerd_shim_protos::Client;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::events::task as events;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Events, create_events};
use containerd_shim_protos::ttrpc::asynchronous::{Server, TtrpcContext};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// A supervisor that was told to end does so, and events that are on their way arrive.
const ENDS_WITHIN: Duration = Duration::from_secs(10);
const NAME: &str = "containerd-shim-coffer-v2";
/// The same with crash points, which `cargo xtask test` puts beside it.
const CRASHING: &str = "containerd-shim-coffer-v2-crash-points";

/// One sandbox's shim, started in a bundle.
pub struct Shim<'t> {
    test: &'t Test,
    pub namespace: String,
    pub id: String,
    pub bundle: PathBuf,
    address: String,
    events: Option<EventTaker>,
}

impl std::fmt::Debug for Shim<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shim")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// containerd's end of the events. It ends with its runtime.
struct EventTaker {
    runtime: Runtime,
    _server: Server,
    events: Arc<Mutex<Vec<TaskEvent>>>,
}

/// An event as containerd gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEvent {
    pub topic: String,
    pub container: String,
    /// Empty for the container's init.
    pub exec: String,
}

impl TaskEvent {
    fn of(envelope: &Envelope) -> Self {
        let topic = envelope.topic.clone();
        let (container, exec) = match topic.rsplit('/').next().unwrap_or_default() {
            "exec-added" => {
                let event = message::<events::TaskExecAdded>(envelope);
                (event.container_id, event.exec_id)
            }
            "exec-started" => {
                let event = message::<events::TaskExecStarted>(envelope);
                (event.container_id, event.exec_id)
            }
            "exit" => {
                let mut event = message::<events::TaskExit>(envelope);
                // An init process is named by its container.
                if event.id == event.container_id {
                    event.id.clear();
                }
                (event.container_id, event.id)
            }
            "delete" => {
                let event = message::<events::TaskDelete>(envelope);
                (event.container_id, event.id)
            }
            // In all others the container comes first.
            _ => (
                message::<events::TaskPaused>(envelope).container_id,
                String::new(),
            ),
        };
        Self {
            topic,
            container,
            exec,
        }
    }
}

fn message<M: Message>(envelope: &Envelope) -> M {
    M::parse_from_bytes(&envelope.event.value).expect("an event of containerd's")
}

struct Recorder(Arc<Mutex<Vec<TaskEvent>>>);

impl EventTaker {
    fn start(socket: &Path) -> Self {
        let events: Arc<Mutex<Vec<TaskEvent>>> = Arc::default();
        let recorder = Arc::new(Recorder(events.clone()));
        let runtime = Runtime::new().expect("threads can be made");
        let server = runtime.block_on(async {
            let mut server = Server::new()
                .bind(&format!("unix://{}", socket.display()))
                .expect("scratch is ours")
                .register_service(create_events(recorder));
            server.start().await.expect("the events' server starts");
            server
        });
        Self {
            runtime,
            _server: server,
            events,
        }
    }
}

#[async_trait]
impl Events for Recorder {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let event = TaskEvent::of(&request.envelope);
        self.0.lock().expect("no holder panics").push(event);
        Ok(Empty::new())
    }
}

/// `runtimeoptions.v1.Options` with a `config_body`, as containerd's CRI plugin makes it from a handler's options.
pub fn options(body: &str) -> Any {
    let mut value = vec![0x1a];
    let mut length = body.len();
    while length >= 0x80 {
        value.push((length & 0x7f | 0x80) as u8);
        length >>= 7;
    }
    value.push(length as u8);
    value.extend(body.as_bytes());
    Any {
        type_url: "runtimeoptions.v1.Options".into(),
        value,
        ..Default::default()
    }
}

/// Configuration by which a shim uses the test's state root and hypervisor.
pub fn config(test: &Test) -> String {
    format!(
        "root = {:?}\nhypervisor = {:?}\n",
        test.root(),
        test.hypervisor()
    )
}

/// The binary with its words, to be run in a bundle.
fn binary(name: &str, bundle: &Path, args: &[&str], events: &str) -> Command {
    let mut command = Command::new(product(name));
    command
        .args(args)
        .current_dir(bundle)
        .env("TTRPC_ADDRESS", events)
        .stdin(Stdio::null());
    command
}

/// Runs the binary in a bundle with something on its standard input.
pub fn call(bundle: &Path, args: &[&str], events: &str, stdin: Vec<u8>) -> Finished {
    finish_with_input(binary(NAME, bundle, args, events), stdin)
}

impl<'t> Shim<'t> {
    /// Starts one in a bundle, which need not have a config.json, as containerd 1.7 does, and takes its events.
    pub fn start(test: &'t Test, bundle: &Path, id: &str) -> Self {
        Self::start_in(test, bundle, id, &test.id())
    }

    /// The same in a containerd namespace that another shim used.
    pub fn start_in(test: &'t Test, bundle: &Path, id: &str, namespace: &str) -> Self {
        Self::start_as(test, bundle, (namespace, id), None)
    }

    /// One that dies at a named point of its work.
    pub fn start_to_crash(test: &'t Test, bundle: &Path, id: &str, point: &str) -> Self {
        Self::start_as(test, bundle, (&test.id(), id), Some(point))
    }

    fn start_as(
        test: &'t Test,
        bundle: &Path,
        (namespace, id): (&str, &str),
        crash_at: Option<&str>,
    ) -> Self {
        let socket = test.dir().join(format!("events-{}", test.id()));
        let events = EventTaker::start(&socket);
        let stdin = options(&config(test))
            .write_to_bytes()
            .expect("a message in memory");
        let args = [
            "-namespace",
            namespace,
            "-address",
            "/unused",
            "-publish-binary",
            "/unused",
            "-id",
            id,
            "start",
        ];
        let name = if crash_at.is_some() { CRASHING } else { NAME };
        let mut command = binary(name, bundle, &args, socket.to_str().expect("UTF-8"));
        command.envs(crash_at.map(|point| ("COFFER_CRASH_AT", point)));
        let done = finish_with_input(command, stdin);
        assert_eq!(done.code, 0, "start failed: {}", done.stderr);
        let address = done.text().to_owned();
        assert!(
            address.starts_with("unix:///") && done.stderr.is_empty(),
            "{done:?}"
        );
        Self {
            test,
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            address,
            events: Some(events),
        }
    }

    /// A client of the Task service.
    pub fn task(&self) -> Task {
        Task::at(&self.address).expect("the shim serves")
    }

    /// A client of the Sandbox service.
    pub fn sandbox(&self) -> SandboxClient {
        SandboxClient::new(Client::connect(&self.address).expect("the shim serves"))
    }

    /// The events so far.
    pub fn events(&self) -> Vec<TaskEvent> {
        let taker = self.events.as_ref().expect("until it is dropped");
        taker.events.lock().expect("no holder panics").clone()
    }

    /// Topics of the events so far.
    pub fn topics(&self) -> Vec<String> {
        self.events().into_iter().map(|event| event.topic).collect()
    }

    /// `delete`, as containerd calls it when the shim is gone.
    pub fn delete(&self) -> Finished {
        let args = [
            "-namespace",
            &self.namespace,
            "-address",
            "/unused",
            "-publish-binary",
            "/unused",
            "-id",
            &self.id,
            "-bundle",
            self.bundle.to_str().expect("UTF-8"),
            "delete",
        ];
        call(Path::new("/"), &args, "", Vec::new())
    }

    /// The process that serves.
    pub fn pid(&self) -> u32 {
        supervisor_of(&self.test.root().join(&self.namespace).join(&self.id))
    }
}

/// The supervisor's process, from the directory of its sandbox.
pub fn supervisor_of(sandbox: &Path) -> u32 {
    let text = fs::read(sandbox.join("state.json")).expect("the sandbox has a state");
    let state: serde_json::Value = serde_json::from_slice(&text).expect("it is JSON");
    let pid = state["supervisor"]["pid"].as_u64().expect("a pid");
    u32::try_from(pid).expect("a pid")
}

impl Drop for Shim<'_> {
    fn drop(&mut self) {
        // It may have ended before; ttrpc's client would leak the descriptor of a connection that is refused.
        let socket = self.address.trim_start_matches("unix://");
        if UnixStream::connect(socket).is_ok() {
            let _ = Task::at(&self.address).map(|task| task.shutdown(&self.id));
        }
        if let Some(events) = self.events.take() {
            events.runtime.shutdown_timeout(ENDS_WITHIN);
        }
        // One per containerd namespace. It stays if the sandbox left something, which the leak check finds.
        let namespace = self.test.root().join(&self.namespace);
        let deadline = Instant::now() + ENDS_WITHIN;
        while fs::remove_dir(&namespace).is_err() && namespace.exists() && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
