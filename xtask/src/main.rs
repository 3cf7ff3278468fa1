//! `cargo xtask`: the one command to set up, build, show, test and measure Coffer.

mod build;
mod cache;
mod image;
mod process;
mod project;
mod setup;
mod step;

use anyhow::Result;
use clap::Parser;

use crate::project::Project;

/// Develop Coffer: set up the machine, build, demo, test, measure.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Install what building and testing need; changes nothing that is already there
    Setup,
    /// Compile the product and assemble it in <target>/coffer
    Build,
}

fn main() -> Result<()> {
    let project = Project::locate()?;
    match Command::parse() {
        Command::Setup => setup::run(&project),
        Command::Build => build::run(&project).map(drop),
    }
}
