//! What vCPU threads tell the main loop.

use coffer_proto::vmm::Exit;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// What a vCPU's thread tells the main loop.
#[derive(Debug)]
pub enum Notice {
    /// The thread stands still since it saw this wish.
    Paused { vcpu: u8, wish: u64 },
    /// The guest pulsed the reset line.
    Reset,
    /// The guest wrote the boot timer.
    Phase { phase: u32, since_start: Duration },
    /// This vCPU will never run again.
    Finished { vcpu: u8, exit: Option<Exit> },
}

/// The way of notices to the main loop: a queue, and an event that wakes the loop.
#[derive(Debug, Clone)]
pub struct Notices {
    queue: Sender<Notice>,
    wake: Arc<EventFd>,
}

impl Notices {
    pub fn new(queue: Sender<Notice>, wake: Arc<EventFd>) -> Self {
        Self { queue, wake }
    }

    pub fn send(&self, notice: Notice) {
        // The receiver lives as long as the process; a full event counter means that the loop is woken already.
        let _ = self.queue.send(notice);
        let _ = self.wake.write(1);
    }
}
