//! coffer-vmm against QEMU's microvm.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bench::Place;
use crate::bench::report::{Report, Samples};

/// KVM's counters, one directory per VM, named by the process that owns it. There is one sandbox at a time.
const KVM_COUNTERS: &str = "/sys/kernel/debug/kvm";
/// Time for a guest that has booted to become quiet before its memory is looked at.
const SETTLE: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Side {
    boot: Samples,
    exits: Samples,
    memory: Samples,
}

pub fn measure(place: &Place, report: &mut Report) -> Result<()> {
    let (mut ours, mut theirs) = (Side::default(), Side::default());
    for run in 0..place.runs {
        eprintln!("--> boot {} of {}", run + 1, place.runs);
        ours.add(place, "coffer-vmm")?;
        theirs.add(place, "qemu")?;
    }
    report.add(
        "boot to agent-ready",
        "ms",
        ours.boot,
        "QEMU microvm",
        theirs.boot,
    );
    report.add(
        "exits until then",
        "thousand",
        ours.exits,
        "QEMU microvm",
        theirs.exits,
    );
    report.add(
        "private memory besides the guest's",
        "MiB",
        ours.memory,
        "QEMU microvm",
        theirs.memory,
    );
    Ok(())
}

impl Side {
    /// One boot.
    fn add(&mut self, place: &Place, hypervisor: &str) -> Result<()> {
        let name = format!("boot-{hypervisor}");
        let timings = place.start_sandbox(&name, hypervisor)?;
        self.boot.add(agent_ready_ms(&timings)?);
        let (counters, process) = only_vm()?;
        self.exits
            .add(read_number(&counters.join("exits"))? / 1000.0);
        thread::sleep(SETTLE);
        let smaps = fs::read_to_string(format!("/proc/{process}/smaps")).context("read smaps")?;
        self.memory.add(private_kib(&smaps) / 1024.0);
        place.delete_sandbox(&name)
    }
}

/// From the hypervisor's process start to the agent being up, of `coffer run --timings --json`.
fn agent_ready_ms(timings: &str) -> Result<f64> {
    let line = timings
        .lines()
        .find(|line| line.starts_with('{'))
        .context("coffer run printed no timings")?;
    let timings: Value = serde_json::from_str(line)?;
    let phases = timings["phases"]
        .as_array()
        .context("no phases in the timings")?;
    let mut of_hypervisor = phases.iter().filter(|phase| phase["clock"] == "hypervisor");
    let last = of_hypervisor
        .next_back()
        .context("the hypervisor reported no phase")?;
    let microseconds = last["at_us"].as_f64();
    Ok(microseconds.context("a phase without at_us")? / 1e3)
}

/// KVM's counters of the only VM, and the process that owns it.
fn only_vm() -> Result<(PathBuf, u32)> {
    let entries = fs::read_dir(KVM_COUNTERS).with_context(|| format!("read {KVM_COUNTERS}"))?;
    let mut vms = entries.flatten().filter_map(|entry| {
        let name = entry.file_name();
        let (process, _) = name.to_str()?.split_once('-')?;
        Some((entry.path(), process.parse().ok()?))
    });
    vms.next()
        .with_context(|| format!("{KVM_COUNTERS} has no VM"))
}

fn read_number(path: &Path) -> Result<f64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.trim()
        .parse()
        .with_context(|| format!("{} holds no number", path.display()))
}

/// Private pages of all mappings but those of the guest's memory, which is a memfd in both programs.
fn private_kib(smaps: &str) -> f64 {
    let (mut sum, mut counts) = (0.0, true);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Private_Clean:" | "Private_Dirty:") if counts => {
                sum += words
                    .next()
                    .and_then(|number| number.parse::<f64>().ok())
                    .unwrap_or_default();
            }
            Some(word) if !word.ends_with(':') => counts = !line.contains("/memfd:"),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "7f00-7f10 rw-s 0 00:01 12 /memfd:ram (deleted)\nRss: 9 kB\nPrivate_Dirty: 900 kB\n\
                     5500-5600 r-xp 0 00:01 13 /usr/bin/x\nPrivate_Clean: 3 kB\nPrivate_Dirty: 4 kB\n";
        assert_eq!(private_kib(smaps), 7.0);
    }

    #[test]
    fn the_last_phase_of_the_hypervisor_counts() {
        let line = "coffer: warning\n{\"phases\":[{\"name\":\"x\",\"at_us\":5000,\"clock\":\"hypervisor\"},\
                    {\"name\":\"y\",\"at_us\":1500000,\"clock\":\"hypervisor\"},\
                    {\"name\":\"z\",\"at_us\":9000000,\"clock\":\"host\"}]}\n";
        assert_eq!(agent_ready_ms(line).unwrap(), 1500.0);
    }
}
