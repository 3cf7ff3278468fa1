//! Task events on their way to containerd.
//!
//! Events are queued in the order in which they happened and forwarded one at a time. containerd may restart or be down at any moment;
//! an event stays at the head of the queue until containerd has taken it, so none is lost and none overtakes another.

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, oneshot};

/// Events that wait while containerd is away. As in containerd's own shims; a pod makes a few per container.
pub const MAX_QUEUED: usize = 2048;
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(2);
/// What a supervisor waits for at its end; containerd gives a shim three seconds to shut down.
pub const FLUSH_DEADLINE: Duration = Duration::from_secs(2);

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// Takes events. Clones share one queue. Without an address, as under CRI-O, events go nowhere.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: Option<mpsc::Sender<Item>>,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Publisher {
    /// `address` is a path of containerd's ttrpc socket, as in TTRPC_ADDRESS. Has to be called within a runtime.
    pub fn new(address: &str, namespace: &str) -> Self {
        if address.is_empty() {
            return Self {
                namespace: namespace.to_owned(),
                queue: None,
            };
        }
        let (queue, items) = mpsc::channel(MAX_QUEUED);
        let address = match address.strip_prefix("unix://") {
            Some(_) => address.to_owned(),
            None => format!("unix://{address}"),
        };
        tokio::spawn(forward_all(address, items));
        Self {
            namespace: namespace.to_owned(),
            queue: Some(queue),
        }
    }

    /// Whether nobody takes events: the caller is CRI-O.
    pub fn is_silent(&self) -> bool {
        self.queue.is_none()
    }

    /// Queues an event. Never waits: a full queue, which means thousands of events nobody took, drops it with a warning.
    pub fn publish<E: MessageFull>(&self, topic: &str, event: &E) {
        let Some(queue) = &self.queue else { return };
        let value = event
            .write_to_bytes()
            .expect("events hold short strings and numbers");
        let any = Any {
            type_url: E::descriptor().full_name().to_owned(),
            value,
            ..Default::default()
        };
        let envelope = Envelope {
            timestamp: Some(now()).into(),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(any).into(),
            ..Default::default()
        };
        if queue.try_send(Item::Event(Box::new(envelope))).is_err() {
            tracing::warn!(
                topic,
                "an event is lost: {MAX_QUEUED} are waiting for containerd"
            );
        }
    }

    /// Waits until everything queued so far was taken, at most [`FLUSH_DEADLINE`].
    pub async fn flush(&self) {
        let Some(queue) = &self.queue else { return };
        let (done, flushed) = oneshot::channel();
        let wait = async {
            if queue.send(Item::Flush(done)).await.is_ok() {
                let _ = flushed.await;
            }
        };
        if tokio::time::timeout(FLUSH_DEADLINE, wait).await.is_err() {
            tracing::warn!("containerd did not take the last events");
        }
    }
}

fn now() -> Timestamp {
    SystemTime::now().into()
}

async fn forward_all(address: String, mut items: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Event(envelope) => forward(&address, &mut client, *envelope).await,
            Item::Flush(done) => drop(done.send(())),
        }
    }
}

/// Tries until containerd has the event.
async fn forward(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest {
        envelope: Some(envelope).into(),
        ..Default::default()
    };
    let mut pause = RETRY_FIRST;
    loop {
        match try_forward(address, client, &request).await {
            Ok(()) => return,
            // It was understood and refused; the same bytes won't do better the next time.
            Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::UNAVAILABLE => {
                tracing::warn!(
                    topic,
                    message = status.message(),
                    "containerd refused an event"
                );
                return;
            }
            Err(error) => tracing::debug!(topic, %error, "containerd did not take an event yet"),
        }
        *client = None;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MOST);
    }
}

async fn try_forward(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => EventsClient::new(Client::connect(address).await?),
    };
    let context = ttrpc::context::with_duration(FORWARD_TIMEOUT);
    connected.forward(context, request).await?;
    *client = Some(connected);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::events::task::{TaskExit, TaskStart};
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::Message;
    use std::path::Path;
    use std::sync::Arc;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    /// An events service that passes on what it gets.
    struct Sink(mpsc::UnboundedSender<Envelope>);

    #[async_trait]
    impl Events for Sink {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::new())
        }
    }

    async fn serve(socket: &Path) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let _ = std::fs::remove_file(socket);
        let (sender, receiver) = mpsc::unbounded_channel();
        let address = format!("unix://{}", socket.display());
        let mut server = Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_events(Arc::new(Sink(sender))));
        server.start().await.unwrap();
        (server, receiver)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn events_survive_a_restart_of_containerd_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("events");
        // containerd is not there yet when the first event happens.
        let publisher = Publisher::new(socket.to_str().unwrap(), "k8s.io");
        publisher.publish(
            "/tasks/start",
            &TaskStart {
                pid: 7,
                ..Default::default()
            },
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (mut server, mut events) = serve(&socket).await;
        let first = events.recv().await.unwrap();
        assert_eq!(
            (first.topic.as_str(), first.namespace.as_str()),
            ("/tasks/start", "k8s.io")
        );
        let any = first.event.unwrap();
        assert_eq!(any.type_url, "containerd.events.TaskStart");
        assert_eq!(TaskStart::parse_from_bytes(&any.value).unwrap().pid, 7);

        server.disconnect().await;
        server.shutdown().await.unwrap();
        drop(server);
        for pid in 0..100 {
            publisher.publish(
                "/tasks/exit",
                &TaskExit {
                    pid,
                    ..Default::default()
                },
            );
        }
        let (mut server, mut events) = serve(&socket).await;
        for pid in 0..100 {
            let event = events.recv().await.unwrap().event.unwrap();
            assert_eq!(TaskExit::parse_from_bytes(&event.value).unwrap().pid, pid);
        }
        publisher.flush().await;
        server.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn without_an_address_nobody_waits() {
        let publisher = Publisher::new("", "default");
        publisher.publish("/tasks/start", &TaskStart::default());
        publisher.flush().await;
    }

    #[tokio::test]
    async fn a_flush_does_not_wait_for_ever() {
        let publisher = Publisher::new("/nowhere/at/all", "default");
        publisher.publish("/tasks/start", &TaskStart::default());
        let started = std::time::Instant::now();
        publisher.flush().await;
        assert!(started.elapsed() < FLUSH_DEADLINE * 2);
    }
}
