//! `cargo xtask build`: the product, one directory that runs from wherever it is put.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::image;
use crate::process;
use crate::project::Project;
use crate::step::step;

/// Static programs need an explicit target: only then do its flags stay away from build scripts and macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "product";
const PACKAGES: [&str; 4] = [
    "coffer-agent",
    "coffer-shim",
    "coffer-hypervisor",
    "coffer-fsd",
];
const PROGRAMS: [&str; 5] = [
    "coffer",
    "containerd-shim-coffer-v2",
    "coffer-vmm",
    "coffer-qemu",
    "coffer-fsd",
];
const AGENT: &str = "coffer-agent";
/// What `tests/` calls it.
const CRASH_POINTS: &str = "containerd-shim-coffer-v2-crash-points";

/// Builds all of the product and returns its directory.
pub fn run(project: &Project) -> Result<PathBuf> {
    let kernel = image::kernel(project)?;
    step("compile the product", || {
        process::run_shown(&mut cargo(project)?)
    })?;
    let compiled = project.target.join(TARGET).join(PROFILE);
    let product = project.product();
    fs::create_dir_all(&product).with_context(|| format!("create {}", product.display()))?;
    image::assemble(&kernel, &compiled.join(AGENT), &product)?;
    for program in PROGRAMS {
        let program_path = compiled.join(program);
        ensure_static(&program_path)?;
        replace(&program_path, &product.join(program))?;
    }
    eprintln!("--> the product is in {}", product.display());
    Ok(product)
}

/// Puts a shim beside the product that a test can have die at a named point. Nobody gets it but tests.
pub fn crash_points(project: &Project) -> Result<()> {
    // All packages again: with one alone, its dependencies would have other features and be compiled anew.
    let mut cargo = cargo(project)?;
    cargo.arg("--features=coffer-shim/crash-points");
    step("compile the shim with crash points", || {
        process::run_shown(&mut cargo)
    })?;
    let compiled = project.target.join(TARGET).join(PROFILE);
    replace(
        &compiled.join("containerd-shim-coffer-v2"),
        &project.product().join(CRASH_POINTS),
    )
}

fn cargo(project: &Project) -> Result<Command> {
    let mut cargo = project.cargo();
    cargo.args([
        "build",
        "--locked",
        "--target",
        TARGET,
        "--profile",
        PROFILE,
    ]);
    cargo.args(PACKAGES.map(|package| format!("--package={package}")));
    let mut flags = env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" -C target-feature=+crt-static");
    cargo.env("RUSTFLAGS", flags.trim());
    for (variable, library) in [("LIBSECCOMP", "libseccomp.a"), ("LIBCAPNG", "libcap-ng.a")] {
        cargo.env(format!("{variable}_LINK_TYPE"), "static");
        cargo.env(format!("{variable}_LIB_PATH"), directory_of(library)?);
    }
    Ok(cargo)
}

/// Where the C compiler finds a library.
fn directory_of(library: &str) -> Result<PathBuf> {
    let path = process::output(Command::new("gcc").arg(format!("-print-file-name={library}")))?;
    let directory = Path::new(&path)
        .parent()
        .filter(|directory| directory.is_absolute());
    Ok(directory
        .with_context(|| format!("{library} is missing: run `cargo xtask setup`"))?
        .to_path_buf())
}

/// A program that needs a loader would not run in an empty root, and the agent in no guest at all.
fn ensure_static(program: &Path) -> Result<()> {
    let headers = process::output(
        Command::new("readelf")
            .arg("--program-headers")
            .arg(program),
    )?;
    ensure!(
        !headers.contains("INTERP"),
        "{} is not static",
        program.display()
    );
    Ok(())
}

/// Puts a new file in the place of an old one that may be running.
fn replace(from: &Path, to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    fs::copy(from, &new)
        .with_context(|| format!("copy {} to {}", from.display(), new.display()))?;
    fs::rename(&new, to).with_context(|| format!("rename to {}", to.display()))
}
