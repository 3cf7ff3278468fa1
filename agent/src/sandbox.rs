//! The pod as the guest sees it: its shared namespaces and its containers.

use crate::boot::Phases;
use crate::container::{self, Container, SharedNamespaces, Started};
use crate::cpus::CpuError;
use crate::disks::DiskError;
use crate::events::{Events, MemoryWatch};
use crate::guest::{self, GuestError};
use crate::mirror::{self, MirrorError};
use crate::network::{Cards, Change, Interface, NetworkError};
use crate::pause::{self, PauseError};
use crate::process::{Process, ProcessError, ProcessId, send_signal};
use crate::reaper::{Expectation, Reaper};
use crate::stdio::{Planned, StdioError};
use crate::streams::StreamEnd;
use crate::table::Table;
use coffer_proto::agent;
use coffer_proto::ids::{ContainerId, ExecId};
use coffer_proto::stream::Stream;
use nix::unistd::Pid;
use oci_spec::runtime;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::task::{JoinError, JoinSet, spawn_blocking};
use tokio::time::timeout;

/// Why a request could not be fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("the sandbox is not started")]
    NotStarted,
    #[error("the sandbox was started before")]
    StartedBefore,
    #[error("{0} does not exist")]
    NotFound(ProcessId),
    #[error("{0} exists already")]
    Exists(ProcessId),
    #[error("{0} did not end within {KILL_DEADLINE:?}")]
    Survived(ProcessId),
    #[error("can't {action} {id}")]
    Container {
        action: &'static str,
        id: ProcessId,
        #[source]
        cause: container::Error,
    },
    #[error("a worker thread ended")]
    Worker(#[from] JoinError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Pause(#[from] PauseError),
    #[error(transparent)]
    Cpus(#[from] CpuError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Mirror(#[from] MirrorError),
}

/// A process that never ran its program ends at once when it is told to.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// The sandbox. All methods are for many callers at once.
#[derive(Debug)]
pub struct Sandbox {
    reaper: Arc<Reaper>,
    phases: Mutex<Phases>,
    pub events: Arc<Events>,
    /// The namespaces of the pod, once it is started.
    pod: OnceLock<Arc<SharedNamespaces>>,
    /// Held while the sandbox is being started, which happens once.
    starting: tokio::sync::Mutex<()>,
    containers: Table<ContainerId, Member>,
    cards: Cards,
}

/// A container of the pod with its processes.
#[derive(Debug)]
pub struct Member {
    pub init: Arc<Process>,
    pub execs: Table<ExecId, Process>,
    memory: Arc<MemoryWatch>,
    /// Follows the memory events; ends with the container.
    _watching: JoinSet<std::io::Result<()>>,
}

impl Sandbox {
    pub fn new(reaper: Arc<Reaper>, phases: Phases) -> Self {
        Self {
            reaper,
            phases: Mutex::new(phases),
            events: Arc::default(),
            pod: OnceLock::new(),
            starting: tokio::sync::Mutex::default(),
            containers: Table::default(),
            cards: Cards::default(),
        }
    }

    /// Notes a boot phase.
    pub fn reach(&self, phase: &'static str) {
        self.phases
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .reach(phase);
    }

    /// Makes the guest ready for its pod, from the clock to the network.
    pub async fn start(
        &self,
        request: agent::StartSandboxRequest,
    ) -> Result<agent::StartSandboxResponse, SandboxError> {
        let _once = self.starting.lock().await;
        if self.pod.get().is_some() {
            return Err(SandboxError::StartedBefore);
        }
        guest::check_version(&request.version, coffer_proto::VERSION)?;
        let interfaces = request
            .interfaces
            .iter()
            .map(Interface::try_from)
            .collect::<Result<Vec<_>, _>>()?;
        let addresses = interfaces.iter().flat_map(|interface| &interface.addresses);
        let own: Vec<IpAddr> = addresses.map(|address| address.ip).collect();
        let (namespaces, request) =
            spawn_blocking(move || prepare_pod(&request, &own).map(|pod| (pod, request))).await??;
        for interface in &interfaces {
            self.cards.configure(interface).await?;
        }
        let names: Vec<&str> = interfaces.iter().map(|i| i.name.as_str()).collect();
        self.cards.put_away_all_but(&names).await?;
        // After the interfaces: some sysctls are theirs.
        guest::set_sysctls(&request.sysctls)?;
        let _ = self.pod.set(Arc::new(namespaces));
        self.reach("sandbox");
        Ok(agent::StartSandboxResponse {
            version: coffer_proto::VERSION.to_owned(),
            kernel_release: guest::kernel_release(),
            phases: self
                .phases
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .to_proto(),
            ..Default::default()
        })
    }

    fn pod(&self) -> Result<Arc<SharedNamespaces>, SandboxError> {
        self.pod.get().cloned().ok_or(SandboxError::NotStarted)
    }

    /// Creates a container up to the point before its program runs, in the PID namespace of `beside` if there is one.
    pub async fn create(
        &self,
        id: ProcessId,
        spec: runtime::Spec,
        stdio: agent::Stdio,
        beside: Option<ContainerId>,
    ) -> Result<Arc<Process>, SandboxError> {
        let mut pod = self.pod()?;
        if let Some(beside) = beside {
            let other = self.member(&beside)?;
            let shared = other.memory.container.shared_with(&pod);
            pod = Arc::new(shared.map_err(|cause| failed("create", &id, cause))?);
        }
        let name = self
            .containers
            .reserve(&id.container)
            .ok_or_else(|| SandboxError::Exists(id.clone()))?;
        let (stdio, child_stdio) = Planned::new(stdio).map_err(|cause| stdio_failed(&id, cause))?;
        let expectation = self.reaper.expect();
        let container_id = id.container.clone();
        let made =
            spawn_blocking(move || container::create(&container_id, &spec, child_stdio, &pod))
                .await?;
        let (container, created) = made.map_err(|cause| failed("create", &id, cause))?;
        let memory = Arc::new(MemoryWatch::new(
            id.container.clone(),
            Arc::new(container),
            self.events.clone(),
        ));
        match self.adopt(&id, created, stdio, &expectation, memory.clone()) {
            Ok(member) => {
                let init = member.init.clone();
                name.fill(Arc::new(member));
                Ok(init)
            }
            Err(error) => {
                // The error that matters is the first one.
                let _ = spawn_blocking(move || memory.container.delete()).await?;
                Err(error)
            }
        }
    }

    /// Makes a container that was just created a member of the pod.
    fn adopt(
        &self,
        id: &ProcessId,
        created: Started,
        stdio: Planned,
        expectation: &Expectation,
        memory: Arc<MemoryWatch>,
    ) -> Result<Member, SandboxError> {
        let changes = memory
            .container
            .oom_events()
            .map_err(|cause| failed("watch", id, cause))?;
        let init = Process::follow(id.clone(), created, stdio, expectation, memory.clone())?;
        let mut watching = JoinSet::new();
        watching.spawn(memory.clone().follow(changes));
        Ok(Member {
            init,
            execs: Table::default(),
            memory,
            _watching: watching,
        })
    }

    /// Prepares another process in a container.
    pub async fn exec(
        &self,
        id: ProcessId,
        exec: &ExecId,
        process: runtime::Process,
        stdio: agent::Stdio,
    ) -> Result<Arc<Process>, SandboxError> {
        let member = self.member(&id.container)?;
        let name = member
            .execs
            .reserve(exec)
            .ok_or_else(|| SandboxError::Exists(id.clone()))?;
        let (stdio, child_stdio) = Planned::new(stdio).map_err(|cause| stdio_failed(&id, cause))?;
        let expectation = self.reaper.expect();
        let memory = member.memory.clone();
        let made = spawn_blocking(move || memory.container.exec(&process, child_stdio)).await?;
        let created = made.map_err(|cause| failed("prepare", &id, cause))?;
        let process = Process::follow(id, created, stdio, &expectation, member.memory.clone())?;
        name.fill(process.clone());
        Ok(process)
    }

    /// Adds, replaces or takes away a network interface.
    pub async fn configure_interface(&self, change: &Change) -> Result<(), SandboxError> {
        self.pod()?;
        match change {
            Change::Set(interface) => self.cards.configure(interface).await?,
            Change::Gone(card) => self.cards.remove(*card).await?,
        }
        Ok(())
    }

    /// Changes the copy of a volume of a container, which may not be there yet.
    pub async fn change_mirror(
        &self,
        id: ContainerId,
        request: agent::ChangeMirrorRequest,
    ) -> Result<(), SandboxError> {
        self.pod()?;
        Ok(spawn_blocking(move || mirror::change(&id, &request)).await??)
    }

    /// Sends a signal to every process of a container.
    pub async fn signal_all(&self, id: &ContainerId, signal: i32) -> Result<(), SandboxError> {
        let member = self.member(id)?;
        if signal == libc::SIGKILL {
            member.init.killed_with_container();
            member
                .execs
                .all()
                .iter()
                .for_each(|(_, exec)| exec.killed_with_container());
            return self.with_container(id, "kill", Container::kill_all).await;
        }
        for pid in self.with_container(id, "signal", Container::pids).await? {
            // One that has ended meanwhile needs no signal.
            let _ = send_signal(pid, signal);
        }
        Ok(())
    }

    /// All processes of a container, ours with their names.
    pub async fn list(&self, id: &ContainerId) -> Result<Vec<agent::Process>, SandboxError> {
        let member = self.member(id)?;
        let pids = self
            .with_container(id, "list the processes of", Container::pids)
            .await?;
        let execs: HashMap<Pid, ExecId> = member
            .execs
            .all()
            .into_iter()
            .map(|(id, exec)| (exec.pid, id))
            .collect();
        let named = |pid| {
            let exec_id = execs
                .get(&pid)
                .cloned()
                .map(String::from)
                .unwrap_or_default();
            guest::process(pid).map(|process| agent::Process { exec_id, ..process })
        };
        Ok(pids.into_iter().filter_map(named).collect())
    }

    /// The container of this name.
    pub fn member(&self, id: &ContainerId) -> Result<Arc<Member>, SandboxError> {
        self.containers.get(id).ok_or_else(|| not_found(id))
    }

    /// The process of this name.
    pub fn process(&self, id: &ProcessId) -> Result<Arc<Process>, SandboxError> {
        let member = self.member(&id.container)?;
        match &id.exec {
            None => Ok(member.init.clone()),
            Some(exec) => member
                .execs
                .get(exec)
                .ok_or_else(|| SandboxError::NotFound(id.clone())),
        }
    }

    /// Hands out one stream of a process, once.
    pub fn attach(&self, id: &ProcessId, stream: Stream) -> Result<StreamEnd, SandboxError> {
        Ok(self.process(id)?.with_stdio(|stdio| stdio.attach(stream))?)
    }

    /// Runs a blocking operation of a container. One that fails because the container is deleted meanwhile says that.
    pub async fn with_container<T, F>(
        &self,
        id: &ContainerId,
        action: &'static str,
        operation: F,
    ) -> Result<T, SandboxError>
    where
        T: Send + 'static,
        F: FnOnce(&Container) -> Result<T, container::Error> + Send + 'static,
    {
        let member = self.member(id)?;
        let memory = member.memory.clone();
        let done = spawn_blocking(move || operation(&memory.container)).await?;
        done.map_err(|cause| match self.member(id) {
            Ok(same) if Arc::ptr_eq(&same, &member) => {
                let container = id.clone();
                let id = ProcessId {
                    container,
                    exec: None,
                };
                failed(action, &id, cause)
            }
            Ok(_) => not_found(id),
            Err(gone) => gone,
        })
    }

    /// Forgets a process that has ended or never ran; with a container's init goes the container.
    pub async fn delete(&self, id: &ProcessId) -> Result<(), SandboxError> {
        let deleted = self.delete_process(id).await;
        if id.exec.is_none() && matches!(deleted, Ok(()) | Err(SandboxError::NotFound(_))) {
            // A container that could not be created has its copies of volumes all the same.
            let container = id.container.clone();
            spawn_blocking(move || mirror::remove(&container)).await??;
        }
        deleted
    }

    async fn delete_process(&self, id: &ProcessId) -> Result<(), SandboxError> {
        let member = self.member(&id.container)?;
        match &id.exec {
            Some(exec) => {
                let process = self.process(id)?;
                settle(&process).await?;
                let taken = member.execs.take(exec);
                taken
                    .map(drop)
                    .ok_or_else(|| SandboxError::NotFound(id.clone()))
            }
            None => self.delete_container(id, &member).await,
        }
    }

    async fn delete_container(&self, id: &ProcessId, member: &Member) -> Result<(), SandboxError> {
        settle(&member.init).await?;
        let (taken, name) = self
            .containers
            .take(&id.container)
            .ok_or_else(|| SandboxError::NotFound(id.clone()))?;
        let memory = taken.memory.clone();
        match spawn_blocking(move || memory.container.delete()).await? {
            Ok(()) => Ok(()),
            Err(cause) => {
                name.fill(taken);
                Err(failed("delete", id, cause))
            }
        }
    }
}

/// Brings a process to its end if it never ran; one that runs is not ours to end.
async fn settle(process: &Process) -> Result<(), SandboxError> {
    process.give_up()?;
    let ended = timeout(KILL_DEADLINE, process.wait()).await;
    ended
        .map(drop)
        .map_err(|_| SandboxError::Survived(process.id.clone()))
}

fn stdio_failed(id: &ProcessId, cause: StdioError) -> ProcessError {
    ProcessError::Stdio {
        id: id.clone(),
        cause,
    }
}

fn not_found(container: &ContainerId) -> SandboxError {
    SandboxError::NotFound(ProcessId {
        container: container.clone(),
        exec: None,
    })
}

fn failed(action: &'static str, id: &ProcessId, cause: container::Error) -> SandboxError {
    SandboxError::Container {
        action,
        id: id.clone(),
        cause,
    }
}

/// The blocking part of the start. The pod's network, IPC and UTS namespaces are the guest's own.
fn prepare_pod(
    request: &agent::StartSandboxRequest,
    own: &[IpAddr],
) -> Result<SharedNamespaces, SandboxError> {
    if let Some(time) = request.time.as_ref() {
        guest::resync(time)?;
    }
    guest::set_names(&request.hostname, &request.resolv_conf, own)?;
    if !request.share_tag.is_empty() {
        guest::mount_share(&request.share_tag)?;
    }
    let pid = request
        .shared_pid_namespace
        .then(pause::make_namespace)
        .transpose()?;
    Ok(SharedNamespaces {
        pid,
        ..Default::default()
    })
}
