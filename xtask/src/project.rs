//! Where things are: the sources, cargo's target directory, the cache outside the tree.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::Cache;

#[derive(Debug)]
pub struct Project {
    /// The workspace's directory.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    pub cache: Cache,
}

impl Project {
    pub fn locate() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask has no parent directory")?
            .to_path_buf();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(target) => root.join(target),
            None => root.join("target"),
        };
        let cache = match env::var_os("COFFER_CACHE") {
            Some(cache) => PathBuf::from(cache),
            None => home()?.join(".cache/coffer"),
        };
        Ok(Self {
            root,
            target,
            cache: Cache::open(cache)?,
        })
    }

    /// The built product: programs and guest image.
    pub fn product(&self) -> PathBuf {
        self.target.join("coffer")
    }

    /// Cargo for this workspace, without what the cargo that started us has set for xtask itself.
    pub fn cargo(&self) -> Command {
        let mut cargo = Command::new("cargo");
        cargo.current_dir(&self.root);
        for (name, _) in env::vars_os() {
            let of_outer_cargo = name.to_str().is_some_and(|name| {
                name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
            });
            if of_outer_cargo || name == "CARGO" {
                cargo.env_remove(name);
            }
        }
        cargo
    }

    /// The guest image's sources: kernel options and patches.
    pub fn guest_image(&self) -> PathBuf {
        self.root.join("guest-image")
    }
}

fn home() -> Result<PathBuf> {
    env::home_dir().context("no home directory: set HOME or COFFER_CACHE")
}
