//! A snapshotter of our own, which containerd asks over a socket: the roots that it hands out are of a type that nobody knows.
//!
//! containerd unpacks the images itself, so while it does, the roots are plain directories.

use super::grpc::{self, Schema};
use crate::host;
use anyhow::Result;
use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::{self, JoinHandle};
use tokio::sync::oneshot;

/// The type of mount that this one alone knows.
pub const UNKNOWN_TYPE: &str = "cofferfs";

static SCHEMA: LazyLock<Schema> =
    LazyLock::new(|| Schema::new(include_bytes!(concat!(env!("OUT_DIR"), "/snapshots.bin"))));

/// gRPC's NOT_FOUND.
const NOT_FOUND: u32 = 5;
/// gRPC's INTERNAL.
const INTERNAL: u32 = 13;
/// What containerd calls a snapshot that it unpacks a layer into begins with this, after its namespace.
const UNPACKED: &str = "extract-";

/// Serves for as long as it lives.
#[derive(Debug)]
pub struct Snapshotter {
    stop: Option<oneshot::Sender<()>>,
    server: Option<JoinHandle<()>>,
}

impl Snapshotter {
    /// Listens on `socket`, and keeps what it has in `dir`.
    pub fn start(socket: &Path, dir: PathBuf) -> Result<Self> {
        fs::create_dir(&dir)?;
        let listener = UnixListener::bind(socket)?;
        listener.set_nonblocking(true)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let snapshots = Arc::new(Mutex::new(Snapshots {
            dir,
            made: 0,
            known: BTreeMap::new(),
        }));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let server = thread::spawn(move || {
            runtime.block_on(async {
                let serving = serve(listener, snapshots);
                tokio::select! { _ = stopped => (), done = serving => done.expect("the snapshotter serves") }
            });
        });
        Ok(Self {
            stop: Some(stop),
            server: Some(server),
        })
    }
}

impl Drop for Snapshotter {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.server.take().map(JoinHandle::join);
    }
}

type Shared = Arc<Mutex<Snapshots>>;

async fn serve(listener: UnixListener, snapshots: Shared) -> Result<()> {
    let listener = tokio::net::UnixListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let mut connection = h2::server::handshake(stream).await?;
        let snapshots = snapshots.clone();
        tokio::spawn(async move {
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(serve_call(request, respond, snapshots.clone()));
            }
        });
    }
}

async fn serve_call(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    snapshots: Shared,
) -> Result<()> {
    let (head, mut body) = request.into_parts();
    let message = grpc::unframe(grpc::read(&mut body).await?)?;
    let method = head.uri.path().rsplit('/').next().unwrap_or_default();
    let answer = {
        let mut snapshots = snapshots.lock().expect("no panic under the lock");
        snapshots.call(method, &message)
    };
    let response = Response::builder().header("content-type", "application/grpc");
    let mut stream = respond.send_response(response.body(())?, false)?;
    let mut trailers = HeaderMap::new();
    match answer {
        Ok(message) => {
            stream.send_data(grpc::frame(&message)?.into(), false)?;
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
        }
        Err(error) => {
            let known = error.downcast_ref::<NoSnapshot>();
            let code = known.map_or(INTERNAL, |_| NOT_FOUND);
            trailers.insert("grpc-status", code.into());
            trailers.insert(
                "grpc-message",
                HeaderValue::from_str(&format!("{error:#}"))?,
            );
        }
    }
    Ok(stream.send_trailers(trailers)?)
}

#[derive(Debug, thiserror::Error)]
#[error("there is no snapshot {0}")]
struct NoSnapshot(String);

#[derive(Debug)]
struct Snapshot {
    parent: String,
    /// A name of the service's enumeration.
    kind: &'static str,
    root: PathBuf,
}

#[derive(Debug)]
struct Snapshots {
    dir: PathBuf,
    made: usize,
    known: BTreeMap<String, Snapshot>,
}

impl Snapshots {
    fn call(&mut self, method: &str, message: &[u8]) -> Result<Vec<u8>> {
        let (_, descriptor) = SCHEMA.find(method)?;
        let request = grpc::decode(&descriptor.input_type(), message)?;
        let answer = self.answer(method, &request)?;
        grpc::encode(&descriptor.output_type(), &answer)
    }

    fn answer(&mut self, method: &str, request: &Value) -> Result<Value> {
        let text = |field: &str| request[field].as_str().unwrap_or_default().to_owned();
        let key = text("key");
        match method {
            "Prepare" => self.prepare(&key, text("parent"), "ACTIVE")?,
            "View" => self.prepare(&key, text("parent"), "VIEW")?,
            "Commit" => {
                let active = self.known.remove(&key).ok_or(NoSnapshot(key))?;
                let kind = "COMMITTED";
                self.known.insert(text("name"), Snapshot { kind, ..active });
                return Ok(json!({}));
            }
            "Remove" => {
                let gone = self.known.remove(&key).ok_or(NoSnapshot(key))?;
                fs::remove_dir_all(gone.root)?;
                return Ok(json!({}));
            }
            "List" => {
                let all = self.known.iter().map(|(name, known)| known.info(name));
                return Ok(json!({"info": all.collect::<Vec<_>>()}));
            }
            "Cleanup" => return Ok(json!({})),
            _ => {}
        }
        let known = self.known.get(&key).ok_or(NoSnapshot(key.clone()))?;
        Ok(match method {
            "Stat" => json!({"info": known.info(&key)}),
            "Usage" => json!({"size": 4096, "inodes": 1}),
            _ => json!({"mounts": [known.mount(&key)]}),
        })
    }

    fn prepare(&mut self, key: &str, parent: String, kind: &'static str) -> Result<()> {
        self.made += 1;
        let root = self.dir.join(self.made.to_string());
        fs::create_dir(&root)?;
        if !parent.is_empty() {
            let below = self.known.get(&parent);
            let below = below
                .ok_or_else(|| NoSnapshot(parent.clone()))?
                .root
                .join(".");
            let (from, to) = (below.display().to_string(), root.display().to_string());
            host("cp", &["-a", &from, &to])?;
        }
        let snapshot = Snapshot { parent, kind, root };
        self.known.insert(key.to_owned(), snapshot);
        Ok(())
    }
}

impl Snapshot {
    fn info(&self, name: &str) -> Value {
        json!({"name": name, "parent": self.parent, "kind": self.kind})
    }

    fn mount(&self, key: &str) -> Value {
        let plain = key.contains(UNPACKED);
        let kind = if plain { "bind" } else { UNKNOWN_TYPE };
        json!({"type": kind, "source": self.root, "options": ["rbind", "rw"]})
    }
}
