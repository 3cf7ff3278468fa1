//! `coffer create`: a container of a bundle, and a process of the host that stands for it.
//!
//! ```text
//! conmon ── coffer create ──► finds the supervisor of the pod, or of the network to join, or starts one
//!              │ starts a stand-in and tells it its order ──►  session, cgroup, network namespace; takes its lease
//!              │ ◄── ready ──
//!              │ runs the hooks of the host
//!              │ ── go ──►  Create at the supervisor, terminal to the engine, pid file
//!              │ ◄── done ──
//!              ▼ exits, and whoever reaps orphans here (conmon) is the stand-in's parent
//! ```

use super::client::Task;
use super::options::{CreateOptions, DetachedOptions};
use super::order::{self, Network, Order, Places, StandInProcess};
use super::supervisor::{self, Supervisor};
use super::view::{View, Volume};
use super::{Error, find, inspect, unicode};
use crate::cgroup::{CgroupPath, SandboxCgroup};
use crate::check;
use crate::config::Config;
use crate::hooks;
use crate::lease::OciRecord;
use crate::machine::SandboxOptions;
use crate::network::NamespaceId;
use crate::sandbox::create::SANDBOX_ANNOTATIONS;
use crate::spec::{Bind, Bundle, GuestSpec};
use crate::state::{State, sandbox_in};
use coffer_proto::error_chain::chain;
use coffer_proto::ids::{ContainerId, SandboxId};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Another create may be starting the pod's supervisor; how long it is waited for, and how often is looked.
const OTHERS_START: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);

/// Creates the container, and its stand-in, which is left behind.
pub(super) async fn create(config: &Config, options: &CreateOptions) -> Result<(), Error> {
    let id =
        ContainerId::new(options.target.id.as_str()).expect("both kinds of id have the same form");
    let given = options.bundle.as_deref().unwrap_or(Path::new("."));
    let container = New {
        id,
        bundle: given,
        options: &options.detached,
        foreground: false,
    };
    container.create(config).await.map(drop)
}

/// A container to be created.
pub(super) struct New<'a> {
    pub(super) id: ContainerId,
    pub(super) bundle: &'a Path,
    pub(super) options: &'a DetachedOptions,
    /// The caller stays, and its terminal is the container's if nobody asks for another.
    pub(super) foreground: bool,
}

impl New<'_> {
    /// Creates it; gives its stand-in.
    pub(super) async fn create(self, config: &Config) -> Result<StandInProcess, Error> {
        check::need_root()?;
        let id = self.id;
        let directory = self.bundle.canonicalize().and_then(unicode::path);
        let directory = directory.map_err(|source| Error::Io {
            what: format!("the bundle {:?} can't be used", self.bundle),
            source,
        })?;
        let bundle = Bundle::load(&directory)?;
        let guest = bundle.for_guest(&id)?;
        if !self.foreground || self.options.console_socket.is_some() {
            check_options(self.options, guest.terminal)?;
        }
        if find::holder(&config.root, &id)?.is_some() {
            return Err(Error::ContainerExists { id });
        }
        let creation = Creation {
            config,
            sandbox: sandbox_of(&config.root, &bundle, &guest, &id)?,
            id,
            directory,
            bundle,
            guest,
        };
        let started = creation.supervisor().await?;
        match creation.container(self.options).await {
            Ok(process) => {
                if let Some(supervisor) = started {
                    supervisor.detach();
                }
                Ok(process)
            }
            Err(error) => {
                creation.undo(started).await;
                Err(error)
            }
        }
    }
}

/// What engines can ask for and not get is refused before anything is made.
pub(super) fn check_options(options: &DetachedOptions, terminal: bool) -> Result<(), Error> {
    if options.preserve_fds > 0 {
        return Err(Error::Usage(format!(
            "--preserve-fds {}: descriptors of the host can't be passed into a VM",
            options.preserve_fds
        )));
    }
    match (terminal, &options.console_socket) {
        (true, None) => Err(Error::Usage(
            "the process has a terminal, which needs --console-socket".into(),
        )),
        (false, Some(_)) => Err(Error::Usage(
            "--console-socket is for a process with a terminal, and process.terminal is false"
                .into(),
        )),
        _ => Ok(()),
    }
}

/// A container on its way.
struct Creation<'a> {
    config: &'a Config,
    id: ContainerId,
    directory: PathBuf,
    bundle: Bundle,
    guest: GuestSpec,
    sandbox: SandboxId,
}

