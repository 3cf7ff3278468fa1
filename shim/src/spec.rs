//! From the OCI bundle on the host to the spec that the agent gets.
//!
//! The host's half of a spec is taken out here: the root file system and bind sources become mounts of the sandbox's share,
//! a network namespace becomes the VM's network, host hooks stay on the host. What is left is sent to the agent,
//! which honours a field or refuses it by name.

mod binds;
mod devices;
mod labels;
mod need;
mod pods_files;
mod shared_memory;

pub use binds::Bind;
pub use devices::{BlockDevice, DeviceNumber};
pub use labels::strip_process;
pub use need::{Limit, Need, cpus, memory_mib};
pub use shared_memory::{HostTmpfs, SharedMemory};

use crate::cgroup::CgroupPath;
use crate::mount_points::MountPoint;
use binds::Taken;
use coffer_proto::ids::ContainerId;
use coffer_proto::limits::SHARE_DIR;
use oci_spec::runtime::{Hook, HooksBuilder, Linux, LinuxNamespaceType, Spec};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The agent's RPC takes 4 MiB; a spec this large would be no spec.
pub const MAX_CONFIG_BYTES: u64 = 3 << 20;

/// Why a bundle can't be run. The message names the field and its value.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("the bundle {path} can't be read")]
    Bundle { path: PathBuf, source: io::Error },
    #[error("{path} is larger than {MAX_CONFIG_BYTES} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path}: {field} can't be parsed")]
    Parse {
        path: PathBuf,
        field: String,
        source: serde_json::Error,
    },
    #[error("config.json: {field} {value:?} {reason}")]
    Field {
        field: String,
        value: String,
        reason: &'static str,
    },
    #[error("config.json: {field} is missing")]
    Missing { field: &'static str },
    #[error(
        "config.json: linux.namespaces has no {kind} namespace: the host's ({kubernetes}) can't be had in a VM"
    )]
    HostNamespace {
        kind: LinuxNamespaceType,
        kubernetes: &'static str,
    },
    #[error("config.json: {field} {path} can't be used")]
    Source {
        field: String,
        path: PathBuf,
        source: io::Error,
    },
}

fn field<T>(
    field: impl Into<String>,
    value: impl Into<String>,
    reason: &'static str,
) -> Result<T, SpecError> {
    Err(SpecError::Field {
        field: field.into(),
        value: value.into(),
        reason,
    })
}

/// Namespaces that a container has, by itself or with its pod, or else shares with the host; and how Kubernetes asks for that.
const NEVER_THE_HOSTS: [(LinuxNamespaceType, &str); 3] = [
    (LinuxNamespaceType::Network, "hostNetwork"),
    (LinuxNamespaceType::Pid, "hostPID"),
    (LinuxNamespaceType::Ipc, "hostIPC"),
];

/// A bundle that was read and whose host side was checked.
#[derive(Debug)]
pub struct Bundle {
    spec: Spec,
    dir: PathBuf,
    rootfs: PathBuf,
}

/// A spec split into what the agent gets and what the shim does.
#[derive(Debug)]
pub struct GuestSpec {
    /// The OCI spec for the agent, but for what depends on the VM.
    spec: Spec,
    pub rootfs: PathBuf,
    pub read_only_rootfs: bool,
    /// Volumes, to be added to the share before the container is created.
    pub binds: Vec<Bind>,
    /// Where mounts go in the container, in the order of the spec.
    pub mount_points: Vec<MountPoint>,
    /// Where it has that of its pod.
    pub shared_memory: Option<SharedMemory>,
    /// Block devices of the host that it is given.
    pub block_devices: Vec<BlockDevice>,
    pub terminal: bool,
    /// `linux.namespaces` of type network with a path: where the VM's network comes from.
    pub network_namespace: Option<PathBuf>,
    /// The same of type pid: the container joins that of another one.
    pub pid_namespace: Option<PathBuf>,
    pub hostname: Option<String>,
    /// `linux.cgroupsPath`.
    pub cgroup: Option<CgroupPath>,
    /// What it needs of the VM.
    pub need: Need,
    /// Hooks that run on the host, in the runtime's namespaces.
    pub host_hooks: HostHooks,
}

/// OCI hooks of the runtime namespace (spec, "POSIX-platform hooks").
#[derive(Debug, Default)]
pub struct HostHooks {
    pub prestart: Vec<Hook>,
    pub create_runtime: Vec<Hook>,
    pub poststart: Vec<Hook>,
    pub poststop: Vec<Hook>,
}

