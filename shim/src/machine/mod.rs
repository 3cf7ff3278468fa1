//! The machine of a sandbox: a VM, its file server and its agent.
//!
//! [`boot`](fn@boot) is how it comes to be, this module how it lives, changes and ends.

mod boot;
pub mod child;
mod death;
mod disks;
mod evidence;
mod memory;
pub mod options;
mod parts;
mod phases;
mod size;
mod wiring;

pub use boot::{BootError, boot};
pub use death::Death;
pub use disks::DiskError;
pub use options::{Hypervisor, SandboxOptions, UidRange, task_socket};
pub use parts::{BootCause, open_console};
pub use size::PodSize;

use crate::agent::{Agent, AgentError};
use crate::cgroup::{CgroupPath, SandboxCgroup};
use crate::io::Dialer;
use crate::mirror::Mirrors;
use crate::network::{self, DockersNames, PortForward};
use crate::share::Share;
use crate::spec::{self, BlockDevice, DeviceNumber, Need};
use crate::vmm::{Vmm, VmmError};
use child::Child;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::ContainerId;
use death::End;
use disks::Disks;
use evidence::console_tail;
use memory::GuestMemory;
use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::timeout;
use wiring::Wiring;

/// From the agent's "I shut down" to the end of the VM: sync is done, only the restart is left.
const GUEST_EXIT: Duration = Duration::from_secs(3);
/// A hypervisor process that was told to stop needs no guest for it.
const VMM_EXIT: Duration = Duration::from_secs(2);
/// When the agent's connection breaks, the reason is usually the VM's end, which is told a moment later.
const BETTER_REASON: Duration = Duration::from_secs(1);
/// The least time between two events of the guest that are looked at.
const EVENT_INTERVAL: Duration = Duration::from_millis(50);
/// Lines from the end of the console among which a panic is looked for; an oops with its stack has fewer.
const PANIC_LINES: usize = 100;
/// A change of the network that did not reach the guest is tried again after this, then after twice the time, and so on.
const NETWORK_RETRY: Duration = Duration::from_millis(500);
const NETWORK_RETRY_MAX: Duration = Duration::from_secs(30);

/// What the pod is to be: what the first container's spec says of it, or the Sandbox API.
#[derive(Debug, Clone, Default)]
pub struct Pod {
    pub hostname: Option<String>,
    /// Of the pod's own, where containers are to see it; empty where their caller mounts one.
    pub resolv_conf: String,
    /// The pod's network namespace on the host; None for no network.
    pub netns: Option<PathBuf>,
    /// Where its cgroup is to be; the sandbox's options go before.
    pub cgroup: Option<CgroupPath>,
    /// One PID namespace for all containers.
    pub shared_pid_namespace: bool,
    pub size: PodSize,
    /// Sysctls of the pod's namespaces, by name.
    pub sysctls: HashMap<String, String>,
    /// Those of the first container, where it is known.
    pub block_devices: Vec<BlockDevice>,
}

