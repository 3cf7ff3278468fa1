//! The guest kernel, built from Debian's source package or from the directory `KERNEL_SRC`.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::cache::{self, Key};
use crate::image::manifest::KernelOrigin;
use crate::process;
use crate::project::Project;

/// Debian's package with the kernel's source, patched by Debian's kernel team.
pub const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE_ARCHIVE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Changes when the commands below change what they make of the same input.
const RECIPE: &str = "1";

/// Large parts of the archive from which nothing is compiled here; their Kconfig files and makefiles are needed.
const LEFT_PACKED: [&str; 3] = [
    "*/Documentation/*/*",
    "*/drivers/gpu/*.[ch]",
    "*/sound/*.[ch]",
];

#[derive(Debug)]
pub struct Kernel {
    /// Uncompressed and without symbols: what a PVH loader takes.
    pub vmlinux: PathBuf,
    pub origin: KernelOrigin,
}

pub fn get(project: &Project) -> Result<Kernel> {
    let recipe = Recipe::read(&project.guest_image())?;
    let what = format!(
        "build the guest kernel from {} (about 15 min of CPU time)",
        recipe.source.name()?
    );
    let entry = project
        .cache
        .get("kernel", &recipe.key()?, &what, |dir| recipe.build(dir))?;
    let origin = fs::read(entry.join("origin.json")).context("read the kernel's origin")?;
    Ok(Kernel {
        vmlinux: entry.join("vmlinux"),
        origin: serde_json::from_slice(&origin)?,
    })
}

/// Everything that decides what the kernel will be.
#[derive(Debug)]
struct Recipe {
    fragment: PathBuf,
    patches: Vec<PathBuf>,
    source: Source,
    compiler: String,
}

#[derive(Debug)]
enum Source {
    /// Debian's archive, as installed by the package.
    Package,
    /// A directory given by the developer.
    Directory(PathBuf),
}

impl Recipe {
    fn read(guest_image: &Path) -> Result<Self> {
        let mut patches = Vec::new();
        if let Ok(entries) = fs::read_dir(guest_image.join("patches")) {
            for entry in entries {
                patches.push(entry?.path());
            }
        }
        patches.sort();
        let source = match env::var_os("KERNEL_SRC") {
            Some(dir) => Source::Directory(PathBuf::from(dir)),
            None => Source::Package,
        };
        let compiler = process::output(Command::new("gcc").arg("--version"))?;
        let compiler = compiler.lines().next().unwrap_or_default().to_owned();
        Ok(Self {
            fragment: guest_image.join("kernel.config"),
            patches,
            source,
            compiler,
        })
    }

    fn key(&self) -> Result<Key> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        let mut key = Key::default()
            .add("recipe", RECIPE)
            .add("fragment", read(&self.fragment)?)
            .add("source", self.source.identity()?)
            .add("compiler", &self.compiler);
        for patch in &self.patches {
            key = key.add("patch", read(patch)?);
        }
        Ok(key)
    }

    fn build(&self, entry: &Path) -> Result<()> {
        let tree = entry.join("tree");
        fs::create_dir(&tree)?;
        self.source.unpack(&tree)?;
        for patch in &self.patches {
            process::run(
                Command::new("patch")
                    .args(["-p1", "-i"])
                    .arg(patch)
                    .current_dir(&tree),
            )?;
        }
        let mut allconfig = make(&tree);
        process::run(
            allconfig
                .env("KCONFIG_ALLCONFIG", &self.fragment)
                .arg("allnoconfig"),
        )?;
        let config =
            fs::read_to_string(tree.join(".config")).context("read the kernel's .config")?;
        let fragment = fs::read_to_string(&self.fragment)?;
        ensure_in_effect(&fragment, &config)?;

        let jobs = thread::available_parallelism().map_or(1, usize::from);
        process::run(make(&tree).arg(format!("-j{jobs}")).arg("vmlinux"))?;
        let (built, stripped) = (tree.join("vmlinux"), entry.join("vmlinux"));
        process::run(
            Command::new("objcopy")
                .arg("--strip-all")
                .arg(built)
                .arg(stripped),
        )?;

        let origin = KernelOrigin {
            release: process::output(make(&tree).arg("kernelrelease"))?,
            source: self.source.name()?,
            compiler: self.compiler.clone(),
            config_sha256: cache::sha256(config.as_bytes()),
        };
        fs::write(
            entry.join("origin.json"),
            serde_json::to_vec_pretty(&origin)?,
        )?;
        fs::write(entry.join("config"), config)?;
        cache::remove_tree(&tree)
    }
}

