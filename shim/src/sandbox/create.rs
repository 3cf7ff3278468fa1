//! Recipes that bring something into being: the VM with its first container, further containers, execs.

use super::pod::Admission;
use super::process::{ProcessKey, StdioPaths};
use super::rootfs::{self, RootfsMount};
use super::{Error, Sandbox};
use crate::io::{Endpoints, ProcessIo};
use crate::machine::{self, Machine, Pod as PodSpec};
use crate::mount_points;
use crate::spec::{Bundle, GuestSpec};
use crate::state::ContainerRecord;
use crate::vmm::chain;
use coffer_proto::ids::{ContainerId, ExecId};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// Annotations by which containerd's and CRI-O's containers name their sandbox.
pub const SANDBOX_ANNOTATIONS: [&str; 2] = [
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];

/// Where containerd's snapshot is mounted, below the bundle.
const ROOTFS: &str = "rootfs";

/// A container to be created.
#[derive(Debug, Clone)]
pub struct NewContainer {
    pub id: ContainerId,
    pub bundle: PathBuf,
    pub stdio: StdioPaths,
    /// Mounts that make up the container's root, on `<bundle>/rootfs`; none where it is there already.
    pub rootfs: Vec<RootfsMount>,
}

/// An exec to be prepared.
#[derive(Debug, Clone)]
pub struct NewExec {
    pub container: ContainerId,
    pub exec: ExecId,
    /// An OCI `process` object as JSON.
    pub process: Vec<u8>,
    pub stdio: StdioPaths,
}

impl Sandbox {
    /// Creates a container, and the VM if it is the first; gives the pid that stands for it.
    pub async fn create(&self, new: NewContainer) -> Result<u32, Error> {
        let key = ProcessKey::init(new.id.clone());
        let (id, bundle, stdio) = (new.id.clone(), new.bundle.clone(), new.stdio.clone());
        let admission = self
            .apply(move |pod| pod.begin_create(&id, bundle, stdio))
            .await?;
        match self.create_admitted(new, admission).await {
            Err(error) => {
                let error = self.explain(error).await;
                self.undo_create(&key, admission).await;
                Err(error)
            }
            created => created,
        }
    }

    async fn create_admitted(&self, new: NewContainer, admission: Admission) -> Result<u32, Error> {
        let key = ProcessKey::init(new.id.clone());
        self.record_container(&new)?;
        let target = new.bundle.join(ROOTFS);
        if !new.rootfs.is_empty() {
            rootfs::mount_all(&new.rootfs, &target)
                .map_err(|source| Error::Mount { target, source })?;
        }
        let guest = self.load(&new)?;
        let endpoints = Endpoints::open(&new.stdio)?;
        let machine = match admission {
            Admission::Boot => self.boot(&guest).await?,
            Admission::Join => self.machine().await?,
        };
        share(&machine, &new.id, &guest)?;
        let stdio = endpoints.for_agent(new.stdio.terminal);
        machine
            .agent
            .create_container(&new.id, guest.json, stdio)
            .await?;
        let io = ProcessIo::attach(endpoints, &machine.dialer, &key).await?;
        let created = key.clone();
        let pid = self.apply(move |pod| pod.created(&created, io)).await?;
        self.watch_process(&machine, key);
        Ok(pid)
    }

    fn record_container(&self, new: &NewContainer) -> Result<(), Error> {
        let record = ContainerRecord {
            bundle: new.bundle.clone(),
            created: SystemTime::now(),
            mounted_rootfs: (!new.rootfs.is_empty()).then(|| new.bundle.join(ROOTFS)),
            exit: None,
        };
        Ok(self
            .shared
            .state
            .update(|state| drop(state.containers.insert(new.id.clone(), record)))?)
    }

    /// Reads the bundle and checks that the container belongs here.
    fn load(&self, new: &NewContainer) -> Result<GuestSpec, Error> {
        let bundle = Bundle::load(&new.bundle)?;
        let this = self.options().id.as_str();
        let annotations = bundle.spec().annotations().clone().unwrap_or_default();
        let wanted = SANDBOX_ANNOTATIONS
            .iter()
            .find_map(|name| annotations.get(*name));
        if let Some(wanted) = wanted
            && wanted != this
        {
            return Err(Error::OtherSandbox {
                wanted: wanted.clone(),
                this: this.to_owned(),
            });
        }
        Ok(bundle.for_guest(&new.id)?)
    }

