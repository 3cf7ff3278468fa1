//! The boot recipe: from the options of a sandbox to a machine whose agent has answered.
//!
//! [`boot`] writes to `state.json` before it makes a thing, so whatever point it fails or is killed at, [`crate::cleanup`] finds
//! everything.

use super::child::Child;
use super::disks::Disks;
use super::evidence::Evidence;
use super::memory::GuestMemory;
use super::parts::{self, BootCause};
use super::phases::Phases;
use super::wiring::Wiring;
use super::{BETTER_REASON, Cpus, Machine, Pod, SandboxOptions};
use crate::agent::{Agent, AgentError};
use crate::cleanup;
use crate::crash;
use crate::io::Dialer;
use crate::mirror::Mirrors;
use crate::network::{NamespaceId, Nic, PortForward};
use crate::share::Share;
use crate::state::StateFile;
use crate::vmm::{Vmm, VmmError};
use coffer_proto::agent::{Interface, Resync, StartSandboxRequest};
use coffer_proto::error_chain::chain;
use coffer_proto::limits::SHARE_TAG;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// Why there is no machine, with what its processes and its console said last.
#[derive(Debug, thiserror::Error)]
#[error("the VM did not start: {}{evidence}", chain(.cause))]
pub struct BootError {
    cause: BootCause,
    evidence: String,
}

impl From<VmmError> for BootCause {
    fn from(error: VmmError) -> Self {
        match error {
            VmmError::Gone(reason) => Self::Gone(reason),
            other => Self::Vmm(other),
        }
    }
}

/// Boots the machine. On an error everything it had made is gone again.
///
/// The time until the agent has answered is limited by [`super::Hypervisor::boot_deadline`].
pub async fn boot(
    options: &SandboxOptions,
    pod: &Pod,
    state: &StateFile,
) -> Result<Machine, BootError> {
    let mut evidence = Evidence::default();
    let options = &pod.size.apply(options.clone());
    let cause = match assemble(options, pod, state, &mut evidence).await {
        Ok(machine) => return Ok(machine),
        Err(cause) => cause,
    };
    let evidence = evidence.collect(&chain(&cause)).await;
    let owned = state.get();
    let released = tokio::task::spawn_blocking(move || cleanup::release(&owned)).await;
    if let Ok(Err(error)) = released {
        tracing::error!(
            error = chain(&error),
            "something of the failed boot is left"
        );
    }
    Err(BootError { cause, evidence })
}

async fn assemble(
    options: &SandboxOptions,
    pod: &Pod,
    state: &StateFile,
    evidence: &mut Evidence,
) -> Result<Machine, BootCause> {
    let slowness = options.hypervisor.slowness();
    let phases = Phases::new(state);
    let files = parts::BootFiles::open(options)?;
    let dir = options.dir();
    let console = parts::create_console(&dir)?;
    evidence.console = Some(console.try_clone().map_err(BootCause::Console)?);
    crash::point("boot.console");
    let uid = parts::take_uid(options, state)?;
    crash::point("boot.uid");
    let share = Share::create(&dir)?;
    phases.done("share")?;

    let cgroup = parts::create_cgroup(
        options,
        options.cgroup.as_ref().or(pod.cgroup.as_ref()),
        state,
    )?;
    crash::point("boot.cgroup");
    let (disks, disk_slots) = Disks::begin(options.hypervisor, &pod.block_devices)?;
    let room = options.hypervisor.nic_slots(disk_slots.len());
    let (wiring, nics) = begin_wiring(room, pod.netns.as_deref(), uid, state).await?;
    phases.done("network")?;

    let (fsd, fs_socket) = start_fsd(options, &share, state, evidence)?;
    let vmm = start_vmm(options, state, evidence)?;
    if let Some(cgroup) = &cgroup {
        cgroup.add(fsd.id.pid)?;
        cgroup.add(vmm.process.id.pid)?;
    }
    phases.done("processes")?;

    let interfaces = wiring.as_ref().map(Wiring::interfaces).unwrap_or_default();
    let wires = parts::Wires {
        fs_socket,
        nics,
        nic_slots: wiring.as_ref().map_or(0, Wiring::slots),
        disks: disk_slots,
        console: &console,
    };
    let (config, sent, home) = parts::vm_config(options, uid, files, wires)?;
    let deadline = options.hypervisor.boot_deadline();
    vmm.boot(config, sent, deadline).await?;
    phases.done("vm")?;

    let agent = Agent::new(home, slowness).map_err(BootCause::Socket)?;
    let request = start_request(options, pod, interfaces)?;
    let answered = tokio::select! {
        answered = agent.start_sandbox(&request, deadline) => answered,
        reason = first_end(&vmm, &fsd) => return Err(BootCause::Gone(reason)),
    };
    match answered {
        Ok(guest) => phases.guest(&vmm, guest)?,
        Err(error) => return Err(no_agent(error, &vmm, deadline).await),
    }

    let dialer = Arc::new(Dialer::new(&dir, slowness).map_err(BootCause::Socket)?);
    let port_forward = match &pod.netns {
        Some(netns) => PortForward::start(netns, dialer.clone()).await,
        None => None,
    };
    Ok(Machine {
        agent,
        vmm,
        share,
        mirrors: Mirrors::default(),
        dialer,
        disks,
        fsd,
        console,
        slowness,
        wiring,
        _port_forward: port_forward,
        names_served: Mutex::new(false),
        cgroup,
        cpus: Cpus::of(options),
        memory: GuestMemory::of(options),
        ending: OnceLock::new(),
    })
}

