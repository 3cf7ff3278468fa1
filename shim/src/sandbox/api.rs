//! A sandbox that its caller makes and ends by name (containerd's Sandbox API), instead of by its first and last container.
//!
//! ```text
//! prepare (CreateSandbox) ─► start_prepared (StartSandbox): boots the VM ─► containers come and go ─► stop (StopSandbox)
//! ```

use super::events::{SandboxDescription, SandboxState};
use super::{Error, Sandbox};
use crate::machine::Pod as PodSpec;
use coffer_proto::agent::StatContainerResponse;

impl Sandbox {
    /// Takes note of what the pod shall be. From here on the VM does not go with the last container.
    pub async fn prepare(&self, spec: PodSpec) -> Result<(), Error> {
        self.apply(move |pod| pod.prepare(spec)).await
    }

    /// Boots the VM of a prepared sandbox.
    pub async fn start_prepared(&self) -> Result<SandboxDescription, Error> {
        let spec = self.apply(super::pod::Pod::begin_prepared_boot).await?;
        if let Err(error) = self.boot(spec).await {
            let error = self.explain(error).await;
            self.stop("it could not be started").await;
            return Err(error);
        }
        self.describe_sandbox().await
    }

    /// What is known of the sandbox; never waits for the guest.
    pub async fn describe_sandbox(&self) -> Result<SandboxDescription, Error> {
        let created = self.shared.state.get().created;
        self.change(move |pod| pod.describe_sandbox(created)).await
    }

    /// The same, if the Sandbox API made it.
    pub async fn prepared(&self) -> Option<SandboxDescription> {
        let prepared = self.change(|pod| pod.is_prepared()).await.ok()?;
        if prepared {
            self.describe_sandbox().await.ok()
        } else {
            None
        }
    }

    /// Waits until nothing of the VM is left.
    pub async fn wait_stopped(&self) -> Result<SandboxDescription, Error> {
        let mut status = self.shared.status.subscribe();
        let stopped = status
            .wait_for(|state| matches!(state, SandboxState::Stopped { .. }))
            .await;
        stopped.map_err(|_| Error::Ending)?;
        self.describe_sandbox().await
    }

    /// Whether neither a container nor the Sandbox API needs it any more.
    pub async fn is_unneeded(&self) -> bool {
        self.change(|pod| pod.is_unneeded()).await.unwrap_or(true)
    }

    /// The figures of every container that has any.
    pub async fn all_stats(&self) -> Vec<StatContainerResponse> {
        let mut figures = Vec::new();
        for id in self.containers().await {
            // One that is being created or deleted has none.
            figures.extend(self.stats(id).await.ok());
        }
        figures
    }
}
