//! The node's root file system: a small Debian with what tests compare with and what the benchmarks run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::assets::{SUITE, debootstrap};
use crate::cache::{Key, remove_tree};
use crate::node::{erofs, kernel};
use crate::process;
use crate::project::Project;

/// Changes when the code here or in `kernel` makes something else of the same input.
const RECIPE: &str = "2";
const PACKAGES: &[&str] = &[
    "busybox-static",
    "e2fsprogs",
    "iproute2",
    "iptables",
    "iputils-ping",
    "kmod",
    "nftables",
    "procps",
    "socat",
    "strace",
    "util-linux",
    // Who calls Coffer.
    "aardvark-dns",
    "buildah",
    "catatonit",
    "conmon",
    "containerd",
    "containernetworking-plugins",
    "dbus",
    "docker.io",
    "docker-cli",
    "netavark",
    "podman",
    "skopeo",
    // Not the node's own init: tests start it in namespaces of its own.
    "systemd",
    // What it is compared with.
    "crun",
    "qemu-system-x86",
    "runc",
];
/// The containerd of Debian's development branch, that is version 2, unpacked beside the release's own. Shows that it runs.
/// A mirror may be weeks behind, which is no harm here.
const NEXT_CONTAINERD: &str = "set -e
cd /tmp
list=/etc/apt/sources.list.d/next.list
sed \"s/ $1 / sid /\" /etc/apt/sources.list > $list
apt-get -qq -o Acquire::Check-Valid-Until=false update
apt-get -qq -o APT::Sandbox::User=root download containerd/sid
dpkg-deb --extract containerd_*.deb /opt/containerd-next
/opt/containerd-next/usr/bin/containerd --version
rm -rf containerd_*.deb $list /opt/containerd-next/usr/share
apt-get clean
rm -rf /var/lib/apt/lists/*";
const INIT: &[u8] = include_bytes!("init");
const INITRAMFS_INIT: &[u8] = include_bytes!("initramfs-init");

/// The directory with `vmlinuz`, `initrd` and `root.erofs`.
pub fn get(project: &Project) -> Result<PathBuf> {
    let key = Key::default()
        .add("recipe", RECIPE)
        .add("suite", SUITE)
        .add("packages", PACKAGES.join(" "))
        .add("next containerd", NEXT_CONTAINERD)
        .add("modules", kernel::MODULES.join(" "))
        .add("init", INIT)
        .add("initramfs-init", INITRAMFS_INIT);
    project.cache.get(
        "node",
        &key,
        "make the test node's root file system (about 3 min)",
        make,
    )
}

fn make(dir: &Path) -> Result<()> {
    let root = dir.join("root");
    debootstrap(&root, PACKAGES)?;
    process::run(Command::new("chroot").arg(&root).args([
        "sh",
        "-c",
        NEXT_CONTAINERD,
        "sh",
        SUITE,
    ]))
    .context("put the next containerd into the node")?;
    let release = kernel::install(&root, &dir.join("vmlinuz"))?;
    fs::write(
        dir.join("initrd"),
        kernel::initrd(&root, &release, INITRAMFS_INIT)?,
    )
    .context("write the node's initrd")?;
    let init = root.join("usr/lib/node/init");
    fs::create_dir_all(root.join("usr/lib/node"))?;
    fs::write(&init, INIT).with_context(|| format!("write {}", init.display()))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    erofs(&root, &dir.join("root.erofs"))?;
    remove_tree(&root)
}
