//! Container images on disk: an OCI image layout or a `docker save` archive, as a directory or a tar file.
//!
//! ```text
//! OCI layout (skopeo oci:, oci-archive:, buildah, podman, docker >= 25)     docker archive (podman, docker < 25)
//!   oci-layout                                                                manifest.json  [{Config, Layers}]
//!   index.json ─► (index ─►)* manifest ─► config, layers                      <hex>.json     the config
//!   blobs/sha256/<hex>                                                        */layer.tar    plain tars
//! ```
//!
//! Everything below the entry point is named by its SHA-256 and refused when size or digest differ; each layer is
//! checked a second time, unpacked, against the `diff_ids` of the config. The reader never writes to the image and
//! the image can name no file outside itself ([`source`]) nor outside the directory it is unpacked to ([`tree`]).

mod archive;
mod config;
mod layer;
mod manifest;
mod root;
mod source;
mod tree;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;

pub use config::RunConfig;
pub use root::Root;

pub(crate) use manifest::hex;

use layer::Layer;
use oci_spec::image::Digest;
use source::Source;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Longest JSON document of an image (index, manifest, config). Registries refuse manifests over 4 MiB.
const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// Most layers of an image. Docker and overlayfs stop at 127 and 500.
const MAX_LAYERS: usize = 512;
/// Most bytes that all layers may unpack to, so that a small compressed file can't fill a disk.
const MAX_UNPACKED_BYTES: u64 = 64 << 30;
/// Most files, links and directories in all layers together; big real images have a few hundred thousand.
const MAX_ENTRIES: u64 = 4 << 20;

/// Why an image can't be used. The message names the image's file, digest or member that is at fault.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{reference:?} is a registry reference; fetch it first: skopeo copy {reference} oci:image"
    )]
    Registry { reference: String },
    #[error(
        "there is no image at {path:?}; expected an OCI image layout or a docker archive, directory or tar file"
    )]
    Missing { path: PathBuf },
    #[error("{path:?} is no image: {reason}")]
    NoImage { path: PathBuf, reason: &'static str },
    #[error("reading {name} of the image failed")]
    Read { name: String, source: io::Error },
    #[error("the image has no file {name}")]
    NoFile { name: String },
    #[error("{name} of the image has {actual} bytes, expected {expected}")]
    Size {
        name: String,
        expected: u64,
        actual: u64,
    },
    #[error("{name} of the image is corrupt: its digest is sha256:{actual}, expected {expected}")]
    Digest {
        name: String,
        expected: String,
        actual: String,
    },
    #[error("{name} of the image is not valid")]
    Malformed {
        name: String,
        source: serde_json::Error,
    },
    #[error("{name} of the image: {reason}")]
    Unsupported { name: String, reason: String },
    #[error("the image has no manifest for {wanted}; it has: {available}")]
    NoManifest { wanted: String, available: String },
    #[error(
        "the image layout holds several images; append one of these names as PATH:NAME: {names}"
    )]
    Ambiguous { names: String },
    #[error("unpacking layer {name} failed")]
    Layer { name: String, source: tree::Error },
    #[error("the image unpacks to more than {} GiB", MAX_UNPACKED_BYTES >> 30)]
    TooLarge,
    #[error("unpacking the image was stopped")]
    Stopped,
    #[error("creating the directory {path:?} failed")]
    Target { path: PathBuf, source: io::Error },
}

/// An image whose documents are read and checked; its layers are not yet.
#[derive(Debug)]
pub struct Image {
    source: Source,
    config: RunConfig,
    layers: Vec<Layer>,
}

impl Image {
    /// Opens what the user named: `PATH` or `PATH:NAME`, where NAME picks one of several images of a layout. The
    /// transports of skopeo that mean a local path (`oci:`, `oci-archive:`, `docker-archive:`, `dir` not) are taken off.
    pub fn open(reference: &str) -> Result<Self, Error> {
        let (path, name) = split_reference(reference)?;
        let source = Source::open(&path)?;
        let found = manifest::find(&source, name.as_deref())?;
        Ok(Self {
            config: found.config,
            layers: found.layers,
            source,
        })
    }

    /// What the image says about the program to run.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// Unpacks all layers, lowest first, into `directory`, which must be empty. Ends early when `stop` becomes true. On
    /// an error the directory holds a part of the image and is of no use.
    pub fn unpack(&self, directory: &Path, stop: &AtomicBool) -> Result<(), Error> {
        let target = |source| Error::Target {
            path: directory.into(),
            source,
        };
        let mut tree = tree::Tree::open(directory).map_err(target)?;
        for layer in &self.layers {
            layer.unpack(&self.source, &mut tree, stop)?;
        }
        Ok(())
    }
}

/// Tells the path from the image name, and both from what only a registry client could resolve.
fn split_reference(reference: &str) -> Result<(PathBuf, Option<String>), Error> {
    if reference.contains("://") {
        return Err(Error::Registry {
            reference: reference.into(),
        });
    }
    let local = ["oci-archive:", "docker-archive:", "oci:"]
        .iter()
        .find_map(|prefix| reference.strip_prefix(prefix));
    let rest = local.unwrap_or(reference);
    if Path::new(rest).exists() {
        return Ok((rest.into(), None));
    }
    // Names of images contain colons (`alpine:3.20`): the path is the shortest prefix that exists.
    for (colon, _) in rest.match_indices(':') {
        if colon > 0 && Path::new(&rest[..colon]).exists() {
            return Ok((rest[..colon].into(), Some(rest[colon + 1..].into())));
        }
    }
    if local.is_none() && !rest.starts_with(['/', '.']) {
        return Err(Error::Registry {
            reference: format!("docker://{rest}"),
        });
    }
    Err(Error::Missing { path: rest.into() })
}

/// The hexadecimal part of a SHA-256 digest; other algorithms are refused by name.
fn sha256_of(digest: &Digest) -> Result<&str, Error> {
    match digest.algorithm() {
        oci_spec::image::DigestAlgorithm::Sha256 => Ok(digest.digest()),
        _ => Err(Error::Unsupported {
            name: digest.to_string(),
            reason: "only sha256 digests are supported".into(),
        }),
    }
}
