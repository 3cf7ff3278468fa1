//! `cargo xtask`: the one command to set up, build, show, test and measure Coffer.

mod assets;
mod bench;
mod build;
mod cache;
mod demo;
mod dist;
mod image;
mod lint;
mod node;
mod process;
mod project;
mod setup;
mod step;
mod test;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::node::Node;
use crate::project::Project;

/// Develop Coffer: set up the machine, build, demo, test, measure.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Install what building and testing need; changes nothing that is already there
    Setup,
    /// Compile the product and assemble it in <target>/coffer
    Build,
    /// Build, and pack the product as a tarball and a Debian package in <target>/dist
    Dist,
    /// Set up, build, and run a container in a microVM
    Demo,
    /// Check formatting, lints, dependency versions
    Lint,
    /// Run all tests: unit tests, then the end-to-end suite with QEMU here and with coffer-vmm in the test node
    Test(test::Arguments),
    /// Measure Coffer against QEMU microvm and runc
    Bench(bench::Arguments),
    /// The benchmark itself, as it runs in the node
    #[command(hide = true)]
    BenchInside {
        product: PathBuf,
        assets: PathBuf,
        runs: usize,
    },
    /// Run one test program in the test node (the runner that `test` gives to nextest)
    #[command(hide = true)]
    NodeTest {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
    /// Run a command in a fresh copy of the test node, which has a real /dev/kvm
    Node {
        /// Directory that the command sees, read-only, as /coffer
        #[arg(long)]
        share: Option<PathBuf>,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

/// Exit status when the node failed, not the command in it.
const NODE_FAILED: u8 = 125;

fn main() -> Result<ExitCode> {
    let project = Project::locate()?;
    match Command::parse() {
        Command::Setup => setup::run(&project)?,
        Command::Build => drop(build::run(&project)?),
        Command::Dist => dist::run(&project)?,
        Command::Demo => return demo::run(&project),
        Command::Lint => lint::run(&project)?,
        Command::Bench(arguments) => return bench::run(&project, &arguments),
        Command::BenchInside {
            product,
            assets,
            runs,
        } => bench::measure(&product, &assets, runs)?,
        Command::Test(arguments) => test::run(&project, &arguments)?,
        Command::NodeTest { command } => return test::run_in_node(&project, &command),
        Command::Node { share, command } => {
            return Ok(
                node(&project, share.as_deref(), &command).unwrap_or_else(|error| {
                    eprintln!("error: {error:#}");
                    ExitCode::from(NODE_FAILED)
                }),
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn node(project: &Project, share: Option<&Path>, command: &[OsString]) -> Result<ExitCode> {
    let node = Node::get(project)?;
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("share");
    if let Some(share) = share {
        node::share_disk(share, &image)?;
    }
    let status = node.run(share.map(|_| image.as_path()), command, &[])?;
    Ok(ExitCode::from(status))
}
