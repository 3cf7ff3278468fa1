//! The thread that does a disk's file I/O, so that the event loop never waits for storage.

use super::request::{Request, Status};
use super::{BlockError, HEADER, ID_BYTES};
use crate::seccomp::{self, ThreadClass};
use crate::virtio::Memory;
use crate::virtio::queue::Chain;
use coffer_proto::error_chain::chain;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// One request with all that it needs; the worker owns it until it reports [`Done`].
#[derive(Debug)]
pub(super) struct Job {
    pub(super) chain: Chain,
    pub(super) request: Request,
    pub(super) memory: Memory,
    /// The disk as it was when the request came; a slot that gets another file meanwhile finishes here.
    pub(super) file: Arc<File>,
    pub(super) id: [u8; ID_BYTES],
}

/// A request is finished, its status written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) head: u16,
    /// Bytes written into the chain, status included.
    pub(super) written: u32,
    pub(super) status: Status,
}

enum Message {
    Job(Job),
    /// Report when everything before this is gone.
    Barrier,
}

enum Report {
    Done(Done),
    Barrier,
}

/// The main thread's handle.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: SyncSender<Message>,
    reports: Receiver<Report>,
    /// Readable when reports wait.
    ready: EventFd,
    /// Set while a reset waits: queued requests are dropped undone.
    cancelled: Arc<AtomicBool>,
}

impl Worker {
    /// Starts the thread. It runs until the handle is dropped. `limit`: most jobs at a time.
    pub(super) fn start(limit: usize) -> Result<Self, BlockError> {
        let ready = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BlockError::Worker)?;
        let signal = ready.try_clone().map_err(BlockError::Worker)?;
        let (jobs, inbox) = mpsc::sync_channel(limit + 1);
        let (outbox, reports) = mpsc::sync_channel(limit + 1);
        let cancelled = Arc::new(AtomicBool::new(false));
        let stop = cancelled.clone();
        std::thread::Builder::new()
            .name("disk".into())
            .spawn(move || match seccomp::enter(ThreadClass::Disk) {
                Ok(()) => serve(&inbox, &outbox, &signal, &stop),
                // The first request finds the worker gone, and that ends the VM.
                Err(error) => crate::report(&chain(&error)),
            })
            .map_err(BlockError::Worker)?;
        Ok(Self {
            jobs,
            reports,
            ready,
            cancelled,
        })
    }

    /// Hands a request over. Never blocks while at most `limit` are in flight.
    pub(super) fn submit(&self, job: Job) -> Result<(), BlockError> {
        self.jobs
            .send(Message::Job(job))
            .map_err(|_| BlockError::WorkerGone)
    }

    /// The file that is readable when [`Worker::finished`] has something.
    pub(super) fn ready_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }

    /// Takes the next finished request, if there is one.
    pub(super) fn finished(&self) -> Option<Done> {
        match self.reports.try_recv() {
            Ok(Report::Done(done)) => Some(done),
            _ => None,
        }
    }

    /// Clears the ready event. Call before taking reports.
    pub(super) fn acknowledge(&self) {
        // EAGAIN: nothing was pending.
        let _ = self.ready.read();
    }

    /// Drops queued requests and waits for the one in progress: afterwards nothing touches guest memory.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        if self.jobs.send(Message::Barrier).is_ok() {
            while let Ok(Report::Done(_)) = self.reports.recv() {}
        }
        self.cancelled.store(false, Ordering::SeqCst);
        self.acknowledge();
    }
}

fn serve(
    inbox: &Receiver<Message>,
    outbox: &SyncSender<Report>,
    signal: &EventFd,
    cancelled: &AtomicBool,
) {
    while let Ok(message) = inbox.recv() {
        let report = match message {
            Message::Job(_) if cancelled.load(Ordering::SeqCst) => continue,
            Message::Job(job) => Report::Done(job.run()),
            Message::Barrier => Report::Barrier,
        };
        if outbox.send(report).is_err() {
            return;
        }
        // EAGAIN: the counter is full, so the event is pending.
        let _ = signal.write(1);
    }
}

impl Job {
    fn run(self) -> Done {
        let (status, written) = match self.perform() {
            Ok(written) => (Status::Ok, written),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                (Status::Unsupported, 0)
            }
            Err(_) => (Status::IoError, 0),
        };
        finish(&self.chain, &self.memory, status, written)
    }

    /// Does the I/O; gives the bytes written into the chain.
    fn perform(&self) -> io::Result<usize> {
        match self.request {
            Request::Read { offset, length } => {
                transfer(offset, length, |at, done| {
                    let target = self
                        .chain
                        .writable_slices(&self.memory, done, length - done);
                    read_at(&self.file, &target, at)
                })?;
                Ok(length)
            }
            Request::Write { offset, length } => {
                transfer(offset, length, |at, done| {
                    let source =
                        self.chain
                            .readable_slices(&self.memory, HEADER + done, length - done);
                    write_at(&self.file, &source, at)
                })?;
                Ok(0)
            }
            Request::Flush => self.file.sync_data().map(|()| 0),
            Request::Zero {
                offset,
                length,
                unmap,
            } => zero(&self.file, offset, length, unmap).map(|()| 0),
            Request::Id => {
                self.chain
                    .write(&self.memory, 0, &self.id)
                    .map_err(io::Error::other)?;
                Ok(ID_BYTES)
            }
        }
    }
}

/// Writes the status byte and says how much of the chain was written.
pub(super) fn finish(chain: &Chain, memory: &Memory, status: Status, data: usize) -> Done {
    let last = chain.writable_len() - 1;
    // The chain was checked to be in RAM and to hold the status byte.
    let _ = chain.write(memory, last, &[status as u8]);
    // A used length counts from the first writable byte without a gap, so an early status is not counted.
    let written = if data == last { data + 1 } else { data };
    Done {
        head: chain.head,
        written: written as u32,
        status,
    }
}

/// Repeats `step(file offset, bytes done)` until all is done. The end of the file is an error: a disk has no end
/// inside its capacity, so the file was cut off behind our back.
fn transfer(
    offset: u64,
    length: usize,
    mut step: impl FnMut(u64, usize) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < length {
        match step(offset + done as u64, done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn iovecs(slices: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    let iovec = |s: &VolatileSlice<'_>| libc::iovec {
        iov_base: s.ptr_guard_mut().as_ptr().cast(),
        iov_len: s.len(),
    };
    slices.iter().map(iovec).collect()
}

#[allow(unsafe_code)]
fn read_at(file: &File, target: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let iovecs = iovecs(target);
    // SAFETY: every iovec is a part of guest memory, which stays mapped while the slices live; the kernel may write
    // there as the guest itself may.
    let count = unsafe {
        libc::preadv(
            file.as_raw_fd(),
            iovecs.as_ptr(),
            iovecs.len() as i32,
            offset as i64,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[allow(unsafe_code)]
fn write_at(file: &File, source: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let iovecs = iovecs(source);
    // SAFETY: every iovec is a part of guest memory, which stays mapped while the slices live; the kernel only reads.
    let count = unsafe {
        libc::pwritev(
            file.as_raw_fd(),
            iovecs.as_ptr(),
            iovecs.len() as i32,
            offset as i64,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[allow(unsafe_code)]
fn zero(file: &File, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let mode = if unmap {
        libc::FALLOC_FL_PUNCH_HOLE
    } else {
        libc::FALLOC_FL_ZERO_RANGE
    } | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: plain call on an open file.
    let failed =
        unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, length as i64) } != 0;
    if failed {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
