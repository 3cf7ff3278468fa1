//! Processes of the host that stand for those of the guest; their side is [`crate::lease`].

use super::process::{ProcessKey, ProcessState};
use super::{Error, Sandbox};
use crate::state::StandIn;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::ContainerId;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// A create whose caller died is looked after this often until its process can be killed.
const LOOK: Duration = Duration::from_millis(100);
/// From the SIGKILL for an exec that nobody stands for any more until it is forgotten.
const EXEC_ENDS: Duration = Duration::from_secs(30);

impl Sandbox {
    /// Remembers a stand-in. The first one that is in a network namespace of its container's brings the pod's.
    pub fn register(&self, stand_in: StandIn, own_network: bool) -> Result<(), Error> {
        if own_network {
            let path = PathBuf::from(format!("/proc/{}/ns/net", stand_in.process.pid));
            let namespace =
                File::open(&path).map_err(|source| Error::NetworkNamespace { path, source })?;
            // Only the first counts; the pod's other containers are in the same one.
            let _ = self.shared.netns.set(namespace);
        }
        Ok(self
            .shared
            .state
            .update(|state| state.stand_ins.push(stand_in))?)
    }

    /// The container whose init a process of the host stands for.
    pub(super) fn container_of_stand_in(&self, pid: u32) -> Option<ContainerId> {
        let known = self.shared.state.get().stand_ins;
        let is = |known: &StandIn| known.exec.is_none() && known.process.pid.cast_unsigned() == pid;
        known.into_iter().find(is).map(|known| known.container)
    }

    /// The network namespace that came with a stand-in, by a path that is valid in this process.
    pub(super) fn stand_ins_network(&self) -> Option<PathBuf> {
        let namespace = self.shared.netns.get()?;
        Some(format!("/proc/self/fd/{}", namespace.as_raw_fd()).into())
    }

    /// A stand-in is gone: whatever still runs in the guest for it is killed, and an exec also forgotten.
    pub async fn abandoned(&self, key: ProcessKey) {
        loop {
            match self.describe(key.clone()).await.map(|known| known.state) {
                // A create or a start under way ends by itself.
                Ok(ProcessState::Creating | ProcessState::Starting) => sleep(LOOK).await,
                Ok(ProcessState::Stopped) | Err(_) => break,
                Ok(_) => {
                    tracing::warn!(%key, "its stand-in is gone, it is killed");
                    let killed = self.kill(key.clone(), libc::SIGKILL.unsigned_abs(), false);
                    if let Err(error) = killed.await {
                        tracing::debug!(%key, error = chain(&error), "not killed");
                    }
                    break;
                }
            }
        }
        if key.exec.is_none() {
            return;
        }
        let _ = timeout(EXEC_ENDS, self.wait(key.clone())).await;
        let _ = self.delete(key.clone()).await;
        self.record(|state| {
            let is = |known: &StandIn| known.container == key.container && known.exec == key.exec;
            state.stand_ins.retain(|known| !is(known));
        });
    }
}
