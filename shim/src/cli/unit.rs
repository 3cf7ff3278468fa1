//! A service of systemd's for the supervisor, on a host that systemd runs (docs/decisions/0009).
//!
//! What an engine's monitor starts is a descendant of the monitor, in the cgroup of its unit. The end of that unit would take the
//! supervisor with it before it has cleaned up, and conmon stays as long as one of its descendants does. A transient service is
//! systemd's child, in a cgroup of its own in the container's slice:
//!
//! ```text
//! coffer create ── spawns ──► systemd-run --pipe ── its streams, by D-Bus ──► systemd ── starts ──► coffer supervise --beside PID
//!       │                                                                                       enters the namespaces of PID, which is
//!       └── options ──► stdin                        stdout ──► "unix://…/task.sock"            coffer create
//! ```

use crate::cgroup::{own_cgroup, unit_of};
use crate::machine::SandboxOptions;
use crate::machine::child::pidfd_open;
use nix::sched::{CloneFlags, setns};
use nix::unistd::dup2_stderr;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::time::Duration;

/// There exactly if systemd has booted the host: sd_booted(3).
const BOOTED: &str = "/run/systemd/system";
/// In the package of systemd itself.
const PROGRAM: &str = "/usr/bin/systemd-run";
/// systemd answers within milliseconds unless it is stuck, and then nobody is to wait for it; but a machine may be emulated.
pub(super) const START: Duration = Duration::from_secs(5);
/// Where systemd puts a service that names no slice.
const DEFAULT_SLICE: &str = "system.slice";
/// What of the supervisor's service is not as systemd has it for others.
const PROPERTIES: [&str; 5] = [
    // It ends its VM itself.
    "KillMode=mixed",
    // The guest powers off within seconds, or is stopped.
    "TimeoutStopSec=30",
    // It tells of the end of a VM for want of memory, and is not ended for it.
    "OOMPolicy=continue",
    // A descriptor for each stream of each process, and a thread for some waits; containerd.service has the same.
    "LimitNOFILE=1048576",
    "TasksMax=infinity",
];

/// Whether there is a systemd to ask.
pub(super) fn is_possible() -> bool {
    Path::new(BOOTED).is_dir() && Path::new(PROGRAM).exists()
}

/// The words that start `program` as a service for this sandbox. systemd-run has its streams, and stays until the service's end.
pub(super) fn words(options: &SandboxOptions, program: &[OsString]) -> Vec<OsString> {
    let own = own_cgroup();
    build(options, unit_of(&own), program)
}

fn build(options: &SandboxOptions, callers: Option<&str>, program: &[OsString]) -> Vec<OsString> {
    let id = &options.id;
    let slice = options.cgroup.as_ref().and_then(|cgroup| cgroup.slice());
    let mut words = vec![
        PROGRAM.to_owned(),
        "--quiet".to_owned(),
        "--no-ask-password".to_owned(),
        "--collect".to_owned(),
        "--pipe".to_owned(),
        "--service-type=exec".to_owned(),
        format!("--unit=coffer-{id}.service"),
        format!("--slice={}", slice.unwrap_or(DEFAULT_SLICE)),
        format!("--description=Supervisor of the Coffer sandbox {id}"),
    ];
    words.extend(PROPERTIES.map(|property| format!("--property={property}")));
    // When the host goes down, what waits for the container's end comes first.
    words.extend(callers.map(|unit| format!("--property=Before={unit}")));
    words.push("--".to_owned());
    let words = words.into_iter().map(OsString::from);
    words
        .chain(program.iter().map(|word| escaped(word)))
        .collect()
}

/// systemd replaces variables in the words of a service's command.
fn escaped(word: &OsStr) -> OsString {
    let parts: Vec<&[u8]> = word.as_bytes().split(|byte| *byte == b'$').collect();
    OsString::from_vec(parts.join(&b"$$"[..]))
}

/// Enters the namespaces of the process that asked systemd for this one: what it mounted is there, and its network. Must run
/// before there are threads, for mounts are a whole process's.
pub(super) fn enter(caller: i32) -> io::Result<()> {
    let caller = pidfd_open(caller)?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP;
    setns(&caller, namespaces)?;
    // What goes wrong up to here the caller reads there, and nobody later.
    Ok(dup2_stderr(File::options().write(true).open("/dev/null")?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::CgroupPath;
    use crate::state::tests::options;

    #[test]
    fn the_service_is_in_the_containers_slice_and_ends_after_its_caller() {
        let mut options = options(Path::new("/r"), "pod");
        let program = ["/opt/$x/coffer", "supervise"].map(OsString::from);
        let has = |words: &[OsString], word: &str| words.iter().any(|known| known == word);
        let plain = build(&options, None, &program);
        assert!(has(&plain, "--unit=coffer-pod.service"), "{plain:?}");
        assert!(has(&plain, "--slice=system.slice"), "{plain:?}");
        assert_eq!(
            plain[plain.len() - 3..],
            ["--", "/opt/$$x/coffer", "supervise"]
        );
        options.cgroup = CgroupPath::parse("machine-pod.slice:libpod:1").ok();
        let placed = build(&options, Some("libpod-conmon-1.scope"), &program);
        assert!(has(&placed, "--slice=machine-pod.slice"), "{placed:?}");
        assert!(
            has(&placed, "--property=Before=libpod-conmon-1.scope"),
            "{placed:?}"
        );
    }
}
