//! The memory of a VM, which follows the limits of its containers.
//!
//! A VM boots with what its pod is said to need, and never has less. Where the limits of its containers come to more, with
//! the overhead on top, it grows; where they fall it gives back what the guest can free, in the guest's own time.

use super::SandboxOptions;
use crate::spec::{Need, memory_mib};
use crate::vmm::{Vmm, VmmError};
use std::time::Duration;
use tokio::sync::Mutex;

/// The guest has taken all the memory that it was offered by then, or goes on while its containers run already. It makes
/// some 128 MiB in a few milliseconds.
const GROWS_WITHIN: Duration = Duration::from_secs(5);

/// Sizes in MiB.
#[derive(Debug)]
pub struct GuestMemory {
    /// With which the VM booted.
    boot: u32,
    /// What it has above the limits.
    overhead: u32,
    /// Up to which it can grow; `boot` where it can't.
    most: u32,
    /// What the guest was asked to have. Held during a change, so that changes come one after the other.
    asked: Mutex<u32>,
}

impl GuestMemory {
    /// As a VM with these options boots.
    pub fn of(options: &SandboxOptions) -> Self {
        let most = options.all_memory_mib();
        Self::new(options.memory_mib, options.overhead_mib, most)
    }

    fn new(boot: u32, overhead: u32, most: u32) -> Self {
        Self {
            boot,
            overhead,
            most: most.max(boot),
            asked: Mutex::new(boot),
        }
    }

    /// Makes the VM large enough for these needs, and waits a moment until it is.
    pub async fn grow(&self, vmm: &Vmm, needs: &[Need]) -> Result<(), VmmError> {
        let mut asked = self.asked.lock().await;
        let (needed, wanted) = (self.needed(needs), self.wanted(needs));
        if needed > wanted {
            tracing::info!(
                needed,
                most = self.most,
                "the limits of the containers come to more memory than this VM can have"
            );
        }
        if wanted <= *asked {
            return Ok(());
        }
        vmm.resize_memory(wanted).await?;
        *asked = wanted;
        if !vmm.memory_reached(wanted, GROWS_WITHIN).await {
            tracing::warn!(wanted, "the guest has not taken its new memory yet");
        }
        Ok(())
    }

    /// Makes the VM as large as these needs are.
    pub async fn fit(&self, vmm: &Vmm, needs: &[Need]) -> Result<(), VmmError> {
        self.grow(vmm, needs).await?;
        let mut asked = self.asked.lock().await;
        let wanted = self.wanted(needs);
        if wanted < *asked {
            vmm.resize_memory(wanted).await?;
            *asked = wanted;
        }
        Ok(())
    }

    /// What these needs come to. Containers without a limit share what there is.
    fn needed(&self, needs: &[Need]) -> u32 {
        match memory_mib(needs) {
            0 => self.boot,
            limits => limits.saturating_add(self.overhead),
        }
    }

    fn wanted(&self, needs: &[Need]) -> u32 {
        self.needed(needs).clamp(self.boot, self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Limit;

    #[test]
    fn the_vm_is_never_smaller_than_at_its_boot_nor_larger_than_it_may() {
        let memory = GuestMemory::new(512, 128, 2048);
        let wanted = |mib: &[u64]| {
            let need = |mib: &u64| Need {
                cpu_millis: Limit::Unlimited,
                memory: Limit::Of(mib << 20),
            };
            memory.wanted(&mib.iter().map(need).collect::<Vec<_>>())
        };
        assert_eq!(wanted(&[]), 512);
        assert_eq!(wanted(&[100]), 512);
        assert_eq!(wanted(&[384, 512]), 1024);
        assert_eq!(wanted(&[1 << 40]), 2048);
        assert_eq!(GuestMemory::new(512, 128, 0).wanted(&[Need::NOTHING]), 512);
    }
}