impl Bundle {
    /// Reads `config.json` and checks what belongs to the host.
    pub fn load(dir: &Path) -> Result<Self, SpecError> {
        let path = dir.join("config.json");
        let mut text = Vec::new();
        let file = fs::File::open(&path).map_err(|source| SpecError::Bundle {
            path: path.clone(),
            source,
        })?;
        file.take(MAX_CONFIG_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(|source| SpecError::Bundle {
                path: path.clone(),
                source,
            })?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(SpecError::TooLarge { path });
        }
        let mut json = serde_json::Deserializer::from_slice(&text);
        let spec: Spec =
            serde_path_to_error::deserialize(&mut json).map_err(|error| SpecError::Parse {
                path,
                field: error.path().to_string(),
                source: error.into_inner(),
            })?;
        check(&spec)?;
        check_namespaces(&spec)?;
        let rootfs = find_rootfs(&spec, dir)?;
        Ok(Self {
            spec,
            dir: dir.to_owned(),
            rootfs,
        })
    }

    /// The spec as it was read.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Splits the spec for a container of this id.
    pub fn for_guest(&self, id: &ContainerId) -> Result<GuestSpec, SpecError> {
        let mut spec = self.spec.clone();
        let read_only_rootfs = spec
            .root()
            .as_ref()
            .and_then(oci_spec::runtime::Root::readonly)
            .unwrap_or(false);
        if let Some(root) = spec.root_mut() {
            root.set_path(PathBuf::from(format!("{SHARE_DIR}/{id}/rootfs")));
        }
        let block_devices = devices::take(&mut spec)?;
        let (mut binds, mut shared_memory) = (Vec::new(), None);
        let user = binds::user_mappings(&spec);
        if let Some(mounts) = spec.mounts_mut() {
            for (i, mount) in mounts.iter_mut().enumerate() {
                match binds::take(mount, i, id, &self.dir, &user)? {
                    Taken::Guests => {}
                    Taken::Volume(bind) => binds.push(bind),
                    Taken::SharedMemory(memory) => shared_memory = Some(memory),
                }
            }
        }
        let mount_points = mount_points(&spec, &binds);
        let labels = labels::strip(&mut spec);
        if !labels.is_empty() {
            tracing::info!(container = %id, ?labels, "labels of the host are left out: the guest has no such module");
        }
        let HostSide {
            network_namespace,
            pid_namespace,
            cgroup,
        } = take_host_side_of_linux(&mut spec)?;
        let host_hooks = take_host_hooks(&mut spec)?;
        Ok(GuestSpec {
            rootfs: self.rootfs.clone(),
            read_only_rootfs,
            binds,
            mount_points,
            shared_memory,
            block_devices,
            terminal: spec
                .process()
                .as_ref()
                .and_then(oci_spec::runtime::Process::terminal)
                .unwrap_or(false),
            network_namespace,
            pid_namespace,
            hostname: spec.hostname().clone(),
            cgroup,
            need: Need::of(&spec),
            host_hooks,
            spec,
        })
    }
}

impl GuestSpec {
    /// The spec as the agent takes it.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.spec).expect("a spec that was parsed can be written")
    }
}

/// What must be there before anything is created. The agent checks the rest against its kernel.
fn check(spec: &Spec) -> Result<(), SpecError> {
    let version = spec.version();
    if version.split('.').next() != Some("1") {
        return field("ociVersion", version, "is not a 1.x version");
    }
    for (name, present) in [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
    ] {
        if present {
            return field(name, "{…}", "belongs to another platform");
        }
    }
    let Some(process) = spec.process() else {
        return Err(SpecError::Missing { field: "process" });
    };
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(SpecError::Missing {
            field: "process.args",
        });
    }
    if !process.cwd().is_absolute() {
        return field(
            "process.cwd",
            process.cwd().display().to_string(),
            "is not an absolute path",
        );
    }
    if let Some(bad) = process
        .env()
        .iter()
        .flatten()
        .position(|e| e.contains('\0') || !e.contains('='))
    {
        let value = &process.env().as_ref().expect("it has an entry")[bad];
        return field(format!("process.env[{bad}]"), value, "is not NAME=VALUE");
    }
    if let Some(hostname) = spec.hostname()
        && (hostname.len() > 64 || hostname.contains('\0'))
    {
        return field(
            "hostname",
            hostname,
            "is longer than 64 bytes or has a NUL in it",
        );
    }
    Ok(())
}

