//! How long each step of the boot took.

use super::BootCause;
use crate::agent::Guest;
use crate::crash;
use crate::state::{Clock, Phase, StateFile, Status};
use crate::vmm::Vmm;
use coffer_proto::limits::BOOT_PHASE_AGENT_READY;
use std::time::Instant;

/// Times of the boot, kept in the state as they pass.
#[derive(Debug)]
pub struct Phases<'a> {
    state: &'a StateFile,
    start: Instant,
}

impl<'a> Phases<'a> {
    /// They count from now.
    pub fn new(state: &'a StateFile) -> Self {
        Self {
            state,
            start: Instant::now(),
        }
    }

    /// A step of the recipe is done.
    pub fn done(&self, name: &str) -> Result<(), BootCause> {
        let at = self.start.elapsed();
        tracing::info!(phase = name, at_us = at.as_micros(), "boot");
        crash::point(&format!("boot.{name}"));
        Ok(self.state.update(|state| {
            state.phases.push(Phase {
                name: name.to_owned(),
                at,
                clock: Clock::Host,
            });
        })?)
    }

    /// The agent has answered.
    pub fn guest(&self, vmm: &Vmm, guest: Guest) -> Result<(), BootCause> {
        let ready = vmm
            .phases()
            .into_iter()
            .find(|phase| phase.phase == BOOT_PHASE_AGENT_READY);
        self.done("agent")?;
        let times = guest.phases.into_iter().map(|(name, at)| Phase {
            name,
            at,
            clock: Clock::Guest,
        });
        let ready = ready.map(|phase| Phase {
            name: "agent ready".into(),
            at: phase.at,
            clock: Clock::Hypervisor,
        });
        let status = Status::Running;
        Ok(self.state.update(|state| {
            state.phases.extend(times.chain(ready));
            state.guest_kernel = Some(guest.kernel_release);
            state.status = status;
        })?)
    }
}
