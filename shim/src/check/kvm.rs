//! What /dev/kvm can do.

use super::{Finding, NeededBy};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::fmt;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const DEVICE: &str = "/dev/kvm";
/// The only version there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// Extensions that coffer-vmm can't work without, with their numbers in `linux/kvm.h`.
const CAPABILITIES: [(&str, i32); 5] = [
    ("KVM_CAP_IRQCHIP", 0),
    ("KVM_CAP_USER_MEMORY", 3),
    ("KVM_CAP_IRQFD", 32),
    ("KVM_CAP_IOEVENTFD", 36),
    ("KVM_CAP_IMMEDIATE_EXIT", 136),
];

/// KVM on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// Backed by the processor, with all that coffer-vmm needs.
    Usable,
    /// There is a /dev/kvm, but the processor has neither vmx nor svm: KVM emulates parts of the guest's code, and a
    /// stock kernel does not boot on it.
    Emulated,
    /// No /dev/kvm.
    Missing,
    /// The device can't be opened or makes no VM, for this reason.
    Unusable(String),
    /// It lacks this extension.
    Lacks(&'static str),
}

impl fmt::Display for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable => f.write_str("KVM is backed by the processor"),
            Self::Emulated => {
                f.write_str("there is a /dev/kvm, but this processor shows neither vmx nor svm")
            }
            Self::Missing => f.write_str("there is no /dev/kvm"),
            Self::Unusable(reason) => write!(f, "/dev/kvm can't be used: {reason}"),
            Self::Lacks(capability) => write!(f, "this KVM lacks {capability}"),
        }
    }
}

impl Kvm {
    /// Opens the device, asks for the extensions and makes an empty VM, which is gone again on return.
    pub fn probe() -> Self {
        let device = match open(DEVICE, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()) {
            Ok(device) => device,
            Err(nix::Error::ENOENT) => return Self::Missing,
            Err(error) => return Self::Unusable(error.desc().into()),
        };
        match get_api_version(&device) {
            Ok(API_VERSION) => {}
            Ok(version) => {
                return Self::Unusable(format!("it has API version {version}, not {API_VERSION}"));
            }
            Err(_) => return Self::Unusable("it is not KVM".into()),
        }
        for (name, number) in CAPABILITIES {
            if !check_extension(&device, number).is_ok_and(|answer| answer > 0) {
                return Self::Lacks(name);
            }
        }
        // EBUSY where another hypervisor has the processor's virtualisation.
        if let Err(error) = create_vm(&device) {
            return Self::Unusable(format!("making a VM failed: {}", error.desc()));
        }
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        if processor_virtualises(&cpuinfo) {
            Self::Usable
        } else {
            Self::Emulated
        }
    }
}

fn processor_virtualises(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| {
        line.split_whitespace()
            .any(|flag| matches!(flag, "vmx" | "svm"))
    })
}

/// One line for each of device, permission, extensions and processor.
pub(super) fn findings(kvm: &Kvm) -> Vec<Finding> {
    let name = "KVM";
    let finding = match kvm {
        Kvm::Usable => Finding::pass(name, NeededBy::CofferVmm, kvm.to_string()),
        Kvm::Emulated => {
            let remedy = "use a machine with hardware virtualisation, or enable nested virtualisation for this one";
            Finding::fail(name, NeededBy::CofferVmm, kvm.to_string(), remedy)
        }
        Kvm::Missing => {
            let remedy = "enable virtualisation in the firmware and load kvm_intel or kvm_amd";
            Finding::fail(name, NeededBy::CofferVmm, kvm.to_string(), remedy)
        }
        Kvm::Unusable(_) => {
            let remedy =
                "run as root or in the group kvm; stop other hypervisors that hold the processor";
            Finding::fail(name, NeededBy::CofferVmm, kvm.to_string(), remedy)
        }
        Kvm::Lacks(_) => Finding::fail(
            name,
            NeededBy::CofferVmm,
            kvm.to_string(),
            "use Linux 5.10 or newer",
        ),
    };
    vec![finding]
}

mod ioctl {
    //! Numbers of `linux/kvm.h`; all three are _IO(KVMIO, n) and take an integer.
    const KVMIO: u8 = 0xae;
    nix::ioctl_write_int_bad!(kvm_get_api_version, nix::request_code_none!(KVMIO, 0x00));
    nix::ioctl_write_int_bad!(kvm_create_vm, nix::request_code_none!(KVMIO, 0x01));
    nix::ioctl_write_int_bad!(kvm_check_extension, nix::request_code_none!(KVMIO, 0x03));
}

#[allow(unsafe_code)]
fn get_api_version(device: &OwnedFd) -> nix::Result<i32> {
    // SAFETY: the request takes an integer and touches no memory of ours.
    unsafe { ioctl::kvm_get_api_version(device.as_raw_fd(), 0) }
}

#[allow(unsafe_code)]
fn check_extension(device: &OwnedFd, number: i32) -> nix::Result<i32> {
    // SAFETY: as above.
    unsafe { ioctl::kvm_check_extension(device.as_raw_fd(), number) }
}

#[allow(unsafe_code)]
fn create_vm(device: &OwnedFd) -> nix::Result<OwnedFd> {
    // SAFETY: the request takes an integer (the default machine type) and gives a descriptor that nobody else has.
    unsafe { ioctl::kvm_create_vm(device.as_raw_fd(), 0).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_a_whole_word() {
        assert!(processor_virtualises(
            "processor : 0\nflags\t\t: fpu vmx sse\n"
        ));
        assert!(processor_virtualises("flags : svm\n"));
        assert!(!processor_virtualises(
            "flags : fpu vmx_like svm_lock\nvmx flags : vnmi\n"
        ));
        assert!(!processor_virtualises(""));
    }
}
