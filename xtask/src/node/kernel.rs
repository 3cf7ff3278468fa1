//! The node's kernel: Debian's, with the modules that the node loads.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::image::Cpio;
use crate::process;

/// Downloads the package that the metapackage stands for, with the root's own apt.
const DOWNLOAD: &str = "set -e
apt-get -qq update
package=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: *\\(linux-image-[0-9].*\\)/\\1/p' | head -1)
cd /tmp
apt-get -qq -o APT::Sandbox::User=root download \"$package\"
apt-get clean
rm -rf /var/lib/apt/lists/*";

/// Modules of the node besides what they depend on. Directories, where a few more files save a list.
pub const MODULES: [&str; 16] = [
    "kernel/arch/x86/crypto/crc32c-intel.ko",
    "kernel/arch/x86/kvm",
    "kernel/crypto/crc32c_generic.ko",
    "kernel/drivers/block",
    "kernel/drivers/char/hw_random",
    "kernel/drivers/net/tun.ko",
    "kernel/drivers/net/veth.ko",
    "kernel/drivers/net/dummy.ko",
    "kernel/drivers/net/ipvlan/ipvlan.ko",
    "kernel/drivers/net/macvlan.ko",
    "kernel/drivers/vhost",
    "kernel/drivers/virtio",
    "kernel/fs",
    "kernel/net/bridge",
    "kernel/net/netfilter",
    "kernel/net/sched",
];
/// Needed to mount the root. The kernel finds the checksum's module by itself only when it can ask user space.
const ROOT_MODULES: [&str; 4] = ["crc32c_generic", "virtio_blk", "erofs", "overlay"];

/// Puts the kernel at `vmlinuz` and its modules into the root; returns its release.
pub fn install(root: &Path, vmlinuz: &Path) -> Result<String> {
    process::run(
        Command::new("chroot")
            .arg(root)
            .args(["sh", "-c", DOWNLOAD]),
    )
    .context("download the node's kernel")?;
    let package = only_entry(&root.join("tmp"))?;
    let unpacked = tempfile::tempdir()?;
    process::run(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&package)
            .arg(unpacked.path()),
    )?;
    fs::remove_file(&package)?;

    // depmod of Debian 12 looks in /lib only.
    if !unpacked.path().join("lib").exists() {
        symlink("usr/lib", unpacked.path().join("lib"))?;
    }
    let from = only_entry(&unpacked.path().join("lib/modules"))?;
    let release = from
        .file_name()
        .and_then(|name| name.to_str())
        .context("the kernel's release")?
        .to_owned();
    fs::copy(
        unpacked.path().join(format!("boot/vmlinuz-{release}")),
        vmlinuz,
    )
    .context("copy vmlinuz")?;

    // depmod knows what a module depends on only when it sees all of them.
    process::run(
        Command::new("find")
            .arg(&from)
            .args(["-name", "*.ko.xz", "-exec", "unxz", "{}", "+"]),
    )?;
    process::run(
        Command::new("depmod")
            .arg("-b")
            .arg(unpacked.path())
            .arg(&release),
    )?;
    let to = root.join("usr/lib/modules").join(&release);
    let order = dependencies(&from, |path| {
        MODULES.iter().any(|wanted| path.starts_with(wanted))
    })?;
    for module in &order {
        let target = to.join(module);
        fs::create_dir_all(target.parent().context("a module's directory")?)?;
        fs::copy(from.join(module), &target).with_context(|| format!("copy {module}"))?;
    }
    for list in [
        "modules.order",
        "modules.builtin",
        "modules.builtin.modinfo",
    ] {
        fs::copy(from.join(list), to.join(list)).with_context(|| format!("copy {list}"))?;
    }
    process::run(Command::new("depmod").arg("-b").arg(root).arg(&release))?;
    Ok(release)
}

/// An archive with busybox, the modules that mount the root, and the script that does it.
pub fn initrd(root: &Path, release: &str, init: &[u8]) -> Result<Vec<u8>> {
    let modules = root.join("usr/lib/modules").join(release);
    let name_of = |path: &str| {
        Path::new(path)
            .file_stem()
            .map(|stem| stem.to_string_lossy().replace('-', "_"))
    };
    let mut order = Vec::new();
    for wanted in ROOT_MODULES {
        for module in dependencies(&modules, |path| name_of(path).as_deref() == Some(wanted))? {
            if !order.contains(&module) {
                order.push(module);
            }
        }
    }
    let mut archive = Cpio::default();
    for dir in [
        "bin", "dev", "proc", "sys", "lower", "upper", "root", "modules",
    ] {
        archive.directory(dir, 0o755);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read(root.join("usr/bin/busybox")).context("read the node's busybox")?,
    )?;
    archive.file("init", 0o755, init)?;
    let mut names = String::new();
    for module in &order {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.file(
            &format!("modules/{name}"),
            0o644,
            &fs::read(modules.join(module))?,
        )?;
        names.push_str(name);
        names.push('\n');
    }
    archive.file("modules/order", 0o644, names.as_bytes())?;
    Ok(archive.finish())
}

/// The wanted modules and what they depend on, each after its dependencies (modules.dep(5)).
fn dependencies(modules: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let list = fs::read_to_string(modules.join("modules.dep")).context("read modules.dep")?;
    let mut order: Vec<String> = Vec::new();
    for line in list.lines() {
        let (module, needs) = line
            .split_once(':')
            .with_context(|| format!("modules.dep: {line}"))?;
        if !wanted(module) {
            continue;
        }
        // Listed so that the last one has to be loaded first.
        for path in needs.split_whitespace().rev().chain([module]) {
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    ensure!(
        !order.is_empty(),
        "{}: none of the wanted modules",
        modules.display()
    );
    Ok(order)
}

fn only_entry(dir: &Path) -> Result<PathBuf> {
    let entries: Vec<_> = fs::read_dir(dir)?.collect::<Result<_, _>>()?;
    ensure!(
        entries.len() == 1,
        "{} should hold one entry, not {}",
        dir.display(),
        entries.len()
    );
    Ok(entries[0].path())
}
