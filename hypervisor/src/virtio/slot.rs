//! A device's registers as vCPU threads and the main thread share them.

use super::Interrupt;
use super::mmio::{Transport, register};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// A transport as vCPU threads and the main thread share it.
#[derive(Debug)]
pub struct Slot {
    /// Of the device, for logs and counters ("vsock", "net0").
    pub name: String,
    transport: Mutex<Transport>,
    /// The interrupt registers, which a driver reads and writes at every interrupt, need no lock.
    interrupt: Interrupt,
    /// Told when the main thread has finished a piece of work.
    done: Condvar,
    /// Wakes the main thread for work.
    wake: Arc<EventFd>,
    abandoned: AtomicBool,
}

impl Slot {
    pub fn new(name: impl Into<String>, transport: Transport, wake: Arc<EventFd>) -> Self {
        let interrupt = transport.interrupt().clone();
        let (done, abandoned) = (Condvar::new(), AtomicBool::new(false));
        Self {
            name: name.into(),
            transport: Mutex::new(transport),
            interrupt,
            done,
            wake,
            abandoned,
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, Transport> {
        self.transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// vCPU thread: a read.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            (register::INTERRUPT_STATUS, Ok(word)) => *word = self.interrupt.status().to_le_bytes(),
            _ => self.lock().read(offset, data),
        }
    }

    /// vCPU thread: a write. Returns when its effect is there.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let (register::INTERRUPT_ACK, &[a, b, c, d]) = (offset, data) {
            return self.interrupt.acknowledge(u32::from_le_bytes([a, b, c, d]));
        }
        let mut transport = self.lock();
        transport.write(offset, data);
        if transport.has_work() {
            // A full counter means that the main thread is woken already.
            let _ = self.wake.write(1);
        }
        while transport.has_work() && !self.abandoned.load(Ordering::SeqCst) {
            transport = self
                .done
                .wait(transport)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Main thread: tells the waiting vCPU that its work is done.
    pub fn finished(&self) {
        self.done.notify_all();
    }

    /// Main thread: the VM ends, nobody does work any more.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        let _transport = self.lock();
        self.done.notify_all();
    }
}
