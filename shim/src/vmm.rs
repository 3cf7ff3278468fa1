//! The shim's end of the control socket to coffer-vmm or coffer-qemu ([`coffer_proto::vmm`] is the protocol).
//!
//! One task owns the socket. Replies come in the order of the requests, so it keeps a queue of who waits. The process is
//! not trusted more than the guest: a message out of order ends the connection, and with it the VM.

use crate::machine::child::{Child, printable};
use coffer_proto::error_chain::chain;
use coffer_proto::limits::MAX_BOOT_PHASES;
use coffer_proto::vmm::{
    ControlError, Event, Exit, FromVmm, Metrics, Reply, Request, VmConfig, receive, send,
};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// Requests other than Boot: the hypervisor process does no long work for them.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// From the end of the control socket to the end of the process.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);
/// Requests that wait for their turn; the supervisor sends few, one after the other.
const MAX_WAITING: usize = 16;

/// Why a request to the hypervisor process failed.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    #[error("the hypervisor process did not answer within {0:?}")]
    Deadline(Duration),
    #[error("the VM is gone: {0}")]
    Gone(String),
    #[error("the hypervisor process refused: {0}")]
    Refused(String),
    #[error("the hypervisor process gave an answer that does not fit the question")]
    WrongAnswer,
    #[error("can't send to the hypervisor process")]
    Send(#[source] ControlError),
}

#[derive(Debug)]
struct Call {
    request: Request,
    files: Vec<OwnedFd>,
    reply: oneshot::Sender<Result<Reply, VmmError>>,
}

/// One write of the guest to the boot timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootPhase {
    pub phase: u32,
    /// Since the hypervisor process started.
    pub at: Duration,
}

/// A hypervisor process and its VM.
#[derive(Debug)]
pub struct Vmm {
    pub process: Child,
    calls: mpsc::Sender<Call>,
    gone: watch::Receiver<Option<String>>,
    phases: Arc<Mutex<Vec<BootPhase>>>,
    /// MiB that the guest said to have.
    memory: watch::Sender<u32>,
}

