//! `cargo xtask dist`: the product as a tarball and as a Debian package.
//!
//! ```text
//! usr/lib/coffer/     programs and guest image, which find each other there
//! usr/bin/            links to the two programs that others call
//! usr/share/coffer/   what containerd, CRI-O and Kubernetes are told
//! usr/share/doc/coffer/
//! etc/containers/containers.conf.d/   what podman is told; it looks nowhere else for additions
//! ```

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::build;
use crate::process;
use crate::project::Project;
use crate::step::step;

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Debian's and Go's name of x86-64.
const ARCHITECTURE: &str = "amd64";
/// Programs that are looked for in PATH: by people, and by containerd.
const CALLED: [&str; 2] = ["coffer", "containerd-shim-coffer-v2"];
/// What a built product consists of.
const PRODUCT: [&str; 8] = [
    "coffer",
    "containerd-shim-coffer-v2",
    "coffer-vmm",
    "coffer-qemu",
    "coffer-fsd",
    "vmlinux",
    "initrd",
    "manifest.json",
];
/// Of `packaging/`.
const SNIPPETS: [&str; 5] = [
    "containerd-1.toml",
    "containerd-2.toml",
    "crio.conf.d/50-coffer-oci.conf",
    "crio.conf.d/50-coffer-vm.conf",
    "runtimeclass.yaml",
];
/// Of `packaging/`, and below `/etc` of the host. It names one more runtime and changes no other.
const PODMAN: &str = "containers.conf.d/50-coffer.conf";
const DOCUMENTS: [&str; 8] = [
    "README.md",
    "docs/containerd.md",
    "docs/cri-o.md",
    "docs/docker.md",
    "docs/podman.md",
    "docs/configuration.md",
    "docs/limitations.md",
    "docs/licences.md",
];

/// Builds the product and packs it; the files are in `<target>/dist`.
pub fn run(project: &Project) -> Result<()> {
    build::run(project)?;
    let staging = stage(project)?;
    let tarball = step("pack the tarball", || tarball(project, staging.path()))?;
    let package = step("pack the Debian package", || {
        debian(project, staging.path())
    })?;
    for file in [tarball, package] {
        eprintln!("--> {}", file.display());
    }
    Ok(())
}

/// The Debian package of a product that is built.
pub fn package(project: &Project) -> Result<PathBuf> {
    debian(project, stage(project)?.path())
}

/// The tree as it is on a host.
fn stage(project: &Project) -> Result<TempDir> {
    let out = out(project);
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let staging = tempfile::tempdir_in(&out)?;
    let root = staging.path();
    // It is the root directory of the package, and a temporary one is closed to others.
    fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
    for file in PRODUCT {
        let from = project.product().join(file);
        copy(&from, &root.join("usr/lib/coffer").join(file))?;
    }
    let bin = root.join("usr/bin");
    fs::create_dir_all(&bin)?;
    for program in CALLED {
        symlink(Path::new("../lib/coffer").join(program), bin.join(program))?;
    }
    let packaging = project.root.join("packaging");
    for file in SNIPPETS {
        copy(
            &packaging.join(file),
            &root.join("usr/share/coffer").join(file),
        )?;
    }
    copy(
        &packaging.join(PODMAN),
        &root.join("etc/containers").join(PODMAN),
    )?;
    let documents = root.join("usr/share/doc/coffer");
    for file in DOCUMENTS {
        let name = Path::new(file).file_name().context("a file's name")?;
        copy(&project.root.join(file), &documents.join(name))?;
    }
    copy(&project.root.join("LICENSE"), &documents.join("copyright"))?;
    Ok(staging)
}

fn out(project: &Project) -> PathBuf {
    project.target.join("dist")
}

/// Directories above it are made; modes are those of the source.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("copy {} to {}", from.display(), to.display()))
}

/// Time stamps in what is packed: the same commit gives the same bytes.
fn commit_time(project: &Project) -> Result<String> {
    process::output(Command::new("git").arg("-C").arg(&project.root).args([
        "log",
        "-1",
        "--format=%ct",
    ]))
}

fn tarball(project: &Project, root: &Path) -> Result<PathBuf> {
    let name = format!("coffer-{VERSION}-linux-{ARCHITECTURE}.tar.gz");
    let file = out(project).join(name);
    let time = commit_time(project)?;
    process::run(
        Command::new("tar")
            .arg("-C")
            .arg(root)
            .args([
                "--sort=name",
                "--owner=0",
                "--group=0",
                "--numeric-owner",
                &format!("--mtime=@{time}"),
            ])
            .arg("-czf")
            .arg(&file)
            .args(["etc", "usr"])
            .env("GZIP", "-n"),
    )?;
    Ok(file)
}

fn debian(project: &Project, root: &Path) -> Result<PathBuf> {
    let control = root.join("DEBIAN");
    fs::create_dir_all(&control)?;
    let template = project.root.join("packaging/debian-control");
    let text = fs::read_to_string(&template)
        .with_context(|| format!("read {}", template.display()))?
        .replace("@VERSION@", VERSION)
        .replace("@ARCHITECTURE@", ARCHITECTURE)
        .replace("@SIZE@", &installed_size(root)?);
    fs::write(control.join("control"), text)?;
    fs::write(
        control.join("conffiles"),
        format!("/etc/containers/{PODMAN}\n"),
    )?;
    let script = control.join("postinst");
    copy(&project.root.join("packaging/debian-postinst"), &script)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let file = out(project).join(format!("coffer_{VERSION}_{ARCHITECTURE}.deb"));
    process::run(
        Command::new("dpkg-deb")
            // dpkg has read zstd since Debian 12; xz takes ten times as long to pack.
            .args(["-Zzstd", "--root-owner-group", "--build"])
            .arg(root)
            .arg(&file)
            .env("SOURCE_DATE_EPOCH", commit_time(project)?),
    )?;
    Ok(file)
}

/// In KiB, as dpkg counts.
fn installed_size(root: &Path) -> Result<String> {
    let told = process::output(Command::new("du").args(["-sk"]).arg(root.join("usr")))?;
    Ok(told
        .split_whitespace()
        .next()
        .context("du tells a number")?
        .to_owned())
}
