//! `cargo xtask bench`: Coffer compared, in one run on one machine, with what it wants to be as good as.
//!
//! Boot, exits and memory: coffer-vmm against QEMU's microvm, both on KVM with the same kernel, initrd, memory and CPU.
//! Exec, streams and files: a container of Coffer against the same container under runc. Everything runs in the test
//! node, interleaved, so the load of this machine meets both sides. Emulation makes absolute times meaningless; the
//! ratios are what counts.

mod boot;
mod container;
mod report;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::bench::report::Report;
use crate::node::{self, Node};
use crate::project::Project;
use crate::{build, process, test};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Boots and runs of each kind; more give steadier medians
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Measure on this machine's own KVM instead of in the test node
    #[arg(long)]
    here: bool,
}

/// Where the bench finds things and leaves its sandboxes.
#[derive(Debug)]
struct Place {
    product: PathBuf,
    /// A busybox root file system of the bench's own; both sides write into it.
    rootfs: PathBuf,
    scratch: PathBuf,
    runs: usize,
}

pub fn run(project: &Project, arguments: &Arguments) -> Result<ExitCode> {
    let product = build::run(project)?;
    let runs = arguments.runs.to_string();
    if arguments.here {
        let assets = crate::assets::get(project)?;
        measure(&product, &assets, arguments.runs)?;
        return Ok(ExitCode::SUCCESS);
    }
    let node = Node::get(project)?;
    let this_program = env::current_exe().context("find this program")?;
    let share = test::node_share(project, &[this_program])?;
    let inside = Path::new(node::SHARE);
    let words = [
        inside.join("tests/xtask"),
        "bench-inside".into(),
        inside.join("product"),
        node::ASSETS.into(),
        runs.into(),
    ];
    let status = node.run(Some(&share), &words.map(PathBuf::into_os_string), &[])?;
    Ok(ExitCode::from(status))
}

/// The bench itself, on the machine where it is to measure. Prints the table.
pub fn measure(product: &Path, assets: &Path, runs: usize) -> Result<()> {
    let scratch = tempfile::Builder::new()
        .prefix("coffer-bench-")
        .tempdir_in("/var/tmp")?;
    let rootfs = scratch.path().join("rootfs");
    process::run(
        Command::new("cp")
            .arg("-a")
            .arg(assets.join("busybox"))
            .arg(&rootfs),
    )?;
    let place = Place {
        product: product.to_path_buf(),
        rootfs,
        scratch: scratch.path().to_path_buf(),
        runs,
    };
    let mut report = Report::default();
    boot::measure(&place, &mut report)?;
    container::measure(&place, &mut report)?;
    print!("{report}");
    Ok(())
}

impl Place {
    /// `coffer` with a state root of the bench's own.
    fn coffer(&self) -> Command {
        let mut coffer = Command::new(self.product.join("coffer"));
        coffer
            .arg("--root")
            .arg(self.scratch.join("coffer"))
            .stdin(Stdio::null());
        coffer
    }

    /// Starts a sandbox whose container sleeps; returns what `run` prints on stderr.
    fn start_sandbox(&self, name: &str, hypervisor: &str) -> Result<String> {
        let mut run = self.coffer();
        run.args([
            "run",
            "--detach",
            "--name",
            name,
            "--hypervisor",
            hypervisor,
            "--timings",
            "--json",
        ]);
        run.arg("--rootfs")
            .arg(&self.rootfs)
            .args(["--", "sleep", "100000"]);
        let output = run.stdout(Stdio::null()).output().context("start coffer")?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.success(),
            "coffer run ended with {}:\n{stderr}",
            output.status
        );
        Ok(stderr)
    }

    fn delete_sandbox(&self, name: &str) -> Result<()> {
        process::run(self.coffer().args(["delete", "--force", name]))
    }
}

/// Milliseconds that `work` takes.
fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed().as_secs_f64() * 1000.0)
}
