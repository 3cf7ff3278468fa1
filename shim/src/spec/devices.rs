//! `linux.devices`: the guest has the devices of any Linux machine; those of this host do not exist in it.

use super::{SpecError, field};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

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

/// Leaves the devices that the guest has. Of a privileged container, which engines give every device of the host, the others are left
/// out; of any other one they are refused, for somebody asked for just that device.
pub(super) fn keep_guests_own(spec: &mut Spec) -> Result<(), SpecError> {
    let privileged = is_privileged(spec);
    let Some(devices) = spec
        .linux_mut()
        .as_mut()
        .and_then(|l| l.devices_mut().as_mut())
    else {
        return Ok(());
    };
    if privileged {
        let all = devices.len();
        devices.retain(is_guests);
        tracing::info!(
            left_out = all - devices.len(),
            "a privileged container is so in the guest, without devices of the host"
        );
        return Ok(());
    }
    match devices.iter().position(|device| !is_guests(device)) {
        None => Ok(()),
        Some(i) => field(
            format!("linux.devices[{i}].path"),
            devices[i].path().display().to_string(),
            "is a device of the host; those are not passed into the VM",
        ),
    }
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

/// Whether every device is allowed, which engines do for privileged containers only.
fn is_privileged(spec: &Spec) -> bool {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_deref());
    let all = |rule: &LinuxDeviceCgroup| {
        let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
        rule.allow()
            && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            && any(rule.major())
            && any(rule.minor())
    };
    rules.into_iter().flatten().any(all)
}
