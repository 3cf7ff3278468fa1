//! `state.json`: what a sandbox owns on the host, written before each resource is made.
//!
//! The supervisor writes it; `coffer list`, `state` and `delete` read it, and [`crate::cleanup`] needs nothing else. The
//! file is replaced by rename, so a reader sees one version or the next. It is not synced to disk: after a power
//! cut the processes and mounts it names are gone too.

use crate::cgroup::CgroupPath;
use crate::lease::OciRecord;
use crate::machine::child::ProcessId;
use crate::machine::options::SandboxOptions;
use crate::network::NamespaceId;
use crate::sandbox::process::VM_DIED;
use coffer_proto::ids::{ContainerId, ExecId, SandboxId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

/// The layout below. A reader refuses any other.
pub const STATE_VERSION: u32 = 1;
const FILE: &str = "state.json";

/// Why the state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("can't write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("can't read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} can't be parsed")]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{path} has version {version}, this program knows {STATE_VERSION}")]
    Version { path: PathBuf, version: u64 },
}

/// Where the sandbox is in its life, as far as the disk knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The supervisor runs; the VM is not there yet.
    Creating,
    /// The agent has answered.
    Running,
    /// The VM is gone, for this reason.
    Stopped { reason: String },
}

/// One step of the boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    pub name: String,
    /// When the step was done.
    pub at: Duration,
    pub clock: Clock,
}

/// Which zero a [`Phase`] counts from: the start of the boot recipe, of the hypervisor process, of the guest's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    Host,
    Hypervisor,
    Guest,
}

/// A container of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    pub bundle: PathBuf,
    pub created: SystemTime,
    /// A mount that the supervisor made for the container's root, as containerd's snapshot asked.
    pub mounted_rootfs: Option<PathBuf>,
    /// How its init process ended.
    pub exit: Option<ExitRecord>,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// 0-255; 128 + n for signal n, 137 for a VM that died.
    pub status: u32,
    pub at: SystemTime,
    /// Why it ended, where the process itself was not the cause: the VM's death.
    pub reason: Option<String>,
    /// The kernel killed in its memory cgroup.
    pub oom_killed: bool,
}

/// A process of the host that stands for one of the guest; see [`crate::lease`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandIn {
    pub container: ContainerId,
    /// None where it stands for the container's init process.
    pub exec: Option<ExecId>,
    pub process: ProcessId,
    pub record: OciRecord,
}

/// The content of `state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    pub created: SystemTime,
    pub options: SandboxOptions,
    pub status: Status,
    pub supervisor: ProcessId,
    pub hypervisor: Option<ProcessId>,
    pub fsd: Option<ProcessId>,
    /// The uid the hypervisor process runs as, taken from the options' range.
    pub uid: Option<u32>,
    pub cgroup: Option<CgroupPath>,
    /// The network namespace whose interfaces are redirected into the VM.
    pub netns: Option<PathBuf>,
    /// The same where it has no name: one network namespace has one VM.
    #[serde(default)]
    pub network: Option<NamespaceId>,
    pub phases: Vec<Phase>,
    /// `uname -r` of the guest.
    pub guest_kernel: Option<String>,
    pub containers: BTreeMap<ContainerId, ContainerRecord>,
    #[serde(default)]
    pub stand_ins: Vec<StandIn>,
}

impl State {
    /// The state of a sandbox that owns nothing yet but its supervisor.
    pub fn new(options: SandboxOptions, supervisor: ProcessId) -> Self {
        Self {
            version: STATE_VERSION,
            created: SystemTime::now(),
            options,
            status: Status::Creating,
            supervisor,
            hypervisor: None,
            fsd: None,
            uid: None,
            cgroup: None,
            netns: None,
            network: None,
            phases: Vec::new(),
            guest_kernel: None,
            containers: BTreeMap::new(),
            stand_ins: Vec::new(),
        }
    }

    /// Why the VM is gone; None before that.
    pub fn stopped(&self) -> Option<&str> {
        match &self.status {
            Status::Stopped { reason } => Some(reason),
            Status::Creating | Status::Running => None,
        }
    }

    /// Whether an engine has yet to delete a container: one for whose init a process of the host stands.
    pub fn is_awaited(&self) -> bool {
        let of_init = |known: &&StandIn| known.exec.is_none();
        let mut stand_ins = self.stand_ins.iter().filter(of_init);
        stand_ins.any(|known| self.containers.contains_key(&known.container))
    }

    /// Why the VM is gone, where a process with this exit status may have ended with it.
    pub fn vm_died_under(&self, status: u32) -> Option<&str> {
        self.stopped().filter(|_| status == VM_DIED)
    }

    /// Reads the state of a sandbox; None when there is none.
    pub fn load(root: &Path, id: &SandboxId) -> Result<Option<Self>, StateError> {
        let path = root.join(id).join(FILE);
        let text = match fs::read(&path) {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(source) => return Err(StateError::Read { path, source }),
            Ok(text) => text,
        };
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let parse = |source| StateError::Parse {
            path: path.clone(),
            source,
        };
        let Versioned { version } = serde_json::from_slice(&text).map_err(parse)?;
        if version != u64::from(STATE_VERSION) {
            return Err(StateError::Version { path, version });
        }
        serde_json::from_slice(&text).map(Some).map_err(parse)
    }
}

