//! From an image's entry point to its config and layers.

use super::config::ConfigFile;
use super::layer::Layer;
use super::source::Source;
use super::{Error, MAX_DOCUMENT_BYTES, MAX_LAYERS, RunConfig, sha256_of};
use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, MediaType, Os};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};
use std::io::Read;

/// Indexes inside indexes that are followed; buildx nests one level.
const MAX_INDEX_DEPTH: usize = 4;
/// The annotation under which a layout's index names its images.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// What containerd and docker call the image in an exported index.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// What an image comes down to.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) config: RunConfig,
    pub(super) layers: Vec<Layer>,
}

/// Finds the image for this machine; `name` picks one of several.
pub(super) fn find(source: &Source, name: Option<&str>) -> Result<Found, Error> {
    if let Some(index) = source.file("index.json")? {
        let index = parse("index.json", &read_document("index.json", index)?)?;
        return find_in_index(source, &index, name);
    }
    let Some(manifest) = source.file("manifest.json")? else {
        return Err(Error::NoFile {
            name: "index.json (OCI layout) or manifest.json (docker archive)".into(),
        });
    };
    let entries: Vec<DockerEntry> =
        parse("manifest.json", &read_document("manifest.json", manifest)?)?;
    from_docker_archive(source, entries, name)
}

fn find_in_index(source: &Source, index: &ImageIndex, name: Option<&str>) -> Result<Found, Error> {
    let mut candidates: Vec<_> = index
        .manifests()
        .iter()
        .filter(|entry| runs_here(entry))
        .cloned()
        .collect();
    if let Some(name) = name {
        candidates.retain(|entry| {
            names(entry).any(|own| own == name || own.ends_with(&format!("/{name}")))
        });
    }
    for _ in 0..MAX_INDEX_DEPTH {
        let chosen = choose(index, candidates, name)?;
        if !is_index(chosen.media_type()) {
            return from_manifest(source, &chosen);
        }
        let nested: ImageIndex = parse(chosen.digest().as_ref(), &read_blob(source, &chosen)?)?;
        candidates = nested
            .manifests()
            .iter()
            .filter(|entry| runs_here(entry))
            .cloned()
            .collect();
    }
    let reason = format!("indexes are nested more than {MAX_INDEX_DEPTH} deep");
    Err(Error::Unsupported {
        name: "index.json".into(),
        reason,
    })
}

/// One candidate is the image. Several are the same image under different names, or need to be chosen from.
fn choose(
    index: &ImageIndex,
    mut candidates: Vec<Descriptor>,
    name: Option<&str>,
) -> Result<Descriptor, Error> {
    candidates.dedup_by(|a, b| a.digest() == b.digest());
    if candidates.len() > 1 {
        let mut names: Vec<_> = candidates
            .iter()
            .filter_map(|entry| names(entry).next())
            .collect();
        if names.is_empty() {
            names = candidates
                .iter()
                .map(|entry| entry.digest().as_ref())
                .collect();
        }
        return Err(Error::Ambiguous {
            names: names.join(", "),
        });
    }
    candidates.pop().ok_or_else(|| {
        let describe = |entry: &Descriptor| {
            let platform = entry.platform().as_ref();
            let platform = platform.map_or("any platform".into(), |p| {
                format!("{}/{}", p.os(), p.architecture())
            });
            names(entry)
                .next()
                .map_or(platform.clone(), |name| format!("{name} ({platform})"))
        };
        let available: Vec<_> = index.manifests().iter().map(describe).collect();
        let wanted = name.map_or("linux/amd64".into(), |name| format!("{name} (linux/amd64)"));
        Error::NoManifest {
            wanted,
            available: available.join(", "),
        }
    })
}

fn names(entry: &Descriptor) -> impl Iterator<Item = &str> {
    let annotations = entry.annotations().iter();
    annotations.flat_map(|all| {
        [REF_NAME, CONTAINERD_NAME]
            .into_iter()
            .filter_map(|key| all.get(key))
            .map(String::as_str)
    })
}

/// An image or index, for this machine or for none in particular. Attestations say `unknown/unknown`.
fn runs_here(entry: &Descriptor) -> bool {
    let image = is_index(entry.media_type()) || is_manifest(entry.media_type());
    let platform = entry.platform().as_ref();
    image && platform.is_none_or(|p| *p.os() == Os::Linux && *p.architecture() == Arch::Amd64)
}

fn is_index(kind: &MediaType) -> bool {
    match kind {
        MediaType::ImageIndex => true,
        MediaType::Other(name) => {
            name == "application/vnd.docker.distribution.manifest.list.v2+json"
        }
        _ => false,
    }
}

fn is_manifest(kind: &MediaType) -> bool {
    match kind {
        MediaType::ImageManifest => true,
        MediaType::Other(name) => name == "application/vnd.docker.distribution.manifest.v2+json",
        _ => false,
    }
}

