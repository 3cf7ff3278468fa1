//! The guest's network cards after the boot: podman and docker wire the pod's namespace between create and start, and a plugin
//! may change it at any time.

use super::BootCause;
use crate::agent::Agent;
use crate::network::{self, Nic};
use crate::vmm::Vmm;
use coffer_proto::agent::Interface;
use std::path::{Path, PathBuf};
use tokio::sync::Mutex;

/// The slot that a VM without an interface at boot has.
const LATE_SLOT: u8 = 0;

/// The pod's namespace and what of it the guest has.
#[derive(Debug)]
pub struct Wiring {
    netns: PathBuf,
    /// What the guest was told last, by interface. Held during the work, so that changes are carried one after the other.
    known: Mutex<Vec<Interface>>,
    /// MAC with which the late slot booted.
    slot_mac: [u8; 6],
}

impl Wiring {
    pub fn new(netns: PathBuf, known: Vec<Interface>, slot_mac: [u8; 6]) -> Self {
        Self {
            netns,
            known: Mutex::new(known),
            slot_mac,
        }
    }

    pub fn netns(&self) -> &Path {
        &self.netns
    }

    /// Plugs an interface into the late slot if that is free, and tells the guest what has changed on the others.
    pub async fn follow(&self, vmm: &Vmm, agent: &Agent) -> Result<(), BootCause> {
        let mut known = self.known.lock().await;
        if known.is_empty() {
            known.extend(self.plug(vmm).await?);
            for interface in known.iter() {
                self.tell(agent, interface).await?;
            }
            return Ok(());
        }
        let names: Vec<String> = known
            .iter()
            .map(|interface| interface.name.clone())
            .collect();
        for now in network::describe(&self.netns, &names).await? {
            let Some(before) = known.iter_mut().find(|before| before.name == now.name) else {
                continue;
            };
            if *before != now {
                self.tell(agent, &now).await?;
                *before = now;
            }
        }
        Ok(())
    }

    async fn plug(&self, vmm: &Vmm) -> Result<Option<Interface>, BootCause> {
        let mut nics = network::attach(&self.netns, &[]).await?.into_iter();
        let Some(Nic { tap, interface, .. }) = nics.next() else {
            return Ok(None);
        };
        let more: Vec<String> = nics.map(|nic| nic.host_name).collect();
        if !more.is_empty() {
            tracing::warn!(interfaces = ?more, "one interface can be added after the boot; these are left on the host");
            network::detach(&self.netns, &more).await?;
        }
        vmm.attach_tap(LATE_SLOT, tap).await?;
        Ok(Some(interface))
    }

    async fn tell(&self, agent: &Agent, interface: &Interface) -> Result<(), BootCause> {
        let found_by = self.slot_mac.map(|byte| format!("{byte:02x}")).join(":");
        let interface = Interface {
            found_by,
            ..interface.clone()
        };
        agent
            .configure_interface(&interface)
            .await
            .map_err(BootCause::Agent)
    }
}
