//! `cargo xtask setup`: everything that building and testing need, on a fresh Debian 12 or newer.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::image;
use crate::node::Node;
use crate::process;
use crate::project::Project;
use crate::step::step;

/// Packages in whatever version the release prefers. The kernel's source comes from its security updates where they
/// have it, and from the backports else.
const PACKAGES: &[&str] = &[
    // the workspace
    "build-essential",
    "pkg-config",
    "libseccomp-dev",
    "libcap-ng-dev",
    // the guest kernel
    image::SOURCE_PACKAGE,
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "libssl-dev",
    "xz-utils",
    "cpio",
    "patch",
    // test assets and the test node
    "busybox-static",
    "mmdebstrap",
    "arch-test",
    "debian-archive-keyring",
    "erofs-utils",
    "e2fsprogs",
    "kmod",
    // what tests compare with and drive
    "runc",
    "containerd",
    "containernetworking-plugins",
    "podman",
    "catatonit",
    "conmon",
    "buildah",
    "skopeo",
    "netavark",
    "aardvark-dns",
    "iproute2",
    "iptables",
    "socat",
    "strace",
];
/// Packages that are too old in Debian 12, and come from its backports.
const NEWER_PACKAGES: &[&str] = &["qemu-system-x86"];

/// Emulated SVM, on which the test node's KVM runs, is wrong in older ones.
const OLDEST_QEMU: u32 = 10;

pub fn run(project: &Project) -> Result<()> {
    packages()?;
    ensure_qemu()?;
    nextest()?;
    image::kernel(project)?;
    Node::get(project)?;
    Ok(())
}

fn packages() -> Result<()> {
    let release = Release::of_this_machine()?;
    let (missing, missing_newer) = (missing(PACKAGES)?, missing(NEWER_PACKAGES)?);
    if missing.is_empty() && missing_newer.is_empty() {
        eprintln!("--> all packages are installed");
        return Ok(());
    }
    let all = [missing.as_slice(), &missing_newer].concat().join(" ");
    ensure!(
        nix::unistd::geteuid().is_root(),
        "only root can install the missing packages: {all}"
    );
    release.enable_backports()?;
    step("update the list of packages", || {
        process::run(apt_get().arg("update"))
    })?;
    install(&missing, &[])?;
    install(&missing_newer, &release.backports_arguments())
}

fn install(packages: &[&str], arguments: &[String]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    step(&format!("install packages: {}", packages.join(" ")), || {
        process::run(
            apt_get()
                .args(["install", "--yes", "--no-install-recommends"])
                .args(arguments)
                .args(packages),
        )
    })
}

fn apt_get() -> Command {
    let mut apt_get = Command::new("apt-get");
    apt_get.env("DEBIAN_FRONTEND", "noninteractive");
    apt_get
}

fn missing(packages: &[&'static str]) -> Result<Vec<&'static str>> {
    let format = "--showformat=${Package} ${db:Status-Status}\n";
    let known = Command::new("dpkg-query")
        .args(["--show", format])
        .output()
        .context("start dpkg-query")?;
    let known = String::from_utf8_lossy(&known.stdout);
    let installed = |package: &str| {
        known
            .lines()
            .any(|line| line == format!("{package} installed"))
    };
    Ok(packages
        .iter()
        .copied()
        .filter(|package| !installed(package))
        .collect())
}

/// The Debian release of this machine and where it gets packages from.
#[derive(Debug)]
pub struct Release {
    codename: String,
    /// Address of the archive that this machine is configured with.
    pub archive: String,
}

const BACKPORTS_LIST: &str = "/etc/apt/sources.list.d/coffer-backports.list";
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

impl Release {
    pub fn of_this_machine() -> Result<Self> {
        let os_release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
        let codename = os_release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .context("/etc/os-release names no release: Coffer's setup knows Debian 12 and newer")?
            .to_owned();
        let mut files = vec!["/etc/apt/sources.list".into()];
        if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
            files.extend(entries.flatten().map(|entry| entry.path()));
        }
        let archive = (files.iter())
            .filter_map(|file| fs::read_to_string(file).ok())
            .find_map(|text| archive_of(&text, &codename))
            .with_context(|| format!("no entry for {codename} in apt's sources"))?;
        Ok(Self { codename, archive })
    }

    fn needs_backports(&self) -> bool {
        self.codename == "bookworm"
    }

    fn enable_backports(&self) -> Result<()> {
        if !self.needs_backports() || Path::new(BACKPORTS_LIST).exists() {
            return Ok(());
        }
        let line = format!(
            "deb [signed-by={KEYRING}] {} {}-backports main\n",
            self.archive, self.codename
        );
        fs::write(BACKPORTS_LIST, line).with_context(|| format!("write {BACKPORTS_LIST}"))
    }

    fn backports_arguments(&self) -> Vec<String> {
        match self.needs_backports() {
            true => vec![
                "--target-release".to_owned(),
                format!("{}-backports", self.codename),
            ],
            false => Vec::new(),
        }
    }
}

/// The archive's address in a file of apt's, in the one-line or in the deb822 format.
fn archive_of(text: &str, codename: &str) -> Option<String> {
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("deb") {
            continue;
        }
        let mut words = words.skip_while(|word| !word.contains("://"));
        if let (Some(address), Some(suite)) = (words.next(), words.next())
            && suite == codename
        {
            return Some(address.to_owned());
        }
    }
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            stanza
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        };
        let of_release = field("Suites")?
            .split_whitespace()
            .any(|suite| suite == codename);
        of_release.then(|| field("URIs")?.split_whitespace().next().map(str::to_owned))?
    })
}

fn ensure_qemu() -> Result<()> {
    let version = process::output(Command::new("qemu-system-x86_64").arg("--version"))?;
    let major = version
        .split_whitespace()
        .find_map(|word| word.split('.').next()?.parse::<u32>().ok())
        .with_context(|| format!("no version in {version:?}"))?;
    ensure!(
        major >= OLDEST_QEMU,
        "QEMU {major} is too old: Coffer's tests need {OLDEST_QEMU} or newer"
    );
    Ok(())
}

/// The test runner. It is built from source when it is missing.
fn nextest() -> Result<()> {
    if process::output(Command::new("cargo").args(["nextest", "--version"])).is_ok() {
        return Ok(());
    }
    step("install cargo-nextest (about 10 min)", || {
        process::run(Command::new("cargo").args(["install", "--locked", "cargo-nextest"]))
    })
}

#[cfg(test)]
mod tests {
    use super::archive_of;

    #[test]
    fn finds_the_archive_in_both_formats() {
        let deb822 = "# comment\nTypes: deb\nURIs: http://other/security\nSuites: bookworm-security\n\n\
                      Types: deb\nURIs: http://host/debian\nSuites: bookworm bookworm-updates\nComponents: main\n";
        assert_eq!(
            archive_of(deb822, "bookworm").as_deref(),
            Some("http://host/debian")
        );
        assert_eq!(archive_of(deb822, "trixie"), None);
        let lines = "deb http://other/security bookworm-security main\n# deb http://no/ bookworm main\n\
                     deb [arch=amd64 signed-by=/k] http://host/debian/ bookworm main\n";
        assert_eq!(
            archive_of(lines, "bookworm").as_deref(),
            Some("http://host/debian/")
        );
    }
}