fn from_manifest(source: &Source, descriptor: &Descriptor) -> Result<Found, Error> {
    let manifest: ImageManifest = parse(
        descriptor.digest().as_ref(),
        &read_blob(source, descriptor)?,
    )?;
    let config_name = manifest.config().digest().as_ref();
    let config: ConfigFile = parse(config_name, &read_blob(source, manifest.config())?)?;
    config.check_platform(config_name)?;
    check_layer_count(
        config_name,
        manifest.layers().len(),
        config.diff_ids().len(),
    )?;
    let layers = manifest
        .layers()
        .iter()
        .zip(config.diff_ids())
        .map(|(layer, diff_id)| {
            if layer.media_type().to_string().contains("encrypted") {
                let reason = "encrypted layers are not supported".into();
                return Err(Error::Unsupported {
                    name: layer.digest().to_string(),
                    reason,
                });
            }
            Layer::new(
                blob_path(layer)?,
                Some((layer.digest().clone(), layer.size())),
                diff_id.clone(),
            )
        });
    let layers = layers.collect::<Result<_, _>>()?;
    Ok(Found {
        layers,
        config: config.into_run_config(),
    })
}

/// One image in the manifest.json of `docker save`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn from_docker_archive(
    source: &Source,
    entries: Vec<DockerEntry>,
    name: Option<&str>,
) -> Result<Found, Error> {
    let named = |entry: &DockerEntry, name: &str| {
        let tags = entry.repo_tags.as_deref().unwrap_or_default();
        tags.iter()
            .any(|tag| tag == name || tag.ends_with(&format!("/{name}")))
    };
    let tags: Vec<_> = entries
        .iter()
        .flat_map(|entry| entry.repo_tags.iter().flatten().cloned())
        .collect();
    let mut entries = entries;
    entries.retain(|entry| name.is_none_or(|name| named(entry, name)));
    if entries.len() > 1 {
        return Err(Error::Ambiguous {
            names: tags.join(", "),
        });
    }
    let entry = entries.pop().ok_or_else(|| Error::NoManifest {
        wanted: name.unwrap_or("linux/amd64").into(),
        available: tags.join(", "),
    })?;
    let text = read_document(&entry.config, source.required(&entry.config)?)?;
    // Both save formats name the config by its own digest.
    let stem = entry
        .config
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .trim_end_matches(".json");
    if stem.len() == 64 && stem.bytes().all(|b| b.is_ascii_hexdigit()) {
        check_digest(&entry.config, stem, &text)?;
    }
    let config: ConfigFile = parse(&entry.config, &text)?;
    config.check_platform(&entry.config)?;
    check_layer_count(&entry.config, entry.layers.len(), config.diff_ids().len())?;
    let layers = entry
        .layers
        .into_iter()
        .zip(config.diff_ids())
        .map(|(path, id)| Layer::new(path, None, id.clone()));
    let layers = layers.collect::<Result<_, _>>()?;
    Ok(Found {
        layers,
        config: config.into_run_config(),
    })
}

fn check_layer_count(config: &str, layers: usize, diff_ids: usize) -> Result<(), Error> {
    let refuse = |reason| {
        Err(Error::Unsupported {
            name: config.into(),
            reason,
        })
    };
    if layers != diff_ids {
        return refuse(format!("it lists {diff_ids} layers, the manifest {layers}"));
    }
    if layers > MAX_LAYERS {
        return refuse(format!("{layers} layers, more than {MAX_LAYERS}"));
    }
    Ok(())
}

fn blob_path(descriptor: &Descriptor) -> Result<String, Error> {
    Ok(format!("blobs/sha256/{}", sha256_of(descriptor.digest())?))
}

/// Reads a document named by digest and checks size and digest.
fn read_blob(source: &Source, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
    let path = blob_path(descriptor)?;
    let section = source.required(&path)?;
    if section.size() != descriptor.size() {
        return Err(Error::Size {
            name: path,
            expected: descriptor.size(),
            actual: section.size(),
        });
    }
    let text = read_document(&path, section)?;
    check_digest(&path, sha256_of(descriptor.digest())?, &text)?;
    Ok(text)
}

fn read_document(name: &str, section: super::source::Section) -> Result<Vec<u8>, Error> {
    if section.size() > MAX_DOCUMENT_BYTES {
        let reason = format!("{} bytes, more than {MAX_DOCUMENT_BYTES}", section.size());
        return Err(Error::Unsupported {
            name: name.into(),
            reason,
        });
    }
    let mut text = Vec::new();
    let read = section.take(MAX_DOCUMENT_BYTES).read_to_end(&mut text);
    read.map_err(|source| Error::Read {
        name: name.into(),
        source,
    })?;
    Ok(text)
}

fn check_digest(name: &str, expected: &str, content: &[u8]) -> Result<(), Error> {
    let actual = hex(&Sha256::digest(content));
    if actual != expected {
        return Err(Error::Digest {
            name: name.into(),
            expected: format!("sha256:{expected}"),
            actual,
        });
    }
    Ok(())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            write!(text, "{byte:02x}").expect("a String takes everything");
            text
        })
}

fn parse<T: DeserializeOwned>(name: &str, text: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(text).map_err(|source| Error::Malformed {
        name: name.into(),
        source,
    })
}
