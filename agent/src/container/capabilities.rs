//! The five capability sets of a process (capabilities(7)).

use std::str::FromStr;

use caps::{CapSet, Capability, CapsHashSet};
use oci_spec::runtime::{Capabilities, LinuxCapabilities};

use super::failure::Failure;

/// The sets of the spec. The default, empty, is what a process without `capabilities` gets.
#[derive(Debug, Default)]
pub struct Sets {
    bounding: CapsHashSet,
    effective: CapsHashSet,
    inheritable: CapsHashSet,
    permitted: CapsHashSet,
    ambient: CapsHashSet,
}

/// Parses; the error is the set's JSON name and what is wrong.
pub fn parse(spec: &LinuxCapabilities) -> Result<Sets, (&'static str, String)> {
    let sets = Sets {
        bounding: set("bounding", spec.bounding().as_ref())?,
        effective: set("effective", spec.effective().as_ref())?,
        inheritable: set("inheritable", spec.inheritable().as_ref())?,
        permitted: set("permitted", spec.permitted().as_ref())?,
        ambient: set("ambient", spec.ambient().as_ref())?,
    };
    // The kernel lets only a permitted and inheritable capability be ambient. Like runc, which wrote specs with more of them
    // itself, we leave out the rest.
    let possible: CapsHashSet = sets
        .permitted
        .intersection(&sets.inheritable)
        .copied()
        .collect();
    let sets = Sets {
        ambient: sets.ambient.intersection(&possible).copied().collect(),
        ..sets
    };
    if let Some(extra) = sets.effective.difference(&sets.permitted).next() {
        return Err(("effective", format!("{extra} is not permitted")));
    }
    Ok(sets)
}

fn set(
    name: &'static str,
    given: Option<&Capabilities>,
) -> Result<CapsHashSet, (&'static str, String)> {
    given
        .into_iter()
        .flatten()
        .map(|capability| {
            let capability = format!("CAP_{capability}");
            Capability::from_str(&capability)
                .map_err(|_| (name, format!("{capability} is not known")))
        })
        .collect()
}

impl Sets {
    /// Shrinks the bounding set, which needs CAP_SETPCAP and so comes before the change of user.
    pub fn limit_bounding(&self) -> Result<(), Failure> {
        let step = "set the bounding capabilities";
        let now = caps::read(None, CapSet::Bounding).map_err(failed(step))?;
        for capability in now.difference(&self.bounding) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(failed(step))?;
        }
        Ok(())
    }

    /// Sets the other four. Inheritable first, while all is permitted, and ambient last, for it needs both.
    pub fn apply(&self) -> Result<(), Failure> {
        for (step, which, value) in [
            (
                "set the inheritable capabilities",
                CapSet::Inheritable,
                &self.inheritable,
            ),
            (
                "set the effective capabilities",
                CapSet::Effective,
                &self.effective,
            ),
            (
                "set the permitted capabilities",
                CapSet::Permitted,
                &self.permitted,
            ),
            (
                "set the ambient capabilities",
                CapSet::Ambient,
                &self.ambient,
            ),
        ] {
            caps::set(None, which, value).map_err(failed(step))?;
        }
        Ok(())
    }
}

fn failed(step: &'static str) -> impl FnOnce(caps::errors::CapsError) -> Failure {
    move |error| Failure::new(step, error.to_string())
}
