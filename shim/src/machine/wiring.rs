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
    /// Held during the work, so that changes are carried one after the other.
    cards: Mutex<Vec<Card>>,
    /// MAC with which the late slot booted.
    slot_mac: [u8; 6],
}

/// An interface whose frames go to the guest.
#[derive(Debug)]
struct Card {
    /// As the namespace has it.
    interface: Interface,
    /// As the agent was told last; None when it never was, or when that failed.
    told: Option<Interface>,
}

impl Wiring {
    /// `booted` are the interfaces that the guest came up with.
    pub fn new(netns: PathBuf, booted: Vec<Interface>, slot_mac: [u8; 6]) -> Self {
        let card = |interface: Interface| Card {
            told: Some(interface.clone()),
            interface,
        };
        Self {
            netns,
            cards: Mutex::new(booted.into_iter().map(card).collect()),
            slot_mac,
        }
    }

    pub fn netns(&self) -> &Path {
        &self.netns
    }

    /// Plugs an interface into the late slot if that is free, and tells the guest what it does not know. After an
    /// error the next call goes on where this one stopped.
    pub async fn follow(&self, vmm: &Vmm, agent: &Agent) -> Result<(), BootCause> {
        let mut cards = self.cards.lock().await;
        if cards.is_empty() {
            let plugged = self.plug(vmm).await?;
            cards.extend(plugged.map(|interface| Card {
                interface,
                told: None,
            }));
        } else {
            self.look(&mut cards).await?;
        }
        tell(&mut cards, self.slot_mac, agent).await
    }

    async fn look(&self, cards: &mut [Card]) -> Result<(), BootCause> {
        let names: Vec<String> = cards
            .iter()
            .map(|card| card.interface.name.clone())
            .collect();
        for now in network::describe(&self.netns, &names).await? {
            if let Some(card) = cards
                .iter_mut()
                .find(|card| card.interface.name == now.name)
            {
                card.interface = now;
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
}

/// Tells the agent about every card that is not as it was told last.
async fn tell(cards: &mut [Card], slot_mac: [u8; 6], agent: &Agent) -> Result<(), BootCause> {
    for card in cards {
        if card.told.as_ref() == Some(&card.interface) {
            continue;
        }
        card.told = None;
        let interface = Interface {
            found_by: slot_mac.map(|byte| format!("{byte:02x}")).join(":"),
            ..card.interface.clone()
        };
        agent
            .configure_interface(&interface)
            .await
            .map_err(BootCause::Agent)?;
        card.told = Some(card.interface.clone());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::{answering, refusal, response};
    use coffer_proto::agent::Empty;

    fn interface(mtu: u32) -> Interface {
        Interface {
            name: "eth0".into(),
            mtu,
            ..Default::default()
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
        let mut cards = vec![Card {
            interface: interface(1500),
            told: None,
        }];
        tell(&mut cards, [2; 6], &agent).await.unwrap_err();
        assert_eq!(cards[0].told, None);
        for _ in 0..2 {
            tell(&mut cards, [2; 6], &agent).await.unwrap();
            assert_eq!(cards[0].told, Some(interface(1500)));
        }
        cards[0].interface = interface(1400);
        tell(&mut cards, [2; 6], &agent).await.unwrap();
        assert_eq!(cards[0].told, Some(interface(1400)));
        drop(agent);
        let calls = tokio::task::spawn_blocking(move || calls.join().unwrap());
        assert_eq!(calls.await.unwrap(), 3);
    }
}