impl Vmm {
    /// Takes the control socket of a process that was just started.
    pub fn new(socket: OwnedFd, process: Child) -> io::Result<Self> {
        nix::fcntl::fcntl(
            &socket,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
        let socket = register(socket)?;
        let (calls, incoming) = mpsc::channel(MAX_WAITING);
        let (gone_tx, gone) = watch::channel(None);
        let phases = Arc::new(Mutex::new(Vec::new()));
        let memory = watch::Sender::new(0);
        let connection = Connection {
            socket,
            waiting: VecDeque::new(),
            phases: phases.clone(),
            memory: memory.clone(),
            exit: None,
        };
        let child = process.clone();
        tokio::spawn(async move {
            let reason = connection.serve(incoming, &child).await;
            gone_tx.send_replace(Some(reason));
        });
        Ok(Self {
            process,
            calls,
            gone,
            phases,
            memory,
        })
    }

    /// Creates the VM and lets it run.
    pub async fn boot(
        &self,
        config: VmConfig,
        files: Vec<OwnedFd>,
        deadline: Duration,
    ) -> Result<(), VmmError> {
        let request = Request::Boot(Box::new(config));
        done(self.call(request, files, deadline).await?)
    }

    /// Gives network slot `slot` its tap.
    pub async fn attach_tap(&self, slot: u8, tap: OwnedFd) -> Result<(), VmmError> {
        let request = Request::AttachTap {
            slot,
            tap: coffer_proto::vmm::FdIndex(0),
        };
        self.ask(request, vec![tap]).await
    }

    /// Takes the tap of network slot `slot` away.
    pub async fn detach_tap(&self, slot: u8) -> Result<(), VmmError> {
        let request = Request::DetachTap { slot };
        self.ask(request, Vec::new()).await
    }

    /// Asks the guest to have this much memory, which it does in its own time.
    pub async fn resize_memory(&self, mib: u32) -> Result<(), VmmError> {
        // What it said to an earlier request counts no more.
        self.memory.send_replace(0);
        let request = Request::ResizeMemory { mib };
        self.ask(request, Vec::new()).await
    }

    /// Waits until the guest has at least this much memory. False: not within `limit`.
    pub async fn memory_reached(&self, mib: u32, limit: Duration) -> bool {
        let mut memory = self.memory.subscribe();
        let reached = memory.wait_for(|has| *has >= mib);
        timeout(limit, reached).await.is_ok_and(|has| has.is_ok())
    }

    /// Makes disk slot `slot` a disk.
    pub async fn attach_disk(&self, slot: u8, file: OwnedFd) -> Result<(), VmmError> {
        let request = Request::AttachDisk {
            slot,
            file: coffer_proto::vmm::FdIndex(0),
        };
        self.ask(request, vec![file]).await
    }

    /// Empties disk slot `slot`.
    pub async fn detach_disk(&self, slot: u8) -> Result<(), VmmError> {
        let request = Request::DetachDisk { slot };
        self.ask(request, Vec::new()).await
    }

    /// Counters of the VM.
    pub async fn metrics(&self) -> Result<Metrics, VmmError> {
        let answer = self.call(Request::Metrics, Vec::new(), REQUEST_DEADLINE);
        match answer.await? {
            Reply::Metrics(metrics) => Ok(metrics),
            _ => Err(VmmError::WrongAnswer),
        }
    }

    /// Ends the VM whatever the guest does.
    pub async fn stop(&self) -> Result<(), VmmError> {
        match self.ask(Request::Stop, Vec::new()).await {
            // The process may end before its answer is read.
            Err(VmmError::Gone(_)) => Ok(()),
            answer => answer,
        }
    }

    /// A request that is answered with no more than that it is done.
    async fn ask(&self, request: Request, files: Vec<OwnedFd>) -> Result<(), VmmError> {
        done(self.call(request, files, REQUEST_DEADLINE).await?)
    }

    async fn call(
        &self,
        request: Request,
        files: Vec<OwnedFd>,
        deadline: Duration,
    ) -> Result<Reply, VmmError> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let call = Call {
                request,
                files,
                reply,
            };
            if self.calls.send(call).await.is_err() {
                return Err(VmmError::Gone(self.gone().await));
            }
            match answer.await {
                Ok(result) => result,
                Err(_) => Err(VmmError::Gone(self.gone().await)),
            }
        };
        timeout(deadline, exchange)
            .await
            .unwrap_or(Err(VmmError::Deadline(deadline)))
    }

    /// Waits until the VM is gone, and tells why.
    pub async fn gone(&self) -> String {
        let mut gone = self.gone.clone();
        let reason = gone.wait_for(Option::is_some).await;
        reason
            .ok()
            .and_then(|reason| reason.clone())
            .unwrap_or_else(|| "the supervisor is ending".to_owned())
    }

    /// The boot timer's records so far.
    pub fn phases(&self) -> Vec<BootPhase> {
        self.phases
            .lock()
            .expect("no holder of this lock panics")
            .clone()
    }
}

#[allow(unsafe_code)]
fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
    unsafe { AsyncFd::register(socket) }.map_err(Into::into)
}

fn done(reply: Reply) -> Result<(), VmmError> {
    match reply {
        Reply::Done => Ok(()),
        Reply::Failed { message } => Err(VmmError::Refused(printable(message.as_bytes()))),
        Reply::Metrics(_) => Err(VmmError::WrongAnswer),
    }
}

struct Connection {
    socket: AsyncFd<OwnedFd>,
    waiting: VecDeque<oneshot::Sender<Result<Reply, VmmError>>>,
    phases: Arc<Mutex<Vec<BootPhase>>>,
    memory: watch::Sender<u32>,
    exit: Option<Exit>,
}

