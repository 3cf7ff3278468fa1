//! Transitions of a sandbox that its caller makes and ends by name; see [`super::super::api`].

use super::Pod;
use crate::machine::Pod as PodSpec;
use crate::sandbox::Error;
use crate::sandbox::events::{SandboxDescription, SandboxState};
use std::time::SystemTime;

/// Whether the Sandbox API made the pod.
#[derive(Debug)]
pub(super) enum Preparation {
    /// No: its first container brings the VM, and the last one takes it.
    Unprepared,
    /// It said what the pod shall be.
    Prepared(Box<PodSpec>),
    /// It had the VM booted.
    Started,
}

impl Pod {
    /// Takes note of what the Sandbox API asks for.
    pub fn prepare(&mut self, spec: PodSpec) -> Result<(), Error> {
        if self.is_prepared() || *self.state() != SandboxState::New {
            return Err(Error::SandboxExists);
        }
        self.preparation = Preparation::Prepared(Box::new(spec));
        Ok(())
    }

    pub fn is_prepared(&self) -> bool {
        !matches!(self.preparation, Preparation::Unprepared)
    }

    /// New → Creating, for a sandbox that was prepared.
    pub fn begin_prepared_boot(&mut self) -> Result<PodSpec, Error> {
        self.alive()?;
        match std::mem::replace(&mut self.preparation, Preparation::Started) {
            Preparation::Prepared(spec) => {
                self.state = SandboxState::Creating;
                self.idle_since = None;
                Ok(*spec)
            }
            Preparation::Started => Err(Error::SandboxExists),
            Preparation::Unprepared => {
                self.preparation = Preparation::Unprepared;
                Err(Error::NotPrepared)
            }
        }
    }

    /// Creating or Running → Stopping because somebody asked for it. False when it is past that.
    pub fn begin_orderly_stop(&mut self, reason: &str) -> bool {
        let began = self.begin_stop(reason);
        self.ended_in_order |= began;
        began
    }

    /// What is known of the sandbox.
    pub fn describe_sandbox(&self, created: SystemTime) -> SandboxDescription {
        SandboxDescription {
            pid: self.pid,
            state: self.state().clone(),
            created,
            ended: self.ended,
            ended_in_order: self.ended_in_order,
        }
    }
}
