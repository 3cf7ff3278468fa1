//! Turns what the user named (a root directory, an image) into an OCI bundle in the sandbox's directory.

use super::default_spec::{self, SpecError};
use super::options::ContainerOptions;
use super::unicode;
use crate::image::{self, Image, Root, RunConfig};
use coffer_proto::ids::ContainerId;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use serde_json::json;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error(transparent)]
    Image(#[from] image::Error),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("the root directory {path:?} can't be used")]
    Rootfs { path: PathBuf, source: io::Error },
    #[error("can't write {path:?}")]
    Write { path: PathBuf, source: io::Error },
}

/// Makes a bundle in `sandbox` around a root directory that stays where it is.
pub(super) fn around_rootfs(
    sandbox: &Path,
    id: &ContainerId,
    options: &ContainerOptions,
    rootfs: &Path,
) -> Result<PathBuf, BundleError> {
    let rejected = |source| BundleError::Rootfs {
        path: rootfs.into(),
        source,
    };
    let root = Root::open(rootfs).map_err(rejected)?;
    let mut spec = default_spec::make(id, options, &RunConfig::default(), &root)?;
    spec["root"]["path"] = json!(
        rootfs
            .canonicalize()
            .and_then(unicode::path)
            .map_err(rejected)?
    );
    write(sandbox, &spec)
}

/// Unpacks an image into `sandbox` and makes a bundle of it. `stop` ends it early.
pub(super) fn from_image(
    sandbox: &Path,
    id: &ContainerId,
    options: &ContainerOptions,
    reference: &str,
    stop: &AtomicBool,
) -> Result<PathBuf, BundleError> {
    let image = Image::open(reference)?;
    let rootfs = sandbox.join("bundle/rootfs");
    make_directory(&rootfs)?;
    image.unpack(&rootfs, stop)?;
    let root = Root::open(&rootfs).map_err(|source| BundleError::Rootfs {
        path: rootfs.clone(),
        source,
    })?;
    let spec = default_spec::make(id, options, image.config(), &root)?;
    let hostname = spec["hostname"].as_str().unwrap_or_default();
    write_network_files(&root, hostname).map_err(|source| BundleError::Rootfs {
        path: rootfs,
        source,
    })?;
    write(sandbox, &spec)
}

/// `coffer spec`: the default spec beside a root of the caller's, which the caller then changes.
pub(super) fn write_spec(directory: Option<&Path>) -> Result<(), BundleError> {
    let path = directory.unwrap_or(Path::new(".")).join("config.json");
    let text = default_spec::example();
    let text = serde_json::to_vec_pretty(&text).expect("JSON values can always be written");
    let written = File::create_new(&path).and_then(|mut file| file.write_all(&text));
    written.map_err(|source| BundleError::Write { path, source })
}

fn make_directory(path: &Path) -> Result<(), BundleError> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.map_err(|source| BundleError::Write {
        path: path.into(),
        source,
    })
}

fn write(sandbox: &Path, spec: &serde_json::Value) -> Result<PathBuf, BundleError> {
    let bundle = sandbox.join("bundle");
    make_directory(&bundle)?;
    let path = bundle.join("config.json");
    let text = serde_json::to_vec_pretty(spec).expect("JSON values can always be written");
    fs::write(&path, text).map_err(|source| BundleError::Write { path, source })?;
    Ok(bundle)
}

/// Images come with these files empty or missing; engines fill them in. The root is ours here, so they are files in it.
fn write_network_files(root: &Root, hostname: &str) -> io::Result<()> {
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
    );
    let resolv_conf = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    for (name, content) in [
        ("hosts", hosts),
        ("hostname", format!("{hostname}\n")),
        ("resolv.conf", resolv_conf),
    ] {
        let path = Path::new("etc").join(name);
        // What is there and no small file (a link into /run, say) is the image's decision.
        if !matches!(root.read(&path, 0), Ok(None | Some(_))) {
            continue;
        }
        root.make_directory(Path::new("etc"))?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        match root.open_inside(&path, flags, Mode::from_bits_truncate(0o644)) {
            Ok(fd) => File::from(fd).write_all(content.as_bytes())?,
            // A symbolic link to a file that is not there yet.
            Err(nix::Error::ELOOP | nix::Error::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn empty_network_files_are_filled_and_others_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join("etc").join(name);
        fs::create_dir(directory.path().join("etc")).unwrap();
        fs::write(path("hosts"), "").unwrap();
        fs::write(path("hostname"), "own\n").unwrap();
        symlink("/nowhere/resolv.conf", path("resolv.conf")).unwrap();
        let root = Root::open(directory.path()).unwrap();
        write_network_files(&root, "h").unwrap();
        assert!(
            fs::read_to_string(path("hosts"))
                .unwrap()
                .contains("127.0.1.1\th")
        );
        assert_eq!(fs::read_to_string(path("hostname")).unwrap(), "own\n");
        assert!(
            fs::symlink_metadata(path("resolv.conf"))
                .unwrap()
                .is_symlink()
        );
    }

    #[test]
    fn a_root_that_is_a_file_or_link_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        symlink("/", directory.path().join("link")).unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        let options = <ContainerOptions as clap::Args>::augment_args(clap::Command::new("x"));
        let options = options.get_matches_from(["x", "--", "true"]);
        let options =
            <ContainerOptions as clap::FromArgMatches>::from_arg_matches(&options).unwrap();
        let id = ContainerId::new("c").unwrap();
        for name in ["link", "file", "missing"] {
            let error = around_rootfs(
                directory.path(),
                &id,
                &options,
                &directory.path().join(name),
            )
            .unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            assert!(!directory.path().join("bundle").exists());
        }
    }
}