impl Connection {
    /// Runs until the process is gone; gives the reason in one line.
    async fn serve(mut self, mut calls: mpsc::Receiver<Call>, child: &Child) -> String {
        let broken = loop {
            tokio::select! {
                call = calls.recv() => match call {
                    Some(call) => self.send(call).await,
                    // Nobody holds the VM any more; closing the socket ends it.
                    None => break None,
                },
                message = self.socket.async_io(Interest::READABLE, |fd| receive_now(fd.as_fd())) => {
                    let message = message.unwrap_or_else(|error| Err(ControlError::Io(error)));
                    match message.and_then(|message| self.take(message)) {
                        Ok(()) => {}
                        Err(ControlError::Closed) => break None,
                        Err(error) => break Some(chain(&error)),
                    }
                }
            }
        };
        drop(self.socket);
        let ended = match timeout(EXIT_DEADLINE, child.ended()).await {
            Ok(ended) => ended,
            Err(_) => {
                let id = child.id;
                match tokio::task::spawn_blocking(move || id.kill(EXIT_DEADLINE)).await {
                    Ok(Ok(())) => "it closed its control socket and had to be killed".to_owned(),
                    Ok(Err(error)) => {
                        format!("it closed its control socket and can't be killed: {error}")
                    }
                    Err(_) => "it closed its control socket while the supervisor ended".to_owned(),
                }
            }
        };
        reason(self.exit, broken, &ended)
    }

    async fn send(&mut self, call: Call) {
        let Call {
            request,
            files,
            reply,
        } = call;
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let sent = self.socket.async_io(Interest::WRITABLE, |fd| {
            match send(fd.as_fd(), &request, &files) {
                Err(ControlError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    Err(error)
                }
                other => Ok(other),
            }
        });
        match sent
            .await
            .unwrap_or_else(|error| Err(ControlError::Io(error)))
        {
            Ok(()) => self.waiting.push_back(reply),
            // Its end, with the reason, comes from the reading side; dropping `reply` sends the caller there.
            Err(ControlError::Closed) => {}
            Err(error) => {
                let _ = reply.send(Err(VmmError::Send(error)));
            }
        }
    }

    fn take(&mut self, message: FromVmm) -> Result<(), ControlError> {
        match message {
            FromVmm::Reply(reply) => match self.waiting.pop_front() {
                // The caller may have met its deadline.
                Some(waiting) => drop(waiting.send(Ok(reply))),
                None => {
                    return Err(ControlError::Io(io::Error::other(
                        "a reply came that nobody asked for",
                    )));
                }
            },
            FromVmm::Event(Event::Phase {
                phase,
                since_start_us,
            }) => {
                let mut phases = self.phases.lock().expect("no holder of this lock panics");
                if phases.len() < MAX_BOOT_PHASES {
                    phases.push(BootPhase {
                        phase,
                        at: Duration::from_micros(since_start_us),
                    });
                }
            }
            FromVmm::Event(Event::Memory { mib }) => {
                self.memory.send_replace(mib);
            }
            FromVmm::Event(Event::Exited(exit)) => self.exit = Some(exit),
        }
        Ok(())
    }
}

/// One message if there is one; files that come with it are closed, the protocol sends none this way.
fn receive_now(socket: std::os::fd::BorrowedFd<'_>) -> io::Result<Result<FromVmm, ControlError>> {
    match receive::<FromVmm>(socket) {
        Err(ControlError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
        other => Ok(other.map(|(message, _files)| message)),
    }
}

fn reason(exit: Option<Exit>, broken: Option<String>, ended: &str) -> String {
    match (exit, broken) {
        (Some(Exit::Reset), _) => "the guest restarted".to_owned(),
        (Some(Exit::TripleFault), _) => "the guest's kernel crashed (triple fault)".to_owned(),
        (Some(Exit::Stopped), _) => "the VM was stopped".to_owned(),
        (Some(Exit::Failed { message }), _) => printable(message.as_bytes()),
        (None, Some(broken)) => format!("{broken}; {ended}"),
        (None, None) => ended.to_owned(),
    }
}

#[cfg(test)]
mod tests;
