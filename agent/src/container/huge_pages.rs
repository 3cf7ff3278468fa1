//! Huge pages: what a container may use of them is set apart in the guest's memory while the container is there.
//!
//! A machine has a pool of huge pages of each size. On a host the administrator fills it, and Kubernetes hands it out; in the guest
//! it is as large as the limits of its containers together.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use oci_spec::runtime::{LinuxHugepageLimit, LinuxResources};

use super::failure::{Failure, at};

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Held while a pool is changed, for that is reading a number and writing another.
static CHANGING: Mutex<()> = Mutex::new(());

/// The pages of one container. They go back when it is dropped.
#[derive(Debug, Default)]
pub struct HugePages(Vec<Share>);

/// A container's part of a pool.
#[derive(Debug)]
struct Share {
    pool: PathBuf,
    pages: u64,
}

impl HugePages {
    /// Sets apart what the limits allow.
    pub fn reserve(limits: Option<&LinuxResources>) -> Result<Self, Failure> {
        Self::reserve_in(Path::new(POOLS), limits)
    }

    fn reserve_in(pools: &Path, limits: Option<&LinuxResources>) -> Result<Self, Failure> {
        let limits = limits.and_then(|limits| limits.hugepage_limits().as_ref());
        let mut reserved = Self::default();
        // No limit, which is -1, is no number of pages.
        for limit in limits.into_iter().flatten().filter(|l| l.limit() > 0) {
            // A size that the guest has not is told by the cgroup, which has no file for it.
            if let Some(share) = Share::of(pools, limit) {
                share.take(limit.page_size())?;
                reserved.0.push(share);
            }
        }
        Ok(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        for share in &self.0 {
            share.give_back();
        }
    }
}

impl Share {
    fn of(pools: &Path, limit: &LinuxHugepageLimit) -> Option<Self> {
        let kib = kib(limit.page_size())?;
        let pool = pools.join(format!("hugepages-{kib}kB/nr_hugepages"));
        let pages = u64::try_from(limit.limit()).ok()? / (kib << 10);
        (pages > 0 && pool.exists()).then_some(Self { pool, pages })
    }

    fn take(&self, size: &str) -> Result<(), Failure> {
        let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        let step = || format!("reserve {} huge pages of {size}", self.pages);
        let before = self.read().map_err(at(step()))?;
        let wanted = before.saturating_add(self.pages);
        fs::write(&self.pool, wanted.to_string()).map_err(at(step()))?;
        let got = self.read().map_err(at(step()))?;
        if got >= wanted {
            return Ok(());
        }
        // The kernel takes what it finds.
        fs::write(&self.pool, before.to_string()).map_err(at(step()))?;
        let room = got.saturating_sub(before);
        let reason = format!("the memory of the VM has room for {room}");
        Err(Failure::new(step(), reason))
    }

    fn give_back(&self) {
        let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        let left = self.read().map(|pages| pages.saturating_sub(self.pages));
        let done = left.and_then(|left| fs::write(&self.pool, left.to_string()));
        if let Err(error) = done {
            tracing::warn!(%error, pages = self.pages, "huge pages stay reserved");
        }
    }

    fn read(&self) -> std::io::Result<u64> {
        let text = fs::read_to_string(&self.pool)?;
        text.trim().parse().map_err(std::io::Error::other)
    }
}

/// KiB of a page size as the spec writes it: "64KB", "2MB", "1GB".
fn kib(size: &str) -> Option<u64> {
    let units = [("KB", 0), ("MB", 10), ("GB", 20)];
    units.iter().find_map(|(unit, shift)| {
        let count: u64 = size.strip_suffix(unit)?.parse().ok()?;
        count.checked_mul(1 << shift)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sizes_are_read_as_engines_write_them() {
        let cases = [
            ("64KB", Some(64)),
            ("2MB", Some(2048)),
            ("1GB", Some(1 << 20)),
            ("2M", None),
            ("99999999999999999GB", None),
        ];
        for (size, expected) in cases {
            assert_eq!(kib(size), expected, "{size}");
        }
    }

    #[test]
    fn the_pool_is_what_the_containers_have_together() {
        let pools = tempfile::tempdir().unwrap();
        let pool = pools.path().join("hugepages-2048kB");
        fs::create_dir(&pool).unwrap();
        let pool = pool.join("nr_hugepages");
        fs::write(&pool, "0\n").unwrap();
        let limits = |size: &str, bytes: i64| -> LinuxResources {
            let limits = json!({"hugepageLimits": [{"pageSize": size, "limit": bytes}]});
            serde_json::from_value(limits).unwrap()
        };
        let reserve = |limits| HugePages::reserve_in(pools.path(), Some(&limits)).unwrap();
        let first = reserve(limits("2MB", 8 << 20));
        let second = reserve(limits("2MB", 5 << 20));
        let none = reserve(limits("1GB", 1 << 30));
        assert_eq!(fs::read_to_string(&pool).unwrap(), "6");
        drop((first, none));
        assert_eq!(fs::read_to_string(&pool).unwrap(), "2");
        drop(second);
        assert_eq!(fs::read_to_string(&pool).unwrap(), "0");
    }
}
