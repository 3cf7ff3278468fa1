//! The guest's network cards during its life: podman and docker wire the pod's namespace between create and start, and whoever
//! owns the namespace may change it at any time.
//!
//! The VM boots with a network slot for each interface and a few more. An interface that comes later goes into a free
//! slot; with one that goes, its slot is freed. What changes on an interface is told to the agent.

use super::BootCause;
use super::parts::slot_mac;
use crate::agent::Agent;
use crate::network::{self, IfIndex, Nic};
use crate::vmm::Vmm;
use coffer_proto::agent::Interface;
use std::path::{Path, PathBuf};
use tokio::sync::Mutex;

/// Slots beyond the interfaces that are there at boot: for the two networks of a container that is wired after create, or
/// that is connected to others later.
const SPARE_SLOTS: usize = 2;

/// The pod's namespace and what of it the guest has.
#[derive(Debug)]
pub struct Wiring {
    netns: PathBuf,
    uid: u32,
    /// Held during the work, so that changes are carried one after the other.
    carried: Mutex<Carried>,
    at_boot: Vec<Interface>,
    slot_count: u8,
}

#[derive(Debug)]
struct Carried {
    /// By the number of the slot in the VM.
    slots: Vec<Slot>,
    /// Interfaces without a slot, of which the log has been told.
    left: Vec<IfIndex>,
}

/// What a network slot of the VM holds.
#[derive(Debug)]
enum Slot {
    Free,
    /// An interface, and what the guest was told of it last; None where it needs to be told again.
    Taken {
        index: IfIndex,
        told: Option<Interface>,
        at_boot: bool,
    },
    /// The interface that it had from boot is gone. QEMU can't give such a slot another tap.
    Spent,
}

impl Wiring {
    /// Attaches the interfaces that the namespace has now. They go into the first of at most `room` slots, in their order.
    pub async fn begin(netns: &Path, uid: u32, room: usize) -> Result<(Self, Vec<Nic>), BootCause> {
        let nics = network::attach(netns, &[], room + 1).await?;
        if nics.len() > room {
            return Err(BootCause::TooManyInterfaces {
                netns: netns.to_owned(),
                room,
            });
        }
        let taken = nics.iter().map(|nic| Slot::Taken {
            index: nic.index,
            told: Some(nic.interface.clone()),
            at_boot: true,
        });
        let mut slots: Vec<Slot> = taken.collect();
        slots.resize_with((nics.len() + SPARE_SLOTS).min(room), || Slot::Free);
        let named = nics
            .iter()
            .zip(0..)
            .map(|(nic, slot)| for_slot(uid, slot, &nic.interface));
        let wiring = Self {
            netns: netns.to_owned(),
            uid,
            at_boot: named.collect(),
            slot_count: u8::try_from(slots.len()).expect("a VM has few slots"),
            carried: Mutex::new(Carried {
                slots,
                left: Vec::new(),
            }),
        };
        Ok((wiring, nics))
    }

    pub fn netns(&self) -> &Path {
        &self.netns
    }

    /// What the agent is told of the interfaces at boot.
    pub fn interfaces(&self) -> Vec<Interface> {
        self.at_boot.clone()
    }

    /// Network slots of the VM.
    pub fn slots(&self) -> u8 {
        self.slot_count
    }

    /// Brings the guest to where the namespace is now. After an error the next call goes on where this one stopped.
    pub async fn follow(&self, vmm: &Vmm, agent: &Agent) -> Result<(), BootCause> {
        let carried = &mut *self.carried.lock().await;
        let now = network::describe(&self.netns).await?;
        self.unplug_gone(carried, &now, vmm, agent).await?;
        self.plug_new(carried, &now, vmm).await?;
        tell_changed(&mut carried.slots, &now, self.uid, agent).await
    }

    async fn unplug_gone(
        &self,
        carried: &mut Carried,
        now: &[(IfIndex, Interface)],
        vmm: &Vmm,
        agent: &Agent,
    ) -> Result<(), BootCause> {
        let is_there = |index: &IfIndex| now.iter().any(|(other, _)| other == index);
        carried.left.retain(is_there);
        for (slot, held) in (0..).zip(&mut carried.slots) {
            let at_boot = match &*held {
                Slot::Taken { index, at_boot, .. } if !is_there(index) => *at_boot,
                _ => continue,
            };
            vmm.detach_tap(slot).await?;
            *held = if at_boot { Slot::Spent } else { Slot::Free };
            let gone = Interface {
                gone: true,
                ..Interface::default()
            };
            tell(agent, &for_slot(self.uid, slot, &gone)).await?;
        }
        Ok(())
    }

