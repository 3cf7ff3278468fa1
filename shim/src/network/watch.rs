//! Notices when somebody rewires the namespace: podman and docker connect a container's network only after `create`, and a
//! plugin may add an interface to a running pod.

use super::{NetworkError, enter};
use futures::StreamExt;
use rtnetlink::{MulticastGroup, new_multicast_connection};
use std::path::Path;
use std::time::Duration;
use tokio::sync::mpsc;

/// Whoever wires a namespace sets link, addresses and routes one after the other; it is looked at when they pause.
const QUIET: Duration = Duration::from_millis(100);
const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
];

/// Gives a message after each burst of changes in the namespace, until the receiver is dropped.
pub fn watch(netns: &Path) -> mpsc::Receiver<()> {
    // One pending message says all: look again.
    let (changed, receiver) = mpsc::channel(1);
    let netns = netns.to_owned();
    std::thread::spawn(move || {
        if let Err(error) = watch_here(&netns, &changed) {
            tracing::warn!(netns = %netns.display(), %error, "changes of the network are not followed");
        }
    });
    receiver
}

fn watch_here(netns: &Path, changed: &mpsc::Sender<()>) -> Result<(), NetworkError> {
    enter(netns)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(NetworkError::Socket)?;
    runtime.block_on(async {
        let (connection, _handle, mut messages) =
            new_multicast_connection(&GROUPS).map_err(NetworkError::Socket)?;
        tokio::spawn(connection);
        loop {
            tokio::select! {
                message = messages.next() => if message.is_none() { return Ok(()) },
                () = changed.closed() => return Ok(()),
            }
            while let Ok(Some(_)) = tokio::time::timeout(QUIET, messages.next()).await {}
            // A full channel holds the same news.
            let _ = changed.try_send(());
        }
    })
}
