//! `cargo xtask lint`: what is checked without running anything.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process;
use crate::project::Project;
use crate::setup::Release;
use crate::step::step;

/// Crates of which two versions would mean two incompatible views of the guest's memory. virtiofsd has its own, so
/// coffer-fsd is looked at apart from the rest.
const ONE_VERSION: [&str; 6] = [
    "vm-memory",
    "vhost",
    "virtio-queue",
    "virtio-bindings",
    "kvm-bindings",
    "ttrpc",
];

pub fn run(project: &Project) -> Result<()> {
    step("cargo fmt", || {
        process::run(project.cargo().args(["fmt", "--all", "--check"]))
    })?;
    step("cargo clippy", || {
        let mut clippy = project.cargo();
        clippy.args([
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ]);
        process::run_shown(&mut clippy)
    })?;
    step("one version of each memory and protocol crate", || {
        one_version(project)
    })?;
    step("nothing of one machine in the sources", || {
        no_machine_names(project)
    })
}

fn one_version(project: &Project) -> Result<()> {
    for package in [
        "coffer-shim",
        "coffer-hypervisor",
        "coffer-agent",
        "coffer-fsd",
    ] {
        let mut tree = project.cargo();
        tree.args([
            "tree",
            "--locked",
            "--package",
            package,
            "--edges=normal",
            "--prefix=none",
            "--format={p}",
        ]);
        let tree = process::output(&mut tree)?;
        for name in ONE_VERSION {
            let mut versions: Vec<_> = tree
                .lines()
                .filter_map(|line| line.strip_prefix(name)?.strip_prefix(" v"))
                .collect();
            // Repeated subtrees are marked "(*)".
            versions
                .iter_mut()
                .for_each(|version| *version = version.trim_end_matches(" (*)"));
            versions.sort_unstable();
            versions.dedup();
            ensure!(
                versions.len() <= 1,
                "{package} has {name} in versions {}",
                versions.join(", ")
            );
        }
    }
    Ok(())
}

/// Tracked files name neither the mirror this machine downloads from nor directories of this machine.
fn no_machine_names(project: &Project) -> Result<()> {
    let archive = Release::of_this_machine()?.archive;
    let host = archive
        .split("://")
        .nth(1)
        .and_then(|rest| rest.split('/').next())
        .unwrap_or(&archive)
        .to_owned();
    let root = project.root.display().to_string();
    let files = process::output(
        Command::new("git")
            .args(["ls-files"])
            .current_dir(&project.root),
    )?;
    let mut found = Vec::new();
    for file in files.lines() {
        let content = fs::read(project.root.join(file)).with_context(|| format!("read {file}"))?;
        let content = String::from_utf8_lossy(&content);
        for (number, line) in content.lines().enumerate() {
            if line.contains(&host) || line.contains(&root) {
                found.push(format!("{file}:{}", number + 1));
            }
        }
    }
    ensure!(
        found.is_empty(),
        "these lines name {host} or {root}:\n{}",
        found.join("\n")
    );
    Ok(())
}