impl Source {
    /// For people.
    fn name(&self) -> Result<String> {
        match self {
            Self::Package => {
                let format = "--showformat=${Package} ${Version}";
                process::output(Command::new("dpkg-query").args(["--show", format, SOURCE_PACKAGE]))
                    .context("no kernel source: run `cargo xtask setup`")
            }
            Self::Directory(dir) => {
                let name = dir.file_name().unwrap_or(dir.as_os_str());
                Ok(format!("directory {}", name.display()))
            }
        }
    }

    /// Differs whenever the source may differ.
    fn identity(&self) -> Result<Vec<u8>> {
        let mut identity = self.name()?.into_bytes();
        if let Self::Directory(dir) = self {
            ensure!(
                dir.join("Kconfig").is_file(),
                "KERNEL_SRC={}: no kernel source",
                dir.display()
            );
            list_files(dir, &mut identity)?;
        }
        Ok(identity)
    }

    fn unpack(&self, tree: &Path) -> Result<()> {
        match self {
            Self::Package => {
                let mut tar = Command::new("tar");
                tar.args(["-xf", SOURCE_ARCHIVE, "--strip-components=1", "--wildcards"]);
                tar.args(LEFT_PACKED.map(|pattern| format!("--exclude={pattern}")));
                process::run(tar.current_dir(tree))
            }
            Self::Directory(dir) => {
                process::run(
                    Command::new("cp")
                        .args(["-a", "--reflink=auto"])
                        .arg(dir.join("."))
                        .arg(tree),
                )?;
                process::run(make(tree).arg("mrproper"))
            }
        }
    }
}

/// Appends name, size and time of change of every file below `dir`.
fn list_files(dir: &Path, list: &mut Vec<u8>) -> Result<()> {
    let mut entries = fs::read_dir(dir)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("list {}", dir.display()))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            list_files(&entry.path(), list)?;
        } else {
            let (size, time) = (metadata.len(), metadata.mtime());
            list.extend_from_slice(
                format!("{} {size} {time}\n", entry.path().display()).as_bytes(),
            );
        }
    }
    Ok(())
}

/// `make` for the kernel tree, without anything of this machine or moment in the result.
fn make(tree: &Path) -> Command {
    let mut make = Command::new("make");
    make.args(["--silent", "ARCH=x86"]).current_dir(tree);
    make.env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
        .env("KBUILD_BUILD_USER", "coffer")
        .env("KBUILD_BUILD_HOST", "coffer");
    // Variables of an outer make or of cargo mean something else here.
    for name in ["MAKEFLAGS", "MAKELEVEL", "CFLAGS", "LDFLAGS", "KERNEL_SRC"] {
        make.env_remove(name);
    }
    make
}

/// Kconfig drops an option silently when what it depends on is missing. Names every line of the fragment to which
/// that happened.
fn ensure_in_effect(fragment: &str, config: &str) -> Result<()> {
    let config: std::collections::HashSet<&str> = config.lines().collect();
    let missing: Vec<String> = (fragment.lines().enumerate())
        .filter(|(_, line)| line.starts_with("CONFIG_") || line.ends_with(" is not set"))
        .filter(|(_, line)| !config.contains(line) && !is_off(line, &config))
        .map(|(index, line)| format!("  line {}: {line}", index + 1))
        .collect();
    if !missing.is_empty() {
        bail!(
            "these lines of kernel.config did not take effect:\n{}",
            missing.join("\n")
        );
    }
    Ok(())
}

/// An option that is to be off may be absent as well.
fn is_off(line: &str, config: &std::collections::HashSet<&str>) -> bool {
    let name = line
        .strip_prefix("# ")
        .and_then(|line| line.strip_suffix(" is not set"));
    name.is_some_and(|name| {
        !config.iter().any(|set| {
            set.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('='))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_each_line_without_effect() {
        let fragment = "# a comment\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\nCONFIG_E=3\n";
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_E=4\n";
        let error = ensure_in_effect(fragment, config).unwrap_err().to_string();
        let named: Vec<_> = error.lines().skip(1).map(str::trim).collect();
        assert_eq!(
            named,
            [
                "line 3: CONFIG_B=y",
                "line 4: # CONFIG_C is not set",
                "line 6: CONFIG_E=3"
            ]
        );
    }
}