    async fn plug_new(
        &self,
        carried: &mut Carried,
        now: &[(IfIndex, Interface)],
        vmm: &Vmm,
    ) -> Result<(), BootCause> {
        let taken = carried.slots.iter().filter_map(|slot| match slot {
            Slot::Taken { index, .. } => Some(*index),
            _ => None,
        });
        let mut known: Vec<IfIndex> = taken.collect();
        if now.iter().all(|(index, _)| known.contains(index)) {
            return Ok(());
        }
        let mut free: Vec<_> = (0..)
            .zip(&mut carried.slots)
            .filter(|(_, slot)| matches!(slot, Slot::Free))
            .collect();
        if !free.is_empty() {
            let nics = network::attach(&self.netns, &known, free.len()).await?;
            for ((number, slot), nic) in free.iter_mut().zip(nics) {
                vmm.attach_tap(*number, nic.tap).await?;
                known.push(nic.index);
                **slot = Slot::Taken {
                    index: nic.index,
                    told: None,
                    at_boot: false,
                };
            }
        }
        for (index, interface) in now {
            if !known.contains(index) && !carried.left.contains(index) {
                tracing::warn!(
                    interface = interface.name,
                    "no network slot of the VM is free: it stays on the host"
                );
                carried.left.push(*index);
            }
        }
        Ok(())
    }
}

/// Tells the agent about every interface that is not as it was told last.
async fn tell_changed(
    slots: &mut [Slot],
    now: &[(IfIndex, Interface)],
    uid: u32,
    agent: &Agent,
) -> Result<(), BootCause> {
    for (slot, held) in (0..).zip(slots) {
        let Slot::Taken { index, told, .. } = held else {
            continue;
        };
        let wanted = now.iter().find(|(other, _)| other == index);
        let Some((_, wanted)) = wanted.filter(|(_, wanted)| told.as_ref() != Some(wanted)) else {
            continue;
        };
        *told = None;
        tell(agent, &for_slot(uid, slot, wanted)).await?;
        *told = Some(wanted.clone());
    }
    Ok(())
}

async fn tell(agent: &Agent, interface: &Interface) -> Result<(), BootCause> {
    agent
        .configure_interface(interface)
        .await
        .map_err(BootCause::Agent)
}

/// The interface with the address by which the agent finds the slot's card.
fn for_slot(uid: u32, slot: u8, interface: &Interface) -> Interface {
    Interface {
        found_by: slot_mac(uid, slot)
            .map(|byte| format!("{byte:02x}"))
            .join(":"),
        ..interface.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::{answering, refusal, response};
    use coffer_proto::agent::Empty;

    fn now(mtu: u32) -> Vec<(IfIndex, Interface)> {
        let interface = Interface {
            name: "eth0".into(),
            mtu,
            ..Default::default()
        };
        vec![(IfIndex(7), interface)]
    }

    fn told(slot: &Slot) -> Option<&Interface> {
        match slot {
            Slot::Taken { told, .. } => told.as_ref(),
            _ => None,
        }
    }

    #[tokio::test]
    async fn an_interface_that_the_agent_did_not_take_is_told_again() {
        // The agent takes the second call and the third, and would not answer a fourth.
        let answers = vec![
            refusal("busy"),
            response(&Empty::new()),
            response(&Empty::new()),
        ];
        let (agent, calls) = answering(answers);
        let mut slots = vec![
            Slot::Free,
            Slot::Taken {
                index: IfIndex(7),
                told: None,
                at_boot: false,
            },
        ];
        let large = now(1500);
        let refused = tell_changed(&mut slots, &large, 1, &agent).await;
        refused.unwrap_err();
        assert_eq!(told(&slots[1]), None);
        for _ in 0..2 {
            let done = tell_changed(&mut slots, &large, 1, &agent).await;
            done.unwrap();
            assert_eq!(told(&slots[1]), Some(&large[0].1));
        }
        let small = now(1400);
        let done = tell_changed(&mut slots, &small, 1, &agent).await;
        done.unwrap();
        assert_eq!(told(&slots[1]), Some(&small[0].1));
        drop(agent);
        let calls = tokio::task::spawn_blocking(move || calls.join().unwrap());
        assert_eq!(calls.await.unwrap(), 3);
    }
}
