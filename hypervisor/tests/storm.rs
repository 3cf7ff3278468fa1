//! A guest that kicks the queues of all its devices without a pause.

#[allow(dead_code)] // Some of it only the tests of coffer-vmm use.
mod shim;

use coffer_proto::vmm::{Exit, Request};
use shim::Vmm;
use shim::code::{HALT, phase, program, storm};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[test]
fn a_storm_of_kicks_leaves_the_control_socket_alive() {
    let mut vmm = Vmm::boot(&storm());
    vmm.event();
    let rejected = |vmm: &mut Vmm| vmm.metrics().devices["rng.rejected_writes"];
    let (before, started) = (rejected(&mut vmm), Instant::now());
    for _ in 0..100 {
        let asked = Instant::now();
        vmm.metrics();
        assert!(asked.elapsed() < Duration::from_secs(1));
    }
    while rejected(&mut vmm) == before {
        assert!(started.elapsed() < Duration::from_secs(10), "no storm");
    }
    vmm.ask(&Request::Pause);
    vmm.ask(&Request::Stop);
    assert_eq!(vmm.until_exit().1, Exit::Stopped);
    assert_eq!(vmm.log(), "", "a storm is nothing to write down");
}

/// How long the storm blows.
const STORM: Duration = Duration::from_secs(60);
/// The storming VMM's share of one CPU, in percent.
const QUOTA_PERCENT: u32 = 50;
/// Pauses between the neighbour's requests: short enough for many samples, long enough to be an idle process.
const PACE: Duration = Duration::from_millis(5);

/// A cgroup that allows its processes a share of one CPU.
struct Quota {
    dir: PathBuf,
}

impl Quota {
    fn new(percent: u32) -> Self {
        const PERIOD_US: u32 = 100_000;
        let (v1, name) = (
            Path::new("/sys/fs/cgroup/cpu"),
            format!("coffer-storm-{}", std::process::id()),
        );
        let quota = PERIOD_US * percent / 100;
        let (dir, limits) = if v1.is_dir() {
            let limits = [
                ("cpu.cfs_period_us", PERIOD_US.to_string()),
                ("cpu.cfs_quota_us", quota.to_string()),
            ];
            (v1.join(name), limits.to_vec())
        } else {
            let root = Path::new("/sys/fs/cgroup");
            fs::write(root.join("cgroup.subtree_control"), "+cpu").unwrap();
            (
                root.join(name),
                vec![("cpu.max", format!("{quota} {PERIOD_US}"))],
            )
        };
        fs::create_dir(&dir).unwrap();
        for (file, value) in limits {
            fs::write(dir.join(file), value).unwrap();
        }
        Self { dir }
    }

    fn add(&self, pid: u32) {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::sleep(PACE);
        }
    }
}

/// The time under which 99 of 100 answers of this VMM stay.
fn p99(vmm: &mut Vmm, duration: Duration) -> Duration {
    let (started, mut times) = (Instant::now(), Vec::new());
    while started.elapsed() < duration {
        let asked = Instant::now();
        vmm.metrics();
        times.push(asked.elapsed());
        std::thread::sleep(PACE);
    }
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// CPU time that a process has used, of all its threads.
fn cpu_time(pid: u32) -> Duration {
    const TICKS_PER_SECOND: u32 = 100;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    // utime and stime, proc(5); the name and what is before it are cut off.
    let ticks: u32 = [11, 12]
        .map(|at: usize| fields[at].parse::<u32>().unwrap())
        .iter()
        .sum();
    Duration::from_secs(1) * ticks / TICKS_PER_SECOND
}

#[test]
fn heavy_a_storm_within_its_quota_is_not_felt_by_a_neighbour() {
    let mut neighbour = Vmm::boot(&program(&[&phase(1), &HALT]));
    neighbour.event();
    let calm = p99(&mut neighbour, STORM / 3);
    let quota = Quota::new(QUOTA_PERCENT);
    let mut storming = Vmm::boot(&storm());
    storming.event();
    quota.add(storming.pid());
    let (started, used) = (Instant::now(), cpu_time(storming.pid()));
    let stormy = p99(&mut neighbour, STORM);
    let used = cpu_time(storming.pid()) - used;
    let allowed = started.elapsed() * QUOTA_PERCENT / 100;
    let kicks = storming.metrics().devices["rng.rejected_writes"];
    println!(
        "p99 of the neighbour: {calm:?} in the calm, {stormy:?} in the storm, which used {used:?} of {allowed:?}, {kicks} odd kicks"
    );
    assert!(kicks > 1000, "{kicks} are no storm");
    assert!(
        used < allowed * 11 / 10,
        "the storm used {used:?} of {allowed:?}"
    );
    assert!(stormy < calm * 2, "{stormy:?} and not {calm:?}");
    assert_eq!(storming.log(), "", "a storm is nothing to write down");
}