/// Starts coffer-fsd on the share; gives its end of the connection to the VM.
fn start_fsd(
    options: &SandboxOptions,
    share: &Share,
    state: &StateFile,
    evidence: &mut Evidence,
) -> Result<(Child, OwnedFd), BootCause> {
    let (fsd, socket) = parts::start_fsd(options, share)?;
    crash::point("boot.fsd-started");
    evidence.fsd = Some(fsd.clone());
    state.update(|state| state.fsd = Some(fsd.id))?;
    crash::point("boot.fsd-recorded");
    Ok((fsd, socket))
}

/// Starts the hypervisor process, which has no VM yet.
fn start_vmm(
    options: &SandboxOptions,
    state: &StateFile,
    evidence: &mut Evidence,
) -> Result<Vmm, BootCause> {
    let (process, control) = parts::start_hypervisor(options)?;
    crash::point("boot.hypervisor-started");
    evidence.vmm = Some(process.clone());
    state.update(|state| state.hypervisor = Some(process.id))?;
    crash::point("boot.hypervisor-recorded");
    Vmm::new(control, process).map_err(BootCause::Socket)
}

/// Takes over the pod's network, if it has one: what is kept of it, and the VM's cards.
async fn begin_wiring(
    room: usize,
    netns: Option<&Path>,
    uid: u32,
    state: &StateFile,
) -> Result<(Option<Wiring>, Vec<Nic>), BootCause> {
    let Some(netns) = netns else {
        return Ok((None, Vec::new()));
    };
    let network = NamespaceId::of_pod(netns)?;
    state.update(|state| {
        state.network = Some(network);
        // One without a name of its own goes with its last holder, and leaves nothing to undo.
        state.netns = (!netns.starts_with("/proc/self")).then(|| netns.to_owned());
    })?;
    let (wiring, nics) = Wiring::begin(netns, uid, room).await?;
    Ok((Some(wiring), nics))
}

/// Waits until one of the two is gone; gives the reason. coffer-fsd without a fault of its own follows the VM, whose end is told a
/// moment later.
async fn first_end(vmm: &Vmm, fsd: &Child) -> String {
    tokio::select! {
        reason = vmm.gone() => reason,
        ended = fsd.ended() => {
            let reason = timeout(BETTER_REASON, vmm.gone());
            let reason = if fsd.left_in_order() { reason.await.ok() } else { None };
            reason.unwrap_or(ended)
        }
    }
}

fn start_request(
    options: &SandboxOptions,
    pod: &Pod,
    interfaces: Vec<Interface>,
) -> Result<StartSandboxRequest, BootCause> {
    let mut entropy = vec![0; 64];
    let urandom = File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut entropy));
    urandom.map_err(|source| BootCause::Open {
        path: "/dev/urandom".into(),
        source,
    })?;
    let unix_ns = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    let time = Resync {
        unix_ns: i64::try_from(unix_ns).unwrap_or(i64::MAX),
        entropy,
        ..Default::default()
    };
    let hostname = pod
        .hostname
        .clone()
        .unwrap_or_else(|| options.id.as_str().chars().take(63).collect());
    Ok(StartSandboxRequest {
        version: coffer_proto::VERSION.to_owned(),
        hostname,
        resolv_conf: pod.resolv_conf.clone(),
        time: Some(time).into(),
        share_tag: SHARE_TAG.to_owned(),
        interfaces,
        shared_pid_namespace: pod.shared_pid_namespace,
        sysctls: pod.sysctls.clone(),
        ..Default::default()
    })
}

async fn no_agent(error: AgentError, vmm: &Vmm, deadline: Duration) -> BootCause {
    match error {
        AgentError::Deadline { .. } => BootCause::AgentSilent(deadline),
        AgentError::Broken { .. } => match timeout(BETTER_REASON, vmm.gone()).await {
            Ok(reason) => BootCause::Gone(reason),
            Err(_) => BootCause::Agent(error),
        },
        other => BootCause::Agent(other),
    }
}
