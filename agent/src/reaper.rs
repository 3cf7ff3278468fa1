//! PID 1's duty: every process that ends in the guest is waited for, and the ends of our own are told to whom they
//! belong.
//!
//! A process may end before anybody knows its pid: a helper makes it, and its pid arrives by pipe. So whoever is about
//! to have a process made says so first ([`Reaper::expect`]). While such an expectation is open, ends that belong to
//! nobody are kept; an end older than every open expectation was an orphan's and is forgotten. What is kept is at most one end
//! per pid, so the kernel's pid_max bounds it.

use nix::unistd::Pid;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// 0-255; 128 + n for signal n, as a shell shows it.
    pub status: u8,
    pub at: SystemTime,
}

impl Ended {
    /// What a raw wait status says; None for one that tells no end. Raw, because nix knows no real-time signals.
    fn of(status: libc::c_int, at: SystemTime) -> Option<Self> {
        let status = if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else if libc::WIFSIGNALED(status) {
            128 + libc::WTERMSIG(status)
        } else {
            return None;
        };
        // Both are below 256: the kernel keeps eight bits of an exit code, and signals end at 64.
        u8::try_from(status).ok().map(|status| Self { status, at })
    }
}

/// Waits for all children.
#[derive(Debug, Default)]
pub struct Reaper {
    ends: Mutex<Ends>,
}

#[derive(Debug, Default)]
struct Ends {
    /// Counts expectations; the number of the newest.
    now: u64,
    /// The open expectations.
    open: BTreeSet<u64>,
    /// Who waits for which process.
    watched: HashMap<Pid, oneshot::Sender<Ended>>,
    /// Ends nobody asked for yet, with the expectation that was the newest then.
    unclaimed: HashMap<Pid, (u64, Ended)>,
}

impl Reaper {
    /// Begins to reap. Inside a tokio runtime.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut child_ended = signal(SignalKind::child())?;
        let task = reaper.clone();
        tokio::spawn(async move {
            // Several ends may be one signal, and some came before we listened: look first, then wait.
            loop {
                task.reap();
                if child_ended.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    fn reap(&self) {
        while let Some((pid, status)) = wait_for_any() {
            if let Some(ended) = Ended::of(status, SystemTime::now()) {
                self.ends().route(pid, ended);
            }
        }
    }

    /// Announces that a process is about to be made.
    pub fn expect(self: &Arc<Self>) -> Expectation {
        let mut ends = self.ends();
        ends.now += 1;
        let number = ends.now;
        ends.open.insert(number);
        Expectation {
            reaper: self.clone(),
            number,
        }
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ends {
    fn route(&mut self, pid: Pid, ended: Ended) {
        if let Some(watcher) = self.watched.remove(&pid) {
            // A watcher that is gone has no use for it.
            let _ = watcher.send(ended);
        } else if !self.open.is_empty() {
            self.unclaimed.insert(pid, (self.now, ended));
        }
    }

    fn close(&mut self, number: u64) {
        self.open.remove(&number);
        match self.open.first().copied() {
            Some(oldest) => self.unclaimed.retain(|_, (at, _)| *at >= oldest),
            None => self.unclaimed = HashMap::new(),
        }
    }
}

/// One child that changed its state, if there is one now.
#[allow(unsafe_code)]
fn wait_for_any() -> Option<(Pid, libc::c_int)> {
    let mut status = 0;
    // SAFETY: waitpid writes to `status` and touches nothing else.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    (pid > 0).then(|| (Pid::from_raw(pid), status))
}

/// A process is being made; its end won't be lost. Dropping it gives the process up.
#[derive(Debug)]
pub struct Expectation {
    reaper: Arc<Reaper>,
    number: u64,
}

impl Expectation {
    /// The process turned out to be `pid`. The receiver gets its end, at once if it has ended already.
    pub fn claim(&self, pid: Pid) -> oneshot::Receiver<Ended> {
        let (sender, receiver) = oneshot::channel();
        let mut ends = self.reaper.ends();
        // An end from before this expectation was another process's with the same pid.
        match ends.unclaimed.remove(&pid) {
            Some((at, ended)) if at >= self.number => {
                let _ = sender.send(ended);
            }
            _ => {
                ends.watched.insert(pid, sender);
            }
        }
        receiver
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        self.reaper.ends().close(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: u8) -> Ended {
        Ended {
            status,
            at: SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn an_end_before_the_claim_is_kept() {
        let reaper = Arc::new(Reaper::default());
        let expectation = reaper.expect();
        reaper.ends().route(Pid::from_raw(7), ended(3));
        assert_eq!(expectation.claim(Pid::from_raw(7)).try_recv(), Ok(ended(3)));
    }

    #[test]
    fn an_end_after_the_claim_is_told() {
        let reaper = Arc::new(Reaper::default());
        let mut receiver = reaper.expect().claim(Pid::from_raw(7));
        assert!(receiver.try_recv().is_err());
        reaper.ends().route(Pid::from_raw(7), ended(4));
        assert_eq!(receiver.try_recv(), Ok(ended(4)));
    }

    #[test]
    fn orphans_are_forgotten() {
        let reaper = Arc::new(Reaper::default());
        reaper.ends().route(Pid::from_raw(5), ended(0));
        assert!(
            reaper.ends().unclaimed.is_empty(),
            "nobody expects anything"
        );
        let old = reaper.expect();
        reaper.ends().route(Pid::from_raw(6), ended(0));
        let new = reaper.expect();
        assert_eq!(reaper.ends().unclaimed.len(), 1);
        drop(old);
        assert!(
            reaper.ends().unclaimed.is_empty(),
            "it ended before the only open expectation"
        );
        drop(new);
    }

    #[test]
    fn a_pid_used_again_is_not_the_orphan_before() {
        let reaper = Arc::new(Reaper::default());
        let other = reaper.expect();
        reaper.ends().route(Pid::from_raw(9), ended(1));
        let mut receiver = reaper.expect().claim(Pid::from_raw(9));
        assert!(
            receiver.try_recv().is_err(),
            "that end was another process's"
        );
        reaper.ends().route(Pid::from_raw(9), ended(2));
        assert_eq!(receiver.try_recv(), Ok(ended(2)));
        drop(other);
    }

    #[test]
    fn statuses_are_what_a_shell_shows() {
        // Linux: exit code in bits 8-15, or the signal in bits 0-6, 0x7f for a stopped process.
        let at = SystemTime::UNIX_EPOCH;
        assert_eq!(Ended::of(255 << 8, at), Some(ended(255)));
        assert_eq!(Ended::of(libc::SIGKILL, at), Some(ended(137)));
        assert_eq!(Ended::of(libc::SIGRTMAX(), at), Some(ended(192)));
        assert_eq!(Ended::of(libc::SIGSTOP << 8 | 0x7f, at), None);
    }
}
