//! The guest's CPUs. All that the pod may ever need are there from the boot; which of them are online follows the limits of its
//! containers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const SYSFS: &str = "/sys/devices/system/cpu";

/// Why the CPUs are not as the host wants them.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    #[error("{wanted} CPUs are not between 1 and the {present} of this guest")]
    Count { wanted: u32, present: u32 },
    #[error("can't read {path}")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("can't set {path} to {value}")]
    Set {
        path: PathBuf,
        value: &'static str,
        #[source]
        cause: io::Error,
    },
}

/// Brings the first `count` CPUs online and takes the others offline. Blocks: a CPU takes milliseconds either way.
pub fn set_online(count: u32) -> Result<(), CpuError> {
    set_online_in(Path::new(SYSFS), count)
}

fn set_online_in(sysfs: &Path, count: u32) -> Result<(), CpuError> {
    let path = sysfs.join("present");
    let text = fs::read_to_string(&path).map_err(|cause| CpuError::Read { path, cause })?;
    let present = count_of(&text);
    if !(1..=present).contains(&count) {
        return Err(CpuError::Count {
            wanted: count,
            present,
        });
    }
    // The first one can't be taken offline, and has no such file.
    for cpu in 1..present {
        let path = sysfs.join(format!("cpu{cpu}/online"));
        let value = if cpu < count { "1" } else { "0" };
        let now = fs::read_to_string(&path).unwrap_or_default();
        if now.trim() != value {
            fs::write(&path, value).map_err(|cause| CpuError::Set { path, value, cause })?;
        }
    }
    Ok(())
}

/// "0-3" and "0": our hypervisors number them without gaps.
fn count_of(list: &str) -> u32 {
    let last = list.trim().rsplit(['-', ',']).next().unwrap_or_default();
    last.parse::<u32>().map_or(1, |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_online_as_asked_for() {
        let sysfs = tempfile::tempdir().unwrap();
        let file = |name: &str| sysfs.path().join(name);
        fs::write(file("present"), "0-3\n").unwrap();
        for cpu in 1..4 {
            fs::create_dir(file(&format!("cpu{cpu}"))).unwrap();
            fs::write(file(&format!("cpu{cpu}/online")), "0\n").unwrap();
        }
        let online = || -> Vec<String> {
            let read = |cpu| fs::read_to_string(file(&format!("cpu{cpu}/online"))).unwrap();
            (1..4).map(|cpu| read(cpu).trim().to_owned()).collect()
        };
        for (count, expected) in [(3, ["1", "1", "0"]), (4, ["1"; 3]), (1, ["0"; 3])] {
            set_online_in(sysfs.path(), count).unwrap();
            assert_eq!(online(), expected);
        }
        for bad in [0, 5] {
            let error = set_online_in(sysfs.path(), bad).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad} CPUs")), "{error}");
        }
    }
}
