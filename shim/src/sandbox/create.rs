//! Recipes that bring something into being: the VM with its first container, further containers, execs.

use super::host_hooks::ContainerHooks;
use super::pod::Admission;
use super::process::{ProcessKey, StdioPaths};
use super::rootfs::{self, RootfsMount};
use super::{Error, OwnNetwork, Sandbox, on_host};
use crate::agent;
use crate::crash;
use crate::io::{Endpoints, ProcessIo, StdioError};
use crate::machine::{self, Machine, Pod as PodSpec, PodSize};
use crate::mount_points;
use crate::parked::{Namespace, Parked};
use crate::spec::{self, Bundle, GuestSpec};
use crate::state::ContainerRecord;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::{ContainerId, ExecId};
use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// Annotations by which containerd's and CRI-O's containers name their sandbox.
pub const SANDBOX_ANNOTATIONS: [&str; 2] = [
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];

/// Annotations that are meant for us begin with this.
const OWN_ANNOTATIONS: &str = "io.coffer.";

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
        crash::point("create.recorded");
        let (bundle, mut guest) = self.mount_and_read(&new).await?;
        let shared_memory = if self.change(|pod| pod.is_prepared()).await? {
            guest.take_pods_files()
        } else {
            self.take_shared_memory(&mut guest)
        };
        crash::point("create.loaded");
        let endpoints = self.open_stdio(&new.stdio, &key).await?;
        crash::point("create.stdio");
        let machine = match admission {
            Admission::Boot => {
                let mut pod = pod_of(&guest, bundle.spec());
                if wants_network(bundle.spec()) && !self.options().namespace.is_empty() {
                    pod.netns = Some(self.make_network()?);
                }
                pod.netns = pod.netns.or_else(|| self.stand_ins_network());
                self.boot(pod).await?
            }
            Admission::Join => self.machine().await?,
        };
        crash::point("create.booted");
        let mut guest = share(&machine, &new.id, guest).await?;
        let disks = machine.attach_disks(&new.id, &guest.block_devices).await?;
        guest.renumber_block_devices(&disks);
        let hooks = std::mem::take(&mut guest.host_hooks);
        crash::point("create.shared");
        let beside = match &guest.pid_namespace {
            Some(path) => self.container_in(path, &new.id).await?,
            None => None,
        };
        let container = agent::NewContainer {
            id: &new.id,
            spec: guest.to_json(),
            stdio: endpoints.for_agent(new.stdio.terminal),
            beside: beside.as_ref(),
            shared_memory,
        };
        machine.agent.create_container(container).await?;
        crash::point("create.in-guest");
        self.need(&machine, &new.id, move |_| guest.need).await?;
        let io = ProcessIo::attach(endpoints, &machine.dialer, &key).await?;
        crash::point("create.attached");
        let (created, stand) = (key.clone(), self.process_for(admission)?);
        let pid = stand
            .as_ref()
            .map_or_else(|| self.pod_pid(&machine), Parked::pid);
        let hooks = ContainerHooks::new(&new, &bundle, hooks, pid);
        self.run_create_hooks(&new.id, hooks).await?;
        let pid = self.apply(move |pod| {
            if let Some(stand) = stand {
                pod.stand(&created.container, stand)?;
            }
            pod.created(&created, io)
        });
        let pid = pid.await?;
        self.watch_process(&machine, key);
        Ok(pid)
    }

    /// The size for the guest's /dev/shm, where the container has a part in it. That is the shared memory of the pod; a container whose
    /// engine gave it another one gets one of its own.
    fn take_shared_memory(&self, guest: &mut GuestSpec) -> u64 {
        let Some(memory) = guest.shared_memory else {
            return 0;
        };
        let pods = *self.shared.shared_memory.get_or_init(|| memory.host);
        if pods == memory.host {
            return memory.bytes;
        }
        guest.keep_shared_memory_apart();
        0
    }

    async fn open_stdio(&self, stdio: &StdioPaths, key: &ProcessKey) -> Result<Endpoints, Error> {
        let namespace = &self.options().namespace;
        let opened = Endpoints::open(stdio, key, namespace).await;
        Ok(opened.map_err(StdioError::from)?)
    }

    /// A process of the host for a container that joins a pod of containerd's. By its pid, and no other, can another container ask for
    /// this one's PID namespace.
    fn process_for(&self, admission: Admission) -> Result<Option<Parked>, Error> {
        if admission == Admission::Boot || self.options().namespace.is_empty() {
            return Ok(None);
        }
        let named = self.shared.state.get().netns;
        let named = named.and_then(|path| File::open(path).ok());
        let own = self.shared.own_network.get().map(|own| &own.namespace);
        let namespace = named
            .as_ref()
            .or(own)
            .map_or(Namespace::Inherited, |netns| {
                Namespace::Network(netns.as_fd())
            });
        Parked::start(namespace).map(Some).map_err(Error::StandIn)
    }

    /// The container that a path to a PID namespace of the host means: the one whose process it names, or else the pod's first, for
    /// that is the namespace which engines share in a pod.
    async fn container_in(
        &self,
        namespace: &Path,
        new: &ContainerId,
    ) -> Result<Option<ContainerId>, Error> {
        let named = namespace.to_str().and_then(|path| {
            let pid = path.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?;
            pid.parse().ok()
        });
        let stood_for = named.and_then(|pid| self.container_of_stand_in(pid));
        let first = ContainerId::new(self.options().id.as_str()).ok();
        let new = new.clone();
        self.change(move |pod| {
            let by_pid = named.and_then(|pid| pod.container_of_pid(pid));
            let first = first.filter(|first| pod.container(first).is_ok());
            let by_pid = stood_for.or(by_pid);
            by_pid.or(first).filter(|found| *found != new)
        })
        .await
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

    /// Mounts the container's root where it is not there already, and reads its bundle.
    async fn mount_and_read(&self, new: &NewContainer) -> Result<(Bundle, GuestSpec), Error> {
        let new = new.clone();
        let (bundle, guest) = on_host(move || {
            if !new.rootfs.is_empty() {
                rootfs::mount_all(&new.rootfs, &new.bundle.join(ROOTFS))?;
            }
            crash::point("create.mounted");
            let bundle = Bundle::load(&new.bundle)?;
            let guest = bundle.for_guest(&new.id)?;
            Ok((bundle, guest))
        })
        .await?;
        self.check_belongs(bundle.spec())?;
        Ok((bundle, guest))
    }

    /// Whether the container belongs here, and asks for nothing that is not there.
    fn check_belongs(&self, spec: &Spec) -> Result<(), Error> {
        let this = self.options().id.as_str();
        let annotations = spec.annotations().clone().unwrap_or_default();
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
        check_annotations(annotations.keys())
    }

    /// Makes a network namespace on the host, for docker, nerdctl and `ctr run --cni` wire one after Create, by the pid that it gave.
    /// Gives its path in this process.
    fn make_network(&self) -> Result<PathBuf, Error> {
        let process =
            Parked::start(Namespace::New(CloneFlags::CLONE_NEWNET)).map_err(Error::StandIn)?;
        let namespace = process.namespace("net").map_err(Error::StandIn)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", namespace.as_raw_fd()));
        // There is one boot, and so one of it.
        let _ = self
            .shared
            .own_network
            .set(OwnNetwork { process, namespace });
        Ok(path)
    }

    /// The host's pid that stands for the pod.
    fn pod_pid(&self, machine: &Machine) -> u32 {
        let own = self.shared.own_network.get();
        own.map_or_else(|| machine.host_pid(), |own| own.process.pid())
    }

    /// Boots the VM.
    pub(super) async fn boot(&self, pod: PodSpec) -> Result<Arc<Machine>, Error> {
        let machine = Arc::new(machine::boot(self.options(), &pod, &self.shared.state).await?);
        let pid = self.pod_pid(&machine);
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
        self.remove_from_host(&key.container, machine.as_ref())
            .await;
        let forgotten = key.clone();
        let empty = self.apply(move |pod| {
            pod.forget(&forgotten);
            Ok(pod.is_unneeded())
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
        let process = guest_process(&new.process, new.stdio.terminal)?;
        let machine = self.machine().await?;
        let (target, exec, stdio) = (key.clone(), new.exec.clone(), new.stdio.clone());
        self.apply(move |pod| pod.begin_exec(&target, &exec, stdio))
            .await?;
        crash::point("exec.begun");
        let prepared = self.prepare_exec(&machine, &key, process, &new.stdio).await;
        if let Err(error) = prepared {
            let error = self.explain(error).await;
            let _ = machine.agent.delete_process(&key).await;
            // Last: from here on another one may have its name.
            let _ = self.change(move |pod| pod.forget(&key)).await;
            return Err(error);
        }
        self.watch_process(&machine, key);
        Ok(())
    }

    async fn prepare_exec(
        &self,
        machine: &Machine,
        key: &ProcessKey,
        process: Vec<u8>,
        stdio: &StdioPaths,
    ) -> Result<(), Error> {
        let endpoints = self.open_stdio(stdio, key).await?;
        machine
            .agent
            .exec_process(key, process, endpoints.for_agent(stdio.terminal))
            .await?;
        crash::point("exec.in-guest");
        let io = ProcessIo::attach(endpoints, &machine.dialer, key).await?;
        let created = key.clone();
        self.apply(move |pod| pod.created(&created, io).map(|_| ()))
            .await
    }
}

/// Refuses annotations that look like ours. None is defined yet, and one that is ignored would be a setting that somebody believes in.
pub fn check_annotations<'n>(mut names: impl Iterator<Item = &'n String>) -> Result<(), Error> {
    match names.find(|name| name.starts_with(OWN_ANNOTATIONS)) {
        Some(unknown) => Err(Error::Annotation(unknown.clone())),
        None => Ok(()),
    }
}

/// Whether a container is to have a network namespace that nobody has made yet.
fn wants_network(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none()
    })
}

