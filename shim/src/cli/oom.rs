//! How the host learns that the guest's kernel killed for want of memory.
//!
//! Engines look at two places. CRI-O and podman up to 4 read a file `oom` in the bundle, so that is made. podman 5 reads one that conmon
//! writes where no runtime is told of; conmon watches the counters of the cgroup of the container's process (`memory.events`), which the
//! guest's limits never touch. So one process of ours is made to run out of memory there: it is in the stand-in's cgroup for
//! this moment, marked as the one to be killed, and the limit that it hits is taken away again.

use crate::cgroup::CgroupPath;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// The file in the bundle.
const FILE: &str = "oom";
/// What the cgroup may use beyond what it does, while the process allocates more than that.
const ROOM_BYTES: u64 = 4 << 20;
const WANTED_BYTES: usize = 64 << 20;
/// The kernel's word for: kill this one before all others.
const FIRST_TO_GO: &str = "1000";

/// Tells both. `cgroup` is the path of the stand-in's own.
pub(super) fn report(bundle: &Path, cgroup: Option<&CgroupPath>) {
    // Gone with the bundle is no error.
    let _ = File::create(bundle.join(FILE));
    let Some(cgroup) = cgroup else { return };
    let directory = cgroup.below(Path::new("/sys/fs/cgroup"));
    if let Err(error) = count(&directory) {
        tracing::debug!(%error, "the cgroup's counters do not tell the want of memory");
    }
}

/// Makes the counter of a version 2 cgroup with a memory controller go up by one.
fn count(cgroup: &Path) -> io::Result<()> {
    let limit = cgroup.join("memory.max");
    let before = fs::read_to_string(&limit)?;
    let ended = exhaust(cgroup);
    fs::write(&limit, before.trim())?;
    ended
}

fn exhaust(cgroup: &Path) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("coffer")
        .arg("exhaust")
        .arg(cgroup)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().map(drop)
}

/// `coffer exhaust`: limits the cgroup it is in, and takes memory until it is killed or has taken enough to know that nobody will.
pub(super) fn take_memory(cgroup: &Path) -> io::Result<()> {
    // First of all, so that nobody else is chosen.
    fs::write("/proc/self/oom_score_adj", FIRST_TO_GO)?;
    let used = fs::read_to_string(cgroup.join("memory.current"))?;
    let used: u64 = used.trim().parse().map_err(io::Error::other)?;
    fs::write(cgroup.join("memory.max"), (used + ROOM_BYTES).to_string())?;
    let taken = vec![1_u8; WANTED_BYTES];
    std::hint::black_box(&taken);
    Ok(())
}