/// All sandboxes below a root, by name.
pub fn sandboxes(root: &Path) -> Result<Vec<SandboxId>, StateError> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            let path = root.to_owned();
            return Err(StateError::Read { path, source });
        }
    };
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let mut ids: Vec<_> = names.filter_map(|name| SandboxId::new(name).ok()).collect();
    ids.sort();
    Ok(ids)
}

/// The running sandbox whose VM has the network of this namespace. A container that is to join the namespace (`--network
/// container:NAME`) belongs into that VM, as it would into a pod's.
pub fn sandbox_in(root: &Path, network: NamespaceId) -> Result<Option<SandboxId>, StateError> {
    let is_in = |id: &SandboxId| {
        // One that can't be read has its own error when it is asked for by name.
        State::load(root, id).ok().flatten().is_some_and(|state| {
            state.network == Some(network)
                && state.stopped().is_none()
                && state.supervisor.is_alive()
        })
    };
    Ok(sandboxes(root)?.into_iter().find(is_in))
}

/// The state in memory and on disk.
#[derive(Debug)]
pub struct StateFile {
    dir: PathBuf,
    state: Mutex<State>,
}

impl StateFile {
    /// Writes the first version into the sandbox's directory.
    pub fn create(state: State) -> Result<Self, StateError> {
        let file = Self {
            dir: state.options.dir(),
            state: Mutex::new(state),
        };
        file.update(|_| {})?;
        Ok(file)
    }

    /// Changes the state, in memory and then on disk. Where the disk fails, memory keeps the change: it is the truth.
    pub fn update(&self, change: impl FnOnce(&mut State)) -> Result<(), StateError> {
        let mut state = self.state.lock().expect("no change panics");
        change(&mut state);
        let json = serde_json::to_vec_pretty(&*state).expect("the state has only string keys");
        let (new, path) = (self.dir.join("state.json.new"), self.dir.join(FILE));
        let written = fs::write(&new, json).and_then(|()| fs::rename(&new, &path));
        written.map_err(|source| StateError::Write { path, source })
    }

    /// A copy of the state now.
    pub fn get(&self) -> State {
        self.state.lock().expect("no change panics").clone()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::machine::options::{Hypervisor, UidRange};

    pub(crate) fn options(root: &Path, id: &str) -> SandboxOptions {
        SandboxOptions {
            id: SandboxId::new(id).unwrap(),
            root: root.to_owned(),
            hypervisor: Hypervisor::QemuEmulation,
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 128,
            max_memory_mib: 0,
            overhead_mib: 0,
            sized: true,
            kernel: "/nonexistent/vmlinux".into(),
            initrd: "/nonexistent/initrd".into(),
            kernel_params: Vec::new(),
            libexec: "/nonexistent".into(),
            debug: false,
            uids: UidRange::default(),
            cgroup: None,
            joins_cgroup: false,
            namespace: String::new(),
        }
    }

    #[test]
    fn the_state_survives_the_disk() {
        let root = tempfile::tempdir().unwrap();
        let options = options(root.path(), "s");
        fs::create_dir(options.dir()).unwrap();
        let id = options.id.clone();
        assert_eq!(State::load(root.path(), &id).unwrap(), None);
        let file = StateFile::create(State::new(options, ProcessId::current().unwrap())).unwrap();
        file.update(|state| {
            state.status = Status::Stopped {
                reason: "test".into(),
            }
        })
        .unwrap();
        assert_eq!(State::load(root.path(), &id).unwrap(), Some(file.get()));
    }

    #[test]
    fn only_names_of_sandboxes_are_listed() {
        let root = tempfile::tempdir().unwrap();
        for name in ["b", "a", ".staged", "no name"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let ids: Vec<_> = sandboxes(root.path())
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(ids, ["a", "b"]);
        assert!(sandboxes(&root.path().join("missing")).unwrap().is_empty());
    }

    #[test]
    fn a_running_sandbox_is_found_by_its_network_namespace() {
        let root = tempfile::tempdir().unwrap();
        let network = NamespaceId::of(Path::new("/proc/self/ns/net")).unwrap();
        let other = NamespaceId::of(Path::new("/proc/self/ns/uts")).unwrap();
        let make = |name: &str, network| {
            let options = options(root.path(), name);
            fs::create_dir(options.dir()).unwrap();
            let mut state = State::new(options, ProcessId::current().unwrap());
            state.network = network;
            StateFile::create(state).unwrap()
        };
        let (_none, _other) = (make("a", None), make("b", Some(other)));
        assert_eq!(sandbox_in(root.path(), network).unwrap(), None);
        let wanted = make("c", Some(network));
        let found = sandbox_in(root.path(), network).unwrap();
        assert_eq!(found.unwrap().as_str(), "c");
        let reason = "test".into();
        let ended = wanted.update(|state| state.status = Status::Stopped { reason });
        ended.unwrap();
        assert_eq!(sandbox_in(root.path(), network).unwrap(), None);
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("s")).unwrap();
        fs::write(root.path().join("s/state.json"), "{\"version\": 99}").unwrap();
        let error = State::load(root.path(), &SandboxId::new("s").unwrap()).unwrap_err();
        assert!(error.to_string().contains("version 99"), "{error}");
    }
}
