//! `coffer check`: everything a VM needs of this machine, and which hypervisor `auto` picks.
//!
//! Each requirement is tried, not looked up: a capability of KVM is asked of KVM, a namespace is made. The same facts
//! decide in [`choose_hypervisor`], so that `check` can't promise what `run` refuses.

mod guest_image;
mod host;
mod kvm;

pub use guest_image::{Version, guest_image, guest_image_version};
pub use host::{NotRoot, need_root};
pub use kvm::Kvm;

use crate::config::{Config, HypervisorChoice};
use crate::machine::Hypervisor;
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// How a requirement turned out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Pass,
    /// Something works less well, or not at all without being asked for.
    Warn,
    Fail,
}

/// What does not work without the requirement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NeededBy {
    /// Every VM.
    Everything,
    /// coffer-vmm only.
    CofferVmm,
    /// QEMU only.
    Qemu,
    /// No VM, but a feature of it.
    Optional,
}

/// One requirement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub name: &'static str,
    pub needed_by: NeededBy,
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<&'static str>,
}

impl Finding {
    fn pass(name: &'static str, needed_by: NeededBy, detail: impl Into<String>) -> Self {
        Self {
            name,
            needed_by,
            status: Status::Pass,
            detail: detail.into(),
            remedy: None,
        }
    }

    fn fail(
        name: &'static str,
        needed_by: NeededBy,
        detail: impl Into<String>,
        remedy: &'static str,
    ) -> Self {
        let status = if needed_by == NeededBy::Optional {
            Status::Warn
        } else {
            Status::Fail
        };
        Self {
            name,
            needed_by,
            status,
            detail: detail.into(),
            remedy: Some(remedy),
        }
    }

    fn of(
        name: &'static str,
        needed_by: NeededBy,
        found: Result<String, String>,
        remedy: &'static str,
    ) -> Self {
        match found {
            Ok(detail) => Self::pass(name, needed_by, detail),
            Err(detail) => Self::fail(name, needed_by, detail, remedy),
        }
    }
}

/// The hypervisor that is used, and why this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    pub hypervisor: Hypervisor,
    pub reason: String,
    /// One line for the user of `coffer run` where this is not what they would expect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// No hypervisor can run a VM here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no VM can run here: {reason} (coffer check tells more)")]
pub struct NoHypervisor {
    reason: String,
}

/// Decides which hypervisor runs a VM on this machine.
pub fn choose_hypervisor(
    requested: HypervisorChoice,
    libexec: &Path,
) -> Result<Choice, NoHypervisor> {
    choose(requested, &Kvm::probe(), &Programs::find(libexec))
}

/// Which hypervisor programs are installed.
#[derive(Debug, Clone, Copy)]
struct Programs {
    coffer_vmm: bool,
    qemu: bool,
}

impl Programs {
    fn find(libexec: &Path) -> Self {
        let coffer_qemu = host::is_program(&libexec.join("coffer-qemu"));
        Self {
            coffer_vmm: host::is_program(&libexec.join("coffer-vmm")),
            qemu: coffer_qemu && host::find_in_path(host::QEMU).is_some(),
        }
    }
}

fn choose(
    requested: HypervisorChoice,
    kvm: &Kvm,
    programs: &Programs,
) -> Result<Choice, NoHypervisor> {
    let refuse = |reason: String| Err(NoHypervisor { reason });
    let pick = |hypervisor, reason: String, warning| {
        Ok(Choice {
            hypervisor,
            reason,
            warning,
        })
    };
    let no_qemu = format!("{} or coffer-qemu is not installed", host::QEMU);
    match requested {
        HypervisorChoice::CofferVmm if !programs.coffer_vmm => {
            refuse("coffer-vmm is not installed".into())
        }
        HypervisorChoice::CofferVmm => match kvm {
            Kvm::Usable => pick(Hypervisor::CofferVmm, "it was asked for".into(), None),
            Kvm::Emulated => {
                let warning = format!("{kvm}; the guest will probably not boot");
                pick(
                    Hypervisor::CofferVmm,
                    "it was asked for".into(),
                    Some(warning),
                )
            }
            _ => refuse(format!("coffer-vmm needs KVM, and {kvm}")),
        },
        HypervisorChoice::Qemu if !programs.qemu => refuse(no_qemu),
        HypervisorChoice::Qemu if *kvm == Kvm::Usable => pick(
            Hypervisor::QemuKvm,
            "it was asked for, and KVM is usable".into(),
            None,
        ),
        HypervisorChoice::Qemu => pick(
            Hypervisor::QemuEmulation,
            format!("it was asked for, and {kvm}"),
            None,
        ),
        HypervisorChoice::Auto => match (kvm, programs) {
            (
                Kvm::Usable,
                Programs {
                    coffer_vmm: true, ..
                },
            ) => pick(Hypervisor::CofferVmm, kvm.to_string(), None),
            (_, Programs { qemu: false, .. }) => refuse(format!("{kvm}, and {no_qemu}")),
            (Kvm::Usable, _) => {
                let reason = "coffer-vmm is not installed".to_owned();
                pick(
                    Hypervisor::QemuKvm,
                    reason.clone(),
                    Some(format!("{reason}; using QEMU")),
                )
            }
            _ => {
                let warning = format!("{kvm}: using QEMU with software emulation, which is slow");
                pick(Hypervisor::QemuEmulation, kvm.to_string(), Some(warning))
            }
        },
    }
}

fn shown(hypervisor: Hypervisor) -> &'static str {
    match hypervisor {
        Hypervisor::CofferVmm => "coffer-vmm",
        Hypervisor::QemuKvm => "qemu on KVM",
        Hypervisor::QemuEmulation => "qemu, emulated",
    }
}

