//! A process in the foreground: its streams, terminal, signals and end are the caller's.

use super::Error;
use super::client::{Process, Task};
use super::stdio::{Copying, Fifos, SILENCE};
use super::terminal::{RawMode, unusable, window_size};
use nix::sys::signal::Signal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::sync::mpsc;

/// Signals that a command in the foreground passes on. Others have a meaning for this program, or none for it.
pub(super) const FORWARDED: [i32; 6] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
];
/// Exit status of a process whose output nobody takes: as if SIGPIPE had ended it.
const BROKEN_PIPE: u8 = 128 + 13;

/// The caller's signals from the moment this is made, so that none ends this program before it has cleaned up.
#[derive(Debug)]
pub(super) struct Caller {
    signals: mpsc::Receiver<i32>,
    window: Signals,
    interrupted: Arc<AtomicBool>,
}

/// Whether a signal ends this program while there is no process to pass it on to.
fn interrupts(signal: i32) -> Option<Signal> {
    let signal = Signal::try_from(signal).ok()?;
    let ends = [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
    ];
    ends.contains(&signal).then_some(signal)
}

impl Caller {
    /// Listens to these signals, and to changes of the window's size.
    pub(super) fn listen(kinds: &[i32]) -> Result<Self, Error> {
        let failed = |source| Error::Io {
            what: "can't handle signals".into(),
            source,
        };
        let (sender, signals) = mpsc::channel(16);
        let interrupted = Arc::new(AtomicBool::new(false));
        for &kind in kinds {
            let mut stream = signal(SignalKind::from_raw(kind)).map_err(failed)?;
            let (sender, interrupted) = (sender.clone(), interrupted.clone());
            tokio::spawn(async move {
                while stream.recv().await.is_some() && sender.send(kind).await.is_ok() {
                    interrupted.fetch_or(interrupts(kind).is_some(), Ordering::Relaxed);
                }
            });
        }
        Ok(Self {
            signals,
            window: signal(SignalKind::window_change()).map_err(failed)?,
            interrupted,
        })
    }

    /// The next signal, also that of a change of the window's size.
    pub(super) async fn next_signal(&mut self) -> i32 {
        tokio::select! {
            Some(signal) = self.signals.recv() => signal,
            _ = self.window.recv() => libc::SIGWINCH,
        }
    }

    /// Becomes true with the first signal that would end this program, for work that blocks its thread.
    pub(super) fn interrupted(&self) -> Arc<AtomicBool> {
        self.interrupted.clone()
    }

    /// Runs something that is not a process yet; a signal that would end this program ends it.
    pub(super) async fn unless_interrupted<T>(
        &mut self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                Some(signal) = self.signals.recv() => {
                    if let Some(signal) = interrupts(signal) {
                        return Err(Error::Interrupted(signal));
                    }
                }
                done = &mut work => {
                    let signal = self.signals.try_recv().ok().and_then(interrupts);
                    return match (done, signal) {
                        // Work that blocked has ended because of the signal.
                        (Err(_), Some(signal)) => Err(Error::Interrupted(signal)),
                        (done, _) => done,
                    };
                }
            }
        }
    }
}

/// A process that is created and has its streams.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) task: Task,
    pub(super) process: Process,
    pub(super) terminal: bool,
}

impl Session {
    /// Lets the process run and stays with it; gives its exit status.
    pub(super) async fn run(&self, fifos: Fifos, caller: &mut Caller) -> Result<u8, Error> {
        let mut copying = fifos.connect();
        let raw = if self.terminal {
            RawMode::enter().map_err(unusable)?
        } else {
            None
        };
        self.resize().await;
        self.start().await?;
        let status = self.attend(&copying, caller).await;
        copying.drained(SILENCE).await;
        drop(raw);
        status
    }

    /// Lets the process run. Its terminal may have been made only now.
    pub(super) async fn start(&self) -> Result<(), Error> {
        self.task.start(&self.process).await?;
        self.resize().await;
        Ok(())
    }

    /// Passes on what the caller sends until the process has ended; gives its exit status.
    pub(super) async fn attend(&self, copying: &Copying, caller: &mut Caller) -> Result<u8, Error> {
        let ended = self.task.wait(&self.process);
        tokio::pin!(ended);
        let (mut input_open, mut output_open) = (true, true);
        loop {
            tokio::select! {
                status = &mut ended => {
                    let status = u8::try_from(status?).unwrap_or(u8::MAX);
                    return Ok(if output_open { status } else { BROKEN_PIPE });
                }
                Some(signal) = caller.signals.recv() => self.signal(signal).await,
                _ = caller.window.recv() => self.resize().await,
                () = copying.input_ended(), if input_open => {
                    input_open = false;
                    // The process may have ended meanwhile.
                    let _ = self.task.close_stdin(&self.process).await;
                }
                () = copying.output_closed(), if output_open => {
                    output_open = false;
                    self.signal(libc::SIGKILL).await;
                }
            }
        }
    }

    /// A process that has just ended takes no signal, and its end is reported anyway.
    async fn signal(&self, signal: i32) {
        if let Err(error) = self
            .task
            .kill(&self.process, signal.unsigned_abs(), false)
            .await
        {
            tracing::debug!(%error, signal, "signal not delivered");
        }
    }

    /// Gives the guest's terminal the size of the caller's, if it has one.
    pub(super) async fn resize(&self) {
        let Some((rows, columns)) = window_size().filter(|_| self.terminal) else {
            return;
        };
        if let Err(error) = self.task.resize(&self.process, rows, columns).await {
            tracing::debug!(%error, "terminal not resized");
        }
    }
}
