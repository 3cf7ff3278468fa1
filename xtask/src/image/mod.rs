//! The guest image: kernel, initrd with the agent in it, and a manifest that says what they were made from.

mod cpio;
mod kernel;
mod manifest;

pub use cpio::Cpio;
pub use kernel::{Kernel, SOURCE_PACKAGE};

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::image::manifest::{File, Manifest};
use crate::project::Project;

/// Largest initrd: it is unpacked into the guest's memory at every boot.
const MAX_INITRD_BYTES: usize = 10 << 20;

/// The guest kernel, from the cache or built.
pub fn kernel(project: &Project) -> Result<Kernel> {
    kernel::get(project)
}

/// Writes `vmlinux`, `initrd` and `manifest.json` into `dir`.
pub fn assemble(kernel: &Kernel, agent: &Path, dir: &Path) -> Result<()> {
    let init = fs::read(agent).with_context(|| format!("read {}", agent.display()))?;
    let initrd = initrd(&init)?;
    let vmlinux =
        fs::read(&kernel.vmlinux).with_context(|| format!("read {}", kernel.vmlinux.display()))?;
    let manifest = Manifest {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: kernel.origin.clone(),
        vmlinux: File::describe(&vmlinux),
        initrd: File::describe(&initrd),
    };
    fs::write(dir.join("vmlinux"), &vmlinux).context("write vmlinux")?;
    fs::write(dir.join("initrd"), &initrd).context("write initrd")?;
    let mut text = serde_json::to_string_pretty(&manifest)?;
    text.push('\n');
    fs::write(dir.join("manifest.json"), text).context("write manifest.json")
}

/// The agent as `/init`, and `/dev/console`, which the kernel opens for it before anything is mounted.
fn initrd(init: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    archive.directory("dev", 0o755);
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, init)?;
    let archive = archive.finish();
    ensure!(
        archive.len() <= MAX_INITRD_BYTES,
        "the initrd has {} bytes, more than {MAX_INITRD_BYTES}",
        archive.len()
    );
    Ok(archive)
}
