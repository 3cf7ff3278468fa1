//! When the agent's start reached which point, and the boot timer that tells it the VMM.

use coffer_proto::agent::BootPhase;
use coffer_proto::limits::{BOOT_PHASE_AGENT_READY, BOOT_TIMER_PORT};
use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// The points reached so far, in order.
#[derive(Debug, Default)]
pub struct Phases(Vec<(&'static str, Duration)>);

impl Phases {
    /// Notes that `name` is reached now.
    pub fn reach(&mut self, name: &'static str) {
        self.0.push((name, since_boot()));
    }

    pub fn to_proto(&self) -> Vec<BootPhase> {
        let phase = |&(name, at): &(&str, Duration)| BootPhase {
            name: name.to_owned(),
            since_boot_us: u64::try_from(at.as_micros()).unwrap_or(u64::MAX),
            ..Default::default()
        };
        self.0.iter().map(phase).collect()
    }
}

/// Time since the guest's kernel started its clock. It goes on while the VM is suspended.
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .unwrap_or_default()
}

/// Writes the boot timer: the VMM stamps the moment with its own clock. A kernel without ioperm(2) or a VMM without
/// the register loses the measurement and nothing else.
#[allow(unsafe_code)]
pub fn tell_ready() {
    let port = BOOT_TIMER_PORT;
    // SAFETY: ioperm only changes this thread's permission to use four I/O ports.
    if unsafe { libc::ioperm(port.into(), 4, 1) } != 0 {
        return;
    }
    // SAFETY: the thread may use this port, see above. No device but the boot timer answers there, and an `out`
    // touches neither memory nor the stack.
    unsafe {
        std::arch::asm!("out dx, eax", in("dx") port, in("eax") BOOT_PHASE_AGENT_READY,
            options(nomem, nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_keep_their_order_and_never_go_back() {
        let mut phases = Phases::default();
        phases.reach("one");
        phases.reach("two");
        let phases = phases.to_proto();
        assert_eq!(
            phases
                .iter()
                .map(|phase| phase.name.as_str())
                .collect::<Vec<_>>(),
            ["one", "two"]
        );
        assert!(phases[0].since_boot_us > 0 && phases[0].since_boot_us <= phases[1].since_boot_us);
    }
}
