//! What tests run in containers: a busybox root file system, the same as an OCI image layout, and a small Debian.
//!
//! Tests get the directory in `COFFER_TEST_ASSETS` and must not write into it: it is shared, and read-only in the node.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cache::{Key, sha256};
use crate::process;
use crate::project::Project;
use crate::setup::{KEYRING, Release};

/// Changes when the code below makes something else of the same input.
const RECIPE: &str = "1";
const BUSYBOX: &str = "/bin/busybox";
/// The release of the Debian root file system and of the test node.
pub const SUITE: &str = "trixie";

/// Files of packages that no test reads.
const LEFT_OUT: [&str; 3] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
];

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n\
                      nobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str =
    "root:x:0:\nwheel:x:10:user\nuser:x:1000:\nextra:x:2000:user\nnogroup:x:65534:\n";

/// The directory with `busybox/`, `busybox-layout/` and `debian/`.
pub fn get(project: &Project) -> Result<PathBuf> {
    let busybox =
        fs::read(BUSYBOX).with_context(|| format!("read {BUSYBOX}: run `cargo xtask setup`"))?;
    let key = Key::default()
        .add("recipe", RECIPE)
        .add("busybox", busybox)
        .add("suite", SUITE);
    project.cache.get(
        "assets",
        &key,
        "make the test root file systems (about 1 min)",
        |dir| {
            busybox_root(&dir.join("busybox"))?;
            image_layout(&dir.join("busybox"), &dir.join("busybox-layout"))?;
            debootstrap(&dir.join("debian"), &[])
        },
    )
}

/// A minimal Debian of [`SUITE`] with more packages, from the archive that this machine uses.
pub fn debootstrap(root: &Path, packages: &[&str]) -> Result<()> {
    let archive = Release::of_this_machine()?.archive;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--mode=root", "--variant=minbase"]);
    mmdebstrap.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    if !packages.is_empty() {
        mmdebstrap.arg(format!("--include={}", packages.join(",")));
    }
    mmdebstrap
        .arg(SUITE)
        .arg(root)
        .arg(format!("deb [signed-by={KEYRING}] {archive} {SUITE} main"));
    process::run(&mut mmdebstrap)?;
    // Lists and archives of packages are of no use in a root that is never updated.
    process::run(Command::new("chroot").arg(root).args([
        "sh",
        "-c",
        "apt-get clean; rm -rf /var/lib/apt/lists/*",
    ]))
}

fn busybox_root(root: &Path) -> Result<()> {
    for dir in [
        "bin",
        "etc",
        "proc",
        "sys",
        "dev",
        "tmp",
        "root",
        "home/user",
        "usr",
        "var",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    std::os::unix::fs::chown(root.join("home/user"), Some(1000), Some(1000))?;
    fs::copy(BUSYBOX, root.join("bin/busybox"))?;
    for applet in process::output(Command::new(BUSYBOX).arg("--list"))?.lines() {
        if applet != "busybox" {
            symlink("busybox", root.join("bin").join(applet))?;
        }
    }
    fs::write(root.join("etc/passwd"), PASSWD)?;
    fs::write(root.join("etc/group"), GROUP)?;
    Ok(())
}

/// An OCI image layout with `root` as its only layer.
fn image_layout(root: &Path, layout: &Path) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let put = |media_type: &str, content: &[u8]| -> Result<Value> {
        let digest = sha256(content);
        fs::write(blobs.join(&digest), content)?;
        Ok(
            json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() }),
        )
    };
    let layer_file = layout.join("layer.tar");
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--numeric-owner", "--mtime=@0", "-cf"])
        .arg(&layer_file)
        .arg("-C")
        .arg(root)
        .arg(".");
    process::run(&mut tar)?;
    let layer = put(
        "application/vnd.oci.image.layer.v1.tar",
        &fs::read(&layer_file)?,
    )?;
    fs::remove_file(&layer_file)?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"] },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = put(
        "application/vnd.oci.image.config.v1+json",
        &serde_json::to_vec(&config)?,
    )?;
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": [layer] });
    let mut manifest = put(manifest_type, &serde_json::to_vec(&manifest)?)?;
    manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "busybox" });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    Ok(())
}