/// Why a VM did not get another size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    #[error(transparent)]
    Cpus(#[from] AgentError),
    #[error("the VM's memory can't be changed")]
    Memory(#[from] VmmError),
}

/// A machine that runs.
#[derive(Debug)]
pub struct Machine {
    pub agent: Agent,
    pub vmm: Vmm,
    pub share: Share,
    pub mirrors: Mirrors,
    pub dialer: Arc<Dialer>,
    disks: Disks,
    fsd: Child,
    console: File,
    slowness: u32,
    /// The pod's network, where it has one.
    wiring: Option<Wiring>,
    /// Where the pod has a network and this kernel can do it.
    _port_forward: Option<PortForward>,
    /// The containers can ask docker's resolver.
    names_served: Mutex<bool>,
    /// The host's cgroup of its processes, where they have one.
    cgroup: Option<SandboxCgroup>,
    cpus: Cpus,
    memory: GuestMemory,
    /// Set when we end the VM ourselves: then its end is no failure, whatever it looks like from outside.
    ending: OnceLock<End>,
}

/// The CPUs of a VM.
#[derive(Debug)]
struct Cpus {
    /// With which it boots, and which it keeps while a container has no limit.
    usual: u8,
    all: u8,
    online: Mutex<u8>,
}

impl Cpus {
    fn of(options: &SandboxOptions) -> Self {
        Self {
            usual: options.vcpus,
            all: options.all_vcpus(),
            online: Mutex::new(options.vcpus),
        }
    }
}

/// What ends or wakes the watch over a machine.
#[derive(Debug)]
pub enum Notice {
    /// A container hit its memory limit.
    OutOfMemory(ContainerId),
    /// The machine is gone or of no use any more.
    Gone(Death),
}

impl Machine {
    /// Waits for the next thing that the sandbox has to know.
    pub async fn notice(&self) -> Notice {
        let event = async {
            tokio::time::sleep(EVENT_INTERVAL).await;
            self.agent.next_oom().await
        };
        let effect = tokio::select! {
            reason = self.vmm.gone() => return Notice::Gone(self.explain(reason)),
            ended = self.fsd.ended() => {
                if !self.fsd.left_in_order() && self.ending.get().is_none() {
                    return Notice::Gone(self.host_out_of_memory().unwrap_or(ended.into()));
                }
                ended
            }
            event = event => match event {
                Ok(container) => return Notice::OutOfMemory(container),
                Err(error) => chain(&error),
            },
        };
        // Both follow from the VM's end, which is told a moment later and says more.
        let cause = timeout(BETTER_REASON, self.vmm.gone()).await;
        Notice::Gone(cause.map_or(effect.into(), |reason| self.explain(reason)))
    }

    /// A guest that ends by itself says why on its console, if anywhere: in the line of a panic, or else in the last.
    fn explain(&self, reason: String) -> Death {
        if let Some(end) = self.ending.get() {
            return end.reason().to_owned().into();
        }
        if let Some(death) = self.host_out_of_memory() {
            return death;
        }
        let mut lines = console_tail(&self.console, PANIC_LINES);
        let panic = lines.iter().rposition(|line| line.contains("Kernel panic"));
        match panic.map(|i| lines.swap_remove(i)).or_else(|| lines.pop()) {
            Some(line) => format!("{reason}; its console says: {line}").into(),
            None => reason.into(),
        }
    }

    fn host_out_of_memory(&self) -> Option<Death> {
        let killed = self
            .cgroup
            .as_ref()
            .is_some_and(|cgroup| cgroup.oom_kills() > 0);
        killed.then(|| Death {
            reason: "the host ran out of memory for the VM and killed it".to_owned(),
            out_of_memory: true,
        })
    }

    /// Ends the VM: by the agent if it answers, by the hypervisor process if that does, by SIGKILL otherwise.
    pub async fn shut_down(&self) {
        let _ = self.ending.set(End::ShutDown);
        if self.agent.shutdown().await.is_ok()
            && timeout(GUEST_EXIT * self.slowness, self.vmm.gone())
                .await
                .is_ok()
        {
            return;
        }
        self.kill().await;
    }

    /// Ends the VM whatever the guest does.
    pub async fn kill(&self) {
        let _ = self.ending.set(End::Killed);
        if self.vmm.stop().await.is_ok() && timeout(VMM_EXIT, self.vmm.gone()).await.is_ok() {
            return;
        }
        let id = self.vmm.process.id;
        let killed = tokio::task::spawn_blocking(move || id.kill(VMM_EXIT)).await;
        if let Ok(Err(error)) = killed {
            tracing::error!(%error, "the hypervisor process can't be killed");
        }
    }

    /// Brings a container's block devices into the guest; gives the number of each on the host and in the guest.
    pub async fn attach_disks(
        &self,
        id: &ContainerId,
        wanted: &[BlockDevice],
    ) -> Result<Vec<(DeviceNumber, DeviceNumber)>, DiskError> {
        self.disks.attach(&self.vmm, &self.agent, id, wanted).await
    }

    /// Takes away those that no other container has.
    pub async fn detach_disks(&self, id: &ContainerId) {
        self.disks.detach(&self.vmm, &self.agent, id).await;
    }

    /// The host's pid that stands for every process of the guest.
    pub fn host_pid(&self) -> u32 {
        u32::try_from(self.vmm.process.id.pid).unwrap_or_default()
    }

    /// Gives the VM the size that its containers need together.
    pub async fn fit(&self, needs: &[Need]) -> Result<(), ResizeError> {
        self.fit_cpus(needs).await?;
        Ok(self.memory.fit(&self.vmm, needs).await?)
    }

    /// Gives the VM memory for these needs, before containers may use it.
    pub async fn grow(&self, needs: &[Need]) -> Result<(), ResizeError> {
        Ok(self.memory.grow(&self.vmm, needs).await?)
    }

    /// Brings as many CPUs of the guest online as its containers need together.
    async fn fit_cpus(&self, needs: &[Need]) -> Result<(), AgentError> {
        let count = spec::cpus(needs, self.cpus.usual, self.cpus.all);
        // Held during the call, so that calls come one after the other.
        let mut online = self.cpus.online.lock().await;
        if *online != count {
            self.agent.set_online_cpus(count).await?;
            *online = count;
        }
        Ok(())
    }

    /// Brings the guest's network to where the pod's namespace is now.
    pub async fn follow_network(&self) -> Result<(), BootCause> {
        match &self.wiring {
            Some(wiring) => wiring.follow(&self.vmm, &self.agent).await,
            None => Ok(()),
        }
    }

    /// Lets containers ask docker's resolver in the pod's namespace; once for all of them.
    pub async fn serve_names(&self, names: DockersNames) {
        let Some(wiring) = &self.wiring else { return };
        let mut served = self.names_served.lock().await;
        if *served {
            return;
        }
        match names.serve(wiring.netns(), &self.dialer).await {
            Ok(()) => *served = true,
            Err(error) => tracing::warn!(
                error = chain(&error),
                "containers can't ask docker's resolver"
            ),
        }
    }

    /// Follows the namespace until the machine is dropped.
    pub fn watch_network(self: &Arc<Self>) {
        let Some(wiring) = &self.wiring else { return };
        let mut changes = network::watch(wiring.netns());
        let machine = Arc::downgrade(self);
        tokio::spawn(async move {
            let mut retry = None;
            loop {
                let change = timeout(retry.unwrap_or(Duration::MAX), changes.recv());
                if let Ok(None) = change.await {
                    return;
                }
                let Some(machine) = machine.upgrade() else {
                    return;
                };
                let Err(error) = machine.follow_network().await else {
                    retry = None;
                    continue;
                };
                let pause = retry.map_or(NETWORK_RETRY, |last| last * 2);
                retry = Some(pause.min(NETWORK_RETRY_MAX));
                tracing::warn!(
                    error = chain(&error),
                    ?retry,
                    "a change of the network did not reach the guest"
                );
            }
        });
    }
}