/// A namespace that the spec does not list is the caller's: the host's.
fn check_namespaces(spec: &Spec) -> Result<(), SpecError> {
    let Some(listed) = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref()) else {
        return Ok(());
    };
    for (kind, kubernetes) in NEVER_THE_HOSTS {
        if !listed.iter().any(|namespace| namespace.typ() == kind) {
            return Err(SpecError::HostNamespace { kind, kubernetes });
        }
    }
    Ok(())
}

fn find_rootfs(spec: &Spec, dir: &Path) -> Result<PathBuf, SpecError> {
    let Some(root) = spec.root() else {
        return Err(SpecError::Missing { field: "root" });
    };
    let path = dir.join(root.path());
    let meta = fs::symlink_metadata(&path).map_err(|source| SpecError::Source {
        field: "root.path".into(),
        path: path.clone(),
        source,
    })?;
    if meta.is_symlink() {
        return field("root.path", path.display().to_string(), "is a symlink");
    }
    if !meta.is_dir() {
        return field(
            "root.path",
            path.display().to_string(),
            "is not a directory",
        );
    }
    if path.canonicalize().is_ok_and(|p| p == Path::new("/")) {
        return field(
            "root.path",
            path.display().to_string(),
            "is the root of the host",
        );
    }
    Ok(path)
}

fn mount_points(spec: &Spec, binds: &[Bind]) -> Vec<MountPoint> {
    let is_file = |i: usize| {
        binds
            .iter()
            .any(|bind| bind.index == i && !bind.source.is_dir())
    };
    let mounts = spec.mounts().iter().flatten().enumerate();
    mounts
        .map(|(i, mount)| MountPoint {
            path: mount.destination().clone(),
            file: is_file(i),
        })
        .collect()
}

/// What `linux` says of the host.
#[derive(Debug, Default)]
struct HostSide {
    network_namespace: Option<PathBuf>,
    pid_namespace: Option<PathBuf>,
    cgroup: Option<CgroupPath>,
}

/// Removes paths of host namespaces and cgroups: in the guest the pod's own take their place.
fn take_host_side_of_linux(spec: &mut Spec) -> Result<HostSide, SpecError> {
    let mut host = HostSide::default();
    let Some(linux) = spec.linux_mut() else {
        return Ok(host);
    };
    if let Some(namespaces) = linux.namespaces_mut() {
        for namespace in namespaces.iter_mut() {
            let path = namespace
                .path()
                .clone()
                .filter(|path| !path.as_os_str().is_empty());
            match namespace.typ() {
                LinuxNamespaceType::Network => host.network_namespace = path,
                LinuxNamespaceType::Pid => host.pid_namespace = path,
                _ => {}
            }
            namespace.set_path(None);
        }
        // The agent is told of another container's PID namespace by that container's name.
        if host.pid_namespace.is_some() {
            namespaces.retain(|n| n.typ() != LinuxNamespaceType::Pid);
        }
    }
    host.cgroup = cgroup(linux)?;
    linux.set_cgroups_path(None);
    Ok(host)
}

fn cgroup(linux: &Linux) -> Result<Option<CgroupPath>, SpecError> {
    let path = linux.cgroups_path().as_deref().map(Path::to_string_lossy);
    let Some(path) = path.filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    match CgroupPath::parse(&path) {
        Ok(path) => Ok(Some(path)),
        Err(error) => field("linux.cgroupsPath", error.path, error.reason),
    }
}

#[allow(
    deprecated,
    reason = "prestart is deprecated in the OCI spec but podman and docker still write it"
)]
fn take_host_hooks(spec: &mut Spec) -> Result<HostHooks, SpecError> {
    let Some(hooks) = spec.hooks().clone() else {
        return Ok(HostHooks::default());
    };
    let all = |list: &Option<Vec<Hook>>| list.clone().unwrap_or_default();
    let host = HostHooks {
        prestart: all(hooks.prestart()),
        create_runtime: all(hooks.create_runtime()),
        poststart: all(hooks.poststart()),
        poststop: all(hooks.poststop()),
    };
    let named = [
        ("prestart", &host.prestart),
        ("createRuntime", &host.create_runtime),
        ("poststart", &host.poststart),
        ("poststop", &host.poststop),
    ];
    for (kind, list) in named {
        if let Some(i) = list.iter().position(|hook| !hook.path().is_absolute()) {
            return field(
                format!("hooks.{kind}[{i}].path"),
                list[i].path().display().to_string(),
                "is not an absolute path",
            );
        }
    }
    let guest = HooksBuilder::default()
        .create_container(all(hooks.create_container()))
        .start_container(all(hooks.start_container()))
        .build()
        .expect("every field of hooks is optional");
    spec.set_hooks(Some(guest));
    Ok(host)
}

#[cfg(test)]
mod tests;
