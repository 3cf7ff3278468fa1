//! The hooks of a container that run on the host (OCI runtime spec, "POSIX-platform hooks"), where containerd is the caller. docker and
//! nerdctl hand their networks over in them. For the OCI command line the commands run them.

use super::create::NewContainer;
use super::{Error, Sandbox};
use crate::hooks;
use crate::spec::{Bundle, HostHooks};
use coffer_proto::ids::ContainerId;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};

/// The hooks that are still to come, and what they are told.
#[derive(Debug)]
pub(super) struct ContainerHooks {
    hooks: HostHooks,
    /// The OCI state without its status.
    state: Value,
}

impl ContainerHooks {
    /// `pid` is the process of the host that stands for the container.
    pub(super) fn new(new: &NewContainer, bundle: &Bundle, hooks: HostHooks, pid: u32) -> Self {
        let spec = bundle.spec();
        let state = json!({
            "ociVersion": spec.version(),
            "id": new.id.as_str(),
            "pid": pid,
            "bundle": &new.bundle,
            "annotations": spec.annotations().clone().unwrap_or_default(),
        });
        Self { hooks, state }
    }

    fn told(&self, status: &str) -> Value {
        let mut state = self.state.clone();
        state["status"] = status.into();
        state
    }
}

impl Sandbox {
    fn hooks_to_come(&self) -> MutexGuard<'_, BTreeMap<ContainerId, Arc<ContainerHooks>>> {
        let hooks = self.shared.hooks.lock();
        hooks.unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the hooks of a container that is being created. After a failure those for its end run as well.
    pub(super) async fn run_create_hooks(
        &self,
        id: &ContainerId,
        container: ContainerHooks,
    ) -> Result<(), Error> {
        if self.options().namespace.is_empty() {
            return Ok(());
        }
        let (state, hooks) = (container.told("creating"), &container.hooks);
        let done = async {
            hooks::run("prestart", &hooks.prestart, &state).await?;
            hooks::run("createRuntime", &hooks.create_runtime, &state).await
        };
        if let Err(error) = done.await {
            let stopped = container.told("stopped");
            hooks::run_all("poststop", &hooks.poststop, &stopped).await;
            return Err(error.into());
        }
        self.hooks_to_come().insert(id.clone(), Arc::new(container));
        Ok(())
    }

    /// A container runs.
    pub(super) async fn run_poststart_hooks(&self, id: &ContainerId) {
        let known = self.hooks_to_come().get(id).cloned();
        if let Some(container) = known {
            let state = container.told("running");
            hooks::run_all("poststart", &container.hooks.poststart, &state).await;
        }
    }

    /// A container is deleted.
    pub(super) async fn run_poststop_hooks(&self, id: &ContainerId) {
        let known = self.hooks_to_come().remove(id);
        if let Some(container) = known {
            let state = container.told("stopped");
            hooks::run_all("poststop", &container.hooks.poststop, &state).await;
        }
    }
}