/// All findings and the decision.
#[derive(Debug, Serialize)]
pub struct Report {
    pub findings: Vec<Finding>,
    pub hypervisor: Result<Choice, String>,
    /// A VM can run.
    pub ok: bool,
}

impl Report {
    /// Looks at everything. Takes well under a second, most of it for hashing the guest image.
    pub fn make(config: &Config) -> Self {
        let kvm = Kvm::probe();
        let libexec = config.libexec();
        let mut findings = host::findings(&config.root, &libexec);
        findings.extend(kvm::findings(&kvm));
        findings.extend(guest_image::findings(config));
        let choice = choose(config.hypervisor, &kvm, &Programs::find(&libexec));
        let needed = |finding: &Finding| match &choice {
            Ok(choice) if choice.hypervisor == Hypervisor::CofferVmm => {
                finding.needed_by != NeededBy::Qemu
            }
            Ok(_) => finding.needed_by != NeededBy::CofferVmm,
            Err(_) => true,
        };
        let ok = choice.is_ok()
            && !findings
                .iter()
                .any(|f| f.status == Status::Fail && needed(f));
        // What the chosen hypervisor does not need is no failure of this machine.
        let unneeded: Vec<_> = findings.iter().map(|finding| !needed(finding)).collect();
        for (finding, unneeded) in findings.iter_mut().zip(unneeded) {
            if unneeded && finding.status == Status::Fail {
                finding.status = Status::Warn;
            }
        }
        Self {
            findings,
            hypervisor: choice.map_err(|error| error.to_string()),
            ok,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .findings
            .iter()
            .map(|finding| finding.name.len())
            .max()
            .unwrap_or(0);
        for finding in &self.findings {
            let status = match finding.status {
                Status::Pass => "ok  ",
                Status::Warn => "warn",
                Status::Fail => "FAIL",
            };
            writeln!(f, "{status}  {:width$}  {}", finding.name, finding.detail)?;
            if let (Some(remedy), false) = (finding.remedy, finding.status == Status::Pass) {
                writeln!(f, "      {:width$}  -> {remedy}", "")?;
            }
        }
        match &self.hypervisor {
            Ok(choice) => writeln!(
                f,
                "\nhypervisor: {} ({})",
                shown(choice.hypervisor),
                choice.reason
            )?,
            Err(error) => writeln!(f, "\n{error}")?,
        }
        f.write_str(if self.ok {
            "a VM can run on this machine"
        } else {
            "a VM can't run on this machine"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use HypervisorChoice::{Auto, CofferVmm, Qemu};

    const BOTH: Programs = Programs {
        coffer_vmm: true,
        qemu: true,
    };

    fn chosen(requested: HypervisorChoice, kvm: &Kvm) -> Option<(Hypervisor, bool)> {
        choose(requested, kvm, &BOTH)
            .ok()
            .map(|choice| (choice.hypervisor, choice.warning.is_some()))
    }

    #[test]
    fn auto_takes_our_vmm_only_on_real_kvm() {
        assert_eq!(
            chosen(Auto, &Kvm::Usable),
            Some((Hypervisor::CofferVmm, false))
        );
        let denied = Kvm::Unusable("permission denied".into());
        for kvm in [
            Kvm::Missing,
            Kvm::Emulated,
            denied,
            Kvm::Lacks("KVM_CAP_IRQFD"),
        ] {
            assert_eq!(
                chosen(Auto, &kvm),
                Some((Hypervisor::QemuEmulation, true)),
                "{kvm}"
            );
        }
    }

    #[test]
    fn what_was_asked_for_is_taken_or_refused() {
        assert_eq!(
            chosen(Qemu, &Kvm::Usable),
            Some((Hypervisor::QemuKvm, false))
        );
        assert_eq!(
            chosen(Qemu, &Kvm::Missing),
            Some((Hypervisor::QemuEmulation, false))
        );
        assert_eq!(
            chosen(CofferVmm, &Kvm::Usable),
            Some((Hypervisor::CofferVmm, false))
        );
        assert_eq!(
            chosen(CofferVmm, &Kvm::Emulated),
            Some((Hypervisor::CofferVmm, true))
        );
        assert_eq!(chosen(CofferVmm, &Kvm::Missing), None);
    }

    #[test]
    fn missing_programs_are_named() {
        let none = Programs {
            coffer_vmm: false,
            qemu: false,
        };
        for (requested, name) in [
            (Auto, "qemu-system-x86_64"),
            (Qemu, "qemu-system-x86_64"),
            (CofferVmm, "coffer-vmm"),
        ] {
            let error = choose(requested, &Kvm::Usable, &none).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        let choice = choose(
            Auto,
            &Kvm::Usable,
            &Programs {
                coffer_vmm: false,
                qemu: true,
            },
        )
        .unwrap();
        assert_eq!(
            (choice.hypervisor, choice.warning.is_some()),
            (Hypervisor::QemuKvm, true)
        );
    }

    #[test]
    fn the_report_of_an_empty_directory_fails_with_remedies() {
        let empty = tempfile::tempdir().unwrap();
        let config = Config {
            libexec: Some(empty.path().into()),
            root: empty.path().join("r"),
            ..Config::default()
        };
        let report = Report::make(&config);
        assert!(!report.ok);
        let failed: Vec<_> = report
            .findings
            .iter()
            .filter(|finding| finding.status == Status::Fail)
            .collect();
        assert!(
            failed.iter().any(|finding| finding.name == "guest kernel"),
            "{report}"
        );
        assert!(
            failed.iter().all(|finding| finding.remedy.is_some()),
            "{report}"
        );
        assert!(!config.root.exists());
    }
}