impl Creation<'_> {
    /// Makes sure that the sandbox's supervisor serves; gives it if it was started here.
    async fn supervisor(&self) -> Result<Option<Supervisor>, Error> {
        let id = &self.sandbox;
        if Task::connect(&self.config.root, id).await.is_ok() {
            return Ok(None);
        }
        if self.config.root.join(id).exists() {
            return self.wait_for_supervisor(id).await.map(|()| None);
        }
        let options = self.sandbox_options(id.clone())?;
        match Supervisor::start_apart(options, self.config.log_level.as_str()).await {
            Ok(supervisor) => Ok(Some(supervisor)),
            // Another container of the pod was faster.
            Err(_) if Task::connect(&self.config.root, id).await.is_ok() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn wait_for_supervisor(&self, id: &SandboxId) -> Result<(), Error> {
        let until = Instant::now() + OTHERS_START;
        while Task::connect(&self.config.root, id).await.is_err() {
            let found = State::load(&self.config.root, id)?;
            let starting = found.is_none_or(|state| state.supervisor.is_alive());
            if !starting || Instant::now() > until {
                return Err(Error::Dead {
                    id: id.clone(),
                    reason: "its supervisor died; coffer delete removes what is left".into(),
                });
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    fn sandbox_options(&self, id: SandboxId) -> Result<SandboxOptions, Error> {
        let choice = check::choose_hypervisor(self.config.hypervisor, &self.config.libexec())?;
        check::guest_image(self.config).map_err(Error::GuestImage)?;
        let mut options = self.config.sandbox(id, choice.hypervisor);
        options.cgroup = self.cgroup_of_vm(&options.id);
        Ok(options)
    }

    /// That of a VM for one container is in the container's, which so has the figures of all it causes; that of a pod's is beside
    /// its first container's, below the limits of the pod, and does not end with that container.
    fn cgroup_of_vm(&self, id: &SandboxId) -> Option<CgroupPath> {
        let container = self.guest.cgroup.as_ref()?;
        Some(if pod_of(self.bundle.spec()).is_some() {
            container.sibling(&format!("coffer-{id}"))
        } else {
            container.of_vm()
        })
    }

    async fn container(&self, options: &DetachedOptions) -> Result<StandInProcess, Error> {
        let spec = self.bundle.spec();
        let order = Order {
            sandbox: self.sandbox.clone(),
            container: self.id.clone(),
            exec: None,
            bundle: self.directory.clone(),
            terminal: self.guest.terminal,
            console_size: console_size(spec),
            places: Places::absolute(options)?,
            cgroup: self.guest.cgroup.clone(),
            network: network(spec),
            record: Some(self.record()),
            view: Some(self.view()),
        };
        let mut process = order::start(&self.config.root, &order).await?;
        process.ready().await?;
        let hooks = &self.guest.host_hooks;
        let state = inspect::hook_state(
            &self.id,
            "creating",
            process.pid(),
            &self.directory,
            spec.annotations().as_ref(),
        );
        hooks::run("prestart", &hooks.prestart, &state).await?;
        hooks::run("createRuntime", &hooks.create_runtime, &state).await?;
        process.go().await?;
        Ok(process)
    }

    fn view(&self) -> View {
        let mounts = self.bundle.spec().mounts().as_deref().unwrap_or_default();
        let volume = |bind: &Bind| Volume {
            source: bind.source.clone(),
            destination: mounts[bind.index].destination().clone(),
            read_only: bind.read_only,
        };
        View {
            rootfs: self.guest.rootfs.clone(),
            read_only: self.guest.read_only_rootfs,
            volumes: self.guest.binds.iter().map(volume).collect(),
        }
    }

    fn record(&self) -> OciRecord {
        let hooks = &self.guest.host_hooks;
        OciRecord {
            cgroup: self.guest.cgroup.clone(),
            annotations: self.bundle.spec().annotations().clone().unwrap_or_default(),
            poststart: hooks.poststart.clone(),
            poststop: hooks.poststop.clone(),
        }
    }

    /// Nothing half-created stays. What goes wrong here must not hide the reason.
    async fn undo(&self, started: Option<Supervisor>) {
        if let Some(cgroup) = &self.guest.cgroup {
            let _ = SandboxCgroup::at(&cgroup.of_stand_ins()).remove();
        }
        if let Some(supervisor) = started {
            self.end(supervisor).await;
        }
        if let Some(cgroup) = &self.guest.cgroup {
            let _ = SandboxCgroup::at(cgroup).remove();
        }
    }

    async fn end(&self, supervisor: Supervisor) {
        let id = &self.sandbox;
        if let Ok(task) = Task::connect(&self.config.root, id).await {
            let _ = task.shutdown(id).await;
        }
        if let Err(error) = supervisor.ended().await {
            eprintln!("coffer: warning: {}", chain(&error));
        }
        let _ = supervisor::remove(self.config.root.clone(), id.clone()).await;
    }
}

/// The pod that the annotations name.
fn pod_of(spec: &Spec) -> Option<&str> {
    let annotations = spec.annotations().as_ref()?;
    let mut names = SANDBOX_ANNOTATIONS.iter();
    names.find_map(|name| annotations.get(*name).map(String::as_str))
}

/// Where a container belongs: into its pod, into the VM of the container whose network it joins, or into one of its own.
fn sandbox_of(
    root: &Path,
    bundle: &Bundle,
    guest: &GuestSpec,
    id: &ContainerId,
) -> Result<SandboxId, Error> {
    if let Some(pod) = pod_of(bundle.spec()) {
        return SandboxId::new(pod).map_err(|error| Error::Usage(error.to_string()));
    }
    if let Some(path) = &guest.network_namespace
        && let Some(joined) = sandbox_in(root, NamespaceId::of_pod(path)?)?
    {
        return Ok(joined);
    }
    let own = SandboxId::new(id.as_str()).expect("both kinds of id have the same form");
    let left = State::load(root, &own)?.filter(|state| state.supervisor.is_alive());
    match left.and_then(|mut left| left.containers.pop_first()) {
        // It ended before those that had joined its network, and gets another one now.
        Some((other, _)) => Err(Error::NetworkHeld {
            id: id.clone(),
            other,
        }),
        None => Ok(own),
    }
}

fn console_size(spec: &Spec) -> Option<(u16, u16)> {
    let size = spec.process().as_ref()?.console_size()?;
    let side = |length: u64| u16::try_from(length).unwrap_or(u16::MAX);
    Some((side(size.height()), side(size.width())))
}

/// Where the stand-in has to be for the spec's network.
fn network(spec: &Spec) -> Network {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let network = namespaces
        .into_iter()
        .flatten()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    match network.map(|namespace| namespace.path().clone()) {
        None => Network::Callers,
        Some(None) => Network::New,
        Some(Some(path)) => Network::Path(path),
    }
}
