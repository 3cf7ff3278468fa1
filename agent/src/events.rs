//! What the shim wants to hear unasked: it keeps one `NextEvent` call open and gets the next event as its answer.

use crate::container::Container;
use coffer_proto::agent::{Event, OomEvent};
use coffer_proto::ids::ContainerId;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::Notify;

/// Events not yet taken. One that is waiting is not queued again, so containers bound the length, not what they do.
#[derive(Debug, Default)]
pub struct Events {
    /// Containers whose out-of-memory event waits, oldest first.
    out_of_memory: Mutex<VecDeque<ContainerId>>,
    arrived: Notify,
}

impl Events {
    /// The kernel killed a process of `container` because its memory limit was reached.
    pub fn out_of_memory(&self, container: &ContainerId) {
        let mut waiting = self
            .out_of_memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !waiting.contains(container) {
            waiting.push_back(container.clone());
        }
        self.arrived.notify_one();
    }

    /// Waits for the next event.
    pub async fn next(&self) -> Event {
        loop {
            if let Some(container) = self.pop() {
                let mut event = Event::new();
                event.set_oom(OomEvent {
                    container_id: container.into(),
                    ..Default::default()
                });
                return event;
            }
            self.arrived.notified().await;
        }
    }

    fn pop(&self) -> Option<ContainerId> {
        let mut waiting = self
            .out_of_memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let first = waiting.pop_front();
        if !waiting.is_empty() {
            self.arrived.notify_one();
        }
        first
    }
}

/// Tells the kernel's out-of-memory kills in one container, each once.
#[derive(Debug)]
pub struct MemoryWatch {
    id: ContainerId,
    pub container: Arc<Container>,
    events: Arc<Events>,
    /// Kills that were told.
    told: AtomicU64,
}

impl MemoryWatch {
    pub fn new(id: ContainerId, container: Arc<Container>, events: Arc<Events>) -> Self {
        Self {
            id,
            container,
            events,
            told: AtomicU64::new(0),
        }
    }

    /// Counts the kills so far and tells new ones. The count of a cgroup that is gone is what it was last.
    pub fn check(&self) -> u64 {
        let kills = self.container.oom_kills().unwrap_or(0);
        let told = self.told.fetch_max(kills, Ordering::Relaxed);
        if kills > told {
            self.events.out_of_memory(&self.id);
        }
        kills.max(told)
    }

    /// Checks whenever `changes`, an inotify descriptor, has something to read.
    pub async fn follow(self: Arc<Self>, changes: OwnedFd) -> io::Result<()> {
        // Not a pipe, but read and polled like one. What the events say does not matter, the count does.
        let mut changes = pipe::Receiver::from_owned_fd_unchecked(changes)?;
        let mut ignored = [0; 512];
        while changes.read(&mut ignored).await? > 0 {
            self.check();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> ContainerId {
        ContainerId::new(name).unwrap()
    }

    #[tokio::test]
    async fn events_wait_in_order_and_once_each() {
        let events = Events::default();
        for name in ["a", "b", "a", "b"] {
            events.out_of_memory(&id(name));
        }
        assert_eq!(events.next().await.oom().container_id, "a");
        events.out_of_memory(&id("a"));
        assert_eq!(events.next().await.oom().container_id, "b");
        assert_eq!(events.next().await.oom().container_id, "a");
        assert!(futures::FutureExt::now_or_never(events.next()).is_none());
    }
}
