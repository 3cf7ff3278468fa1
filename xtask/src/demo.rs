//! `cargo xtask demo`: from a fresh machine to the output of a container in a microVM.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::project::Project;
use crate::{assets, build, setup};

/// What the container prints: the guest's kernel, its own host name, and itself as process 1.
const SCRIPT: &str = r#"echo "kernel    $(uname -r)"; echo "hostname  $(hostname)"; echo "processes"; ps -o pid,comm"#;
/// The container's exit code, to show that it arrives.
const EXIT_CODE: u8 = 42;

pub fn run(project: &Project) -> Result<ExitCode> {
    setup::run(project)?;
    let product = build::run(project)?;
    let image = assets::get(project)?.join("busybox-layout");
    let mut coffer = Command::new(product.join("coffer"));
    coffer
        .args(["run", "--name", "demo", "--hostname", "demo", "--timings"])
        .arg(image);
    coffer
        .args(["--", "sh", "-c"])
        .arg(format!("{SCRIPT}; exit {EXIT_CODE}"));
    eprintln!("--> coffer run: a container in a microVM");
    let status = coffer.status().context("start coffer")?;
    ensure!(
        status.code() == Some(EXIT_CODE.into()),
        "the container's exit code, {EXIT_CODE}, did not arrive: {status}"
    );
    eprintln!("--> the container's exit code arrived: {EXIT_CODE}");
    Ok(ExitCode::from(EXIT_CODE))
}
