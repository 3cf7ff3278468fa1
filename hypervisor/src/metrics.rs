//! Counters of the VM, gathered when the shim asks.

use crate::clock;
use crate::machine::Machine;
use coffer_proto::vmm::Metrics;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Phases of the boot so far, and what the process itself uses.
#[derive(Debug)]
pub struct ProcessMetrics {
    /// `/proc/self/smaps`, opened before the jail took all paths away.
    smaps: Option<File>,
    vm_created_cpu: Duration,
    phases: BTreeMap<String, u64>,
}

impl ProcessMetrics {
    /// Call before the jail closes. Without /proc there is no memory figure.
    pub fn new() -> Self {
        let smaps = File::open("/proc/self/smaps").ok();
        Self {
            smaps,
            vm_created_cpu: Duration::ZERO,
            phases: BTreeMap::new(),
        }
    }

    /// KVM_CREATE_VM has returned.
    pub fn vm_created(&mut self) {
        self.vm_created_cpu = clock::cpu_time();
        self.phase("vm_created", clock::since_start());
    }

    /// Records when a phase was reached.
    pub fn phase(&mut self, name: &str, since_start: Duration) {
        self.phases.insert(name.to_owned(), micros(since_start));
    }

    /// Everything at once.
    pub fn gather(&self, machine: &Machine) -> Metrics {
        let mut devices = BTreeMap::from([("bus.unanswered".to_owned(), machine.bus.unanswered())]);
        for slot in &machine.slots {
            let mut transport = slot.lock();
            devices.insert(
                format!("{}.rejected_writes", slot.name),
                transport.rejected(),
            );
            for (counter, value) in transport.device().counters() {
                devices.insert(format!("{}.{counter}", slot.name), value);
            }
        }
        Metrics {
            exits: machine
                .exits
                .iter()
                .map(|(kind, count)| (kind.to_owned(), count))
                .collect(),
            vm_created_cpu_us: micros(self.vm_created_cpu),
            phases: self.phases.clone(),
            private_rss: self
                .smaps
                .as_ref()
                .and_then(|smaps| private_rss(smaps).ok())
                .unwrap_or_default(),
            devices,
        }
    }
}

impl Default for ProcessMetrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Microseconds, as the protocol counts.
pub fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

/// Bytes of private pages in all mappings but guest RAM.
fn private_rss(smaps: &File) -> io::Result<u64> {
    /// More mappings than this process has, by far.
    const LIMIT: usize = 1 << 20;
    let mut text = Vec::new();
    let mut chunk = [0; 16 << 10];
    while text.len() < LIMIT {
        let got = smaps.read_at(&mut chunk, text.len() as u64)?;
        if got == 0 {
            break;
        }
        text.extend_from_slice(&chunk[..got]);
    }
    Ok(sum_private(&String::from_utf8_lossy(&text)))
}

fn sum_private(smaps: &str) -> u64 {
    let mut kib = 0;
    let mut counted = true;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("Private_Clean:" | "Private_Dirty:") if counted => {
                kib += words
                    .next()
                    .and_then(|number| number.parse::<u64>().ok())
                    .unwrap_or_default();
            }
            // A line that begins a mapping: "7f…-7f… rw-s 00000000 00:01 12 /memfd:coffer-ram (deleted)".
            Some(word) if !word.ends_with(':') => counted = !line.contains("/memfd:coffer-ram"),
            _ => {}
        }
    }
    kib << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_not_counted() {
        let smaps = "\
7f0000000000-7f0010000000 rw-s 00000000 00:01 12 /memfd:coffer-ram (deleted)
Private_Clean:         0 kB
Private_Dirty:    262144 kB
VmFlags: rd wr
7f0010000000-7f0010010000 rw-p 00000000 00:00 0
Private_Clean:         4 kB
Private_Dirty:        60 kB
";
        assert_eq!(sum_private(smaps), 64 << 10);
    }

    #[test]
    fn this_process_has_some_private_memory() {
        assert!(private_rss(&File::open("/proc/self/smaps").unwrap()).unwrap() > 64 << 10);
    }
}
