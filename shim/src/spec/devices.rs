//! `linux.devices`: the guest has the devices of any Linux machine. Of this host's it gets block devices, as disks of the VM; the
//! others do not exist in it.

use super::{GuestSpec, SpecError, field};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxResources, Spec};
use std::fmt;
use std::path::PathBuf;

/// Character devices that every kernel has under the same number (Documentation/admin-guide/devices.txt).
const EVERYWHERE: [(i64, i64); 12] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (1, 11),   // kmsg
    (5, 0),    // tty
    (5, 1),    // console
    (5, 2),    // ptmx
    (10, 200), // net/tun
    (10, 229), // fuse
    (10, 237), // loop-control
];

/// Number of a device, of this kernel's or of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A block device of the host that a container is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Where the container has it.
    pub path: PathBuf,
    /// The host's.
    pub number: DeviceNumber,
    /// The container's rules let it only be read.
    pub read_only: bool,
}

/// Leaves the devices that the guest has, and the block devices of the host, which it will have. Of a privileged container, which
/// engines give every device of the host, those are left out; any other device of the host is refused, for somebody asked for just it.
pub(super) fn take(spec: &mut Spec) -> Result<Vec<BlockDevice>, SpecError> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(Vec::new());
    };
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().clone());
    let rules = rules.unwrap_or_default();
    let Some(devices) = linux.devices_mut() else {
        return Ok(Vec::new());
    };
    if rules.iter().any(allows_everything) {
        let all = devices.len();
        devices.retain(is_guests);
        tracing::info!(
            left_out = all - devices.len(),
            "a privileged container is so in the guest, without devices of the host"
        );
        return Ok(Vec::new());
    }
    let hosts = devices.iter().enumerate();
    let hosts = hosts.filter(|(_, device)| !is_guests(device));
    hosts
        .map(|(i, device)| block_device(i, device, &rules))
        .collect()
}

fn is_guests(device: &LinuxDevice) -> bool {
    match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => {
            EVERYWHERE.contains(&(device.major(), device.minor()))
        }
        LinuxDeviceType::P => true,
        LinuxDeviceType::B | LinuxDeviceType::A => false,
    }
}

fn block_device(
    i: usize,
    device: &LinuxDevice,
    rules: &[LinuxDeviceCgroup],
) -> Result<BlockDevice, SpecError> {
    let refuse = |reason| {
        let path = device.path().display().to_string();
        field(format!("linux.devices[{i}].path"), path, reason)
    };
    if device.typ() != LinuxDeviceType::B {
        return refuse(
            "is a device of the host; but for block devices those are not passed into the VM",
        );
    }
    let (major, minor) = (device.major(), device.minor());
    let (Ok(major), Ok(minor)) = (u32::try_from(major), u32::try_from(minor)) else {
        return refuse("has no device number");
    };
    Ok(BlockDevice {
        path: device.path().clone(),
        number: DeviceNumber { major, minor },
        read_only: !may_write(device, rules),
    })
}

/// What the last rule says that is about writing this device; without one nothing is allowed.
fn may_write(device: &LinuxDevice, rules: &[LinuxDeviceCgroup]) -> bool {
    let meant = |rule: &&LinuxDeviceCgroup| {
        let is = |number: Option<i64>, of: i64| number.is_none_or(|n| n < 0 || n == of);
        matches!(
            rule.typ(),
            None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
        ) && is(rule.major(), device.major())
            && is(rule.minor(), device.minor())
            && rule.access().as_ref().is_none_or(|all| all.contains('w'))
    };
    let last = rules.iter().rev().find(meant);
    last.is_some_and(LinuxDeviceCgroup::allow)
}

/// Whether every device is allowed, which engines do for privileged containers only.
fn allows_everything(rule: &LinuxDeviceCgroup) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    rule.allow()
        && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
        && any(rule.major())
        && any(rule.minor())
}

impl GuestSpec {
    /// Gives block devices, in the list and in the rules, the numbers they have in the guest: `numbers` are those of the host and
    /// of the guest.
    pub fn renumber_block_devices(&mut self, numbers: &[(DeviceNumber, DeviceNumber)]) {
        let Some(linux) = self.spec.linux_mut() else {
            return;
        };
        let in_guest = |major: i64, minor: i64| {
            let is = |host: &DeviceNumber| {
                (i64::from(host.major), i64::from(host.minor)) == (major, minor)
            };
            numbers
                .iter()
                .find(|(host, _)| is(host))
                .map(|(_, guest)| (i64::from(guest.major), i64::from(guest.minor)))
        };
        for device in linux.devices_mut().iter_mut().flatten() {
            let number = in_guest(device.major(), device.minor());
            if let Some((major, minor)) = number.filter(|_| device.typ() == LinuxDeviceType::B) {
                device.set_major(major).set_minor(minor);
            }
        }
        let resources = linux.resources_mut().as_mut();
        let rules =
            resources.and_then(|resources: &mut LinuxResources| resources.devices_mut().as_mut());
        for rule in rules.into_iter().flatten() {
            let (Some(major), Some(minor)) = (rule.major(), rule.minor()) else {
                continue;
            };
            if rule.typ() == Some(LinuxDeviceType::B)
                && let Some((major, minor)) = in_guest(major, minor)
            {
                rule.set_major(Some(major)).set_minor(Some(minor));
            }
        }
    }
}
