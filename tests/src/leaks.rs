//! Finds what a test's sandboxes left behind.
//!
//! The test process is a child subreaper, so whatever a sandbox daemonised comes back to it as a descendant when its
//! parent ends. Mounts, sockets and directories carry the test's state root in their path, cgroups its name. The test
//! assets are all tests', so what is made in their roots, as a mount point would be, counts as a leak too.

use crate::asset;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the issue promises: everything of a sandbox is gone within this time of its end.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// What was there before the test and may be there after it.
#[derive(Debug)]
pub struct Before {
    links: BTreeSet<String>,
    assets: BTreeSet<PathBuf>,
    open_files: Vec<PathBuf>,
}

impl Before {
    pub fn take() -> Self {
        // The first runtime makes a pair of sockets for signals, which stay for the life of the process.
        drop(tokio::runtime::Runtime::new().expect("a runtime"));
        Self {
            links: links(),
            assets: assets(),
            open_files: open_files(),
        }
    }
}

/// Makes this process the parent of descendants whose own parent ended.
pub fn adopt_orphans() {
    nix::sys::prctl::set_child_subreaper(true).expect("PR_SET_CHILD_SUBREAPER is always allowed");
}

/// Looks until nothing is left or time is up.
pub fn check(before: &Before, name: &str, root: &Path) -> Result<()> {
    let deadline = Instant::now() + GONE_WITHIN;
    loop {
        let left = find(before, name, root)?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "left behind after {GONE_WITHIN:?}:\n  {}",
            left.join("\n  ")
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn find(before: &Before, name: &str, root: &Path) -> Result<Vec<String>> {
    reap();
    let mut left = Vec::new();
    for pid in descendants(std::process::id())? {
        left.push(format!("process {pid}: {}", command_line(pid)));
    }
    let root_text = root.to_str().context("the root is UTF-8")?;
    for (what, file) in [
        ("mount", "/proc/self/mountinfo"),
        ("unix socket", "/proc/net/unix"),
    ] {
        let text = fs::read_to_string(file).with_context(|| format!("can't read {file}"))?;
        left.extend(
            text.lines()
                .filter(|line| line.contains(root_text))
                .map(|line| format!("{what}: {line}")),
        );
    }
    let mut cgroups = Vec::new();
    find_named(Path::new("/sys/fs/cgroup"), name, 4, &mut cgroups);
    left.extend(
        cgroups
            .into_iter()
            .map(|path| format!("cgroup: {}", path.display())),
    );
    for entry in fs::read_dir(root).with_context(|| format!("can't read {}", root.display()))? {
        left.push(format!("directory: {}", entry?.path().display()));
    }
    left.extend(
        links()
            .difference(&before.links)
            .filter(|link| link.starts_with("cfr"))
            .map(|link| format!("link: {link}")),
    );
    left.extend(assets().difference(&before.assets).map(|path| {
        format!(
            "in the assets, of which a test takes a copy: {}",
            path.display()
        )
    }));
    let mut new = open_files();
    if new.len() > before.open_files.len() {
        for file in &before.open_files {
            if let Some(at) = new.iter().position(|open| open == file) {
                new.swap_remove(at);
            }
        }
        let told = |file: PathBuf| format!("open file of the test: {}", file.display());
        left.extend(new.into_iter().map(told));
    }
    Ok(left)
}

/// Directories below `dir` whose name contains `name`.
fn find_named(dir: &Path, name: &str, depth: usize, found: &mut Vec<PathBuf>) {
    if depth == 0 {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            if entry.file_name().to_string_lossy().contains(name) {
                found.push(entry.path());
            }
            find_named(&entry.path(), name, depth - 1, found);
        }
    }
}

/// What stands in the roots that the tests share.
fn assets() -> BTreeSet<PathBuf> {
    let roots = ["busybox", "debian"].map(asset);
    let entries = roots.iter().flat_map(fs::read_dir).flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn links() -> BTreeSet<String> {
    fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

/// What this process has open, as far as it has a name.
fn open_files() -> Vec<PathBuf> {
    fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .collect()
}

fn reap() {
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            break;
        }
    }
}

/// All living descendants of a process.
pub fn descendants(pid: u32) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    let mut next = vec![pid];
    while let Some(parent) = next.pop() {
        for task in fs::read_dir(format!("/proc/{parent}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            next.extend(
                children
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
        if parent != pid {
            all.push(parent);
        }
    }
    Ok(all)
}

/// A process's command line, for messages and for finding it.
pub fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes)
        .replace('\0', " ")
        .trim_end()
        .to_owned()
}

/// After a failure: the rest of the suite must not run beside what this test lost.
pub fn kill_descendants() {
    for pid in descendants(std::process::id()).unwrap_or_default() {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid.cast_signed()),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
}