/// The pod of a VM that comes with its first container.
fn pod_of(guest: &GuestSpec, spec: &Spec) -> PodSpec {
    PodSpec {
        hostname: guest.hostname.clone(),
        netns: guest.network_namespace.clone(),
        cgroup: guest.cgroup.clone(),
        size: PodSize::of(spec),
        block_devices: guest.block_devices.clone(),
        ..Default::default()
    }
}

/// Shows the container's root and volumes to the guest; gives the spec in which they have their places there.
async fn share(
    machine: &Arc<Machine>,
    id: &ContainerId,
    mut guest: GuestSpec,
) -> Result<GuestSpec, Error> {
    let (shown_by, container) = (machine.clone(), id.clone());
    let guest = on_host(move || {
        let share = &shown_by.share;
        if guest.read_only_rootfs {
            mount_points::make(&guest.rootfs, &guest.mount_points)?;
        }
        share.add_rootfs(&container, &guest.rootfs, guest.read_only_rootfs)?;
        let mut places = Vec::new();
        for bind in guest.binds.iter().filter(|bind| !bind.mirrored) {
            let (source, idmap) = (&bind.source, bind.idmap.as_ref());
            let shown = share.add_volume(&container, source, bind.read_only, idmap)?;
            places.push((bind.index, shown));
        }
        for (index, shown) in places {
            guest.place_volume(index, shown);
        }
        Ok(guest)
    })
    .await?;
    for bind in guest.binds.iter().filter(|bind| bind.mirrored) {
        let mirrors = &machine.mirrors;
        let added = mirrors.add(&machine.agent, id, bind.index, &bind.source);
        added.await?;
    }
    Ok(guest)
}

/// The OCI process of an exec as the agent gets it. CRI-O copies the container's process and changes only the request: what that
/// says about a terminal counts.
fn guest_process(process: &[u8], terminal: bool) -> Result<Vec<u8>, Error> {
    let malformed = |source| Error::Malformed {
        what: "the exec's process",
        source,
    };
    let mut value: serde_json::Value = serde_json::from_slice(process).map_err(malformed)?;
    let _: oci_spec::runtime::Process = serde_json::from_value(value.clone()).map_err(malformed)?;
    if !value.is_object() {
        return Err(malformed(serde::de::Error::custom("it is no object")));
    }
    value["terminal"] = terminal.into();
    spec::strip_process(&mut value);
    serde_json::to_vec(&value).map_err(malformed)
}