    /// Boots the VM for the first container.
    async fn boot(&self, guest: &GuestSpec) -> Result<Arc<Machine>, Error> {
        let pod = PodSpec {
            hostname: guest.hostname.clone(),
            netns: guest.network_namespace.clone(),
            cgroup: guest
                .cgroups_path
                .as_deref()
                .and_then(Path::to_str)
                .filter(|path| path.starts_with('/'))
                .map(str::to_owned),
        };
        let machine = Arc::new(machine::boot(self.options(), &pod, &self.shared.state).await?);
        let pid = machine.host_pid();
        self.shared.machine.send_replace(Some(machine.clone()));
        let stopped = self.apply(move |pod| {
            pod.booted(pid);
            Ok(*pod.state() != super::events::SandboxState::Running)
        });
        self.watch_machine(machine.clone());
        machine.watch_network();
        if stopped.await? {
            // Somebody wanted the end while it booted.
            machine.kill().await;
        }
        Ok(machine)
    }

    async fn undo_create(&self, key: &ProcessKey, admission: Admission) {
        let machine = self.shared.machine.borrow().clone();
        if let Some(machine) = &machine
            && let Err(error) = machine.agent.delete_process(key).await
        {
            tracing::debug!(%key, error = chain(&error), "nothing to delete in the guest");
        }
        self.remove_from_host(&key.container, machine.as_deref());
        let forgotten = key.clone();
        let empty = self.apply(move |pod| {
            pod.forget(&forgotten);
            Ok(pod.is_empty())
        });
        let empty = empty.await.unwrap_or(false);
        if admission == Admission::Boot && (machine.is_none() || empty) {
            self.stop("its first container could not be created").await;
        }
    }

    /// Prepares another process in a container.
    pub async fn exec(&self, new: NewExec) -> Result<(), Error> {
        let key = ProcessKey {
            container: new.container.clone(),
            exec: Some(new.exec.clone()),
        };
        let process = with_terminal(&new.process, new.stdio.terminal)?;
        let machine = self.machine().await?;
        let (target, exec, stdio) = (key.clone(), new.exec.clone(), new.stdio.clone());
        self.apply(move |pod| pod.begin_exec(&target, &exec, stdio))
            .await?;
        let prepared = self.prepare_exec(&machine, &key, process, &new.stdio).await;
        if let Err(error) = prepared {
            let error = self.explain(error).await;
            let forgotten = key.clone();
            let _ = self.change(move |pod| pod.forget(&forgotten)).await;
            let _ = machine.agent.delete_process(&key).await;
            return Err(error);
        }
        prepared
    }

    async fn prepare_exec(
        &self,
        machine: &Machine,
        key: &ProcessKey,
        process: Vec<u8>,
        stdio: &StdioPaths,
    ) -> Result<(), Error> {
        let endpoints = Endpoints::open(stdio)?;
        machine
            .agent
            .exec_process(key, process, endpoints.for_agent(stdio.terminal))
            .await?;
        let io = ProcessIo::attach(endpoints, &machine.dialer, key).await?;
        let created = key.clone();
        self.apply(move |pod| pod.created(&created, io).map(|_| ()))
            .await
    }
}

/// Shows the container's root and volumes to the guest.
fn share(machine: &Machine, id: &ContainerId, guest: &GuestSpec) -> Result<(), Error> {
    if guest.read_only_rootfs {
        mount_points::make(&guest.rootfs, &guest.mount_points)?;
    }
    machine
        .share
        .add_rootfs(id, &guest.rootfs, guest.read_only_rootfs)?;
    for bind in &guest.binds {
        machine
            .share
            .add_mount(id, bind.index, &bind.source, bind.read_only)?;
    }
    Ok(())
}

/// CRI-O copies the container's process for an exec and changes only the request: what the request says counts.
fn with_terminal(process: &[u8], terminal: bool) -> Result<Vec<u8>, Error> {
    let malformed = |source| Error::Malformed {
        what: "the exec's process",
        source,
    };
    let parsed: oci_spec::runtime::Process = serde_json::from_slice(process).map_err(malformed)?;
    if parsed.terminal().unwrap_or(false) == terminal {
        return Ok(process.to_vec());
    }
    let mut value: serde_json::Value = serde_json::from_slice(process).map_err(malformed)?;
    value["terminal"] = terminal.into();
    serde_json::to_vec(&value).map_err(malformed)
}
