//! Images built in the test: layers entry by entry, then a layout or a docker archive around them.

use super::manifest::hex;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use tar::{Builder, EntryType, Header};

/// A tar, entry by entry. Names are written as they are, also those the `tar` crate would refuse.
pub(super) struct LayerTar(Builder<Vec<u8>>);

impl LayerTar {
    pub(super) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    pub(super) fn entry(
        mut self,
        kind: EntryType,
        name: &str,
        target: &str,
        content: &[u8],
    ) -> Self {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory {
            0o755
        } else {
            0o644
        });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000);
        header.set_size(content.len() as u64);
        self.append(header, content);
        self
    }

    pub(super) fn file(self, name: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, name, "", content.as_bytes())
    }

    pub(super) fn directory(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"")
    }

    pub(super) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, b"")
    }

    pub(super) fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, target, b"")
    }

    pub(super) fn append(&mut self, mut header: Header, content: &[u8]) {
        header.set_cksum();
        self.0.append(&header, content).unwrap();
    }

    pub(super) fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// An OCI layout in a temporary directory.
pub(super) struct Layout(pub(super) tempfile::TempDir);

impl Layout {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        fs::write(
            directory.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        Self(directory)
    }

    /// A layout with one image of these plain layers.
    pub(super) fn of(layers: &[Vec<u8>]) -> Self {
        let layout = Self::new();
        let manifest = layout.image(
            &layers
                .iter()
                .map(|tar| (tar.clone(), tar.clone()))
                .collect::<Vec<_>>(),
        );
        layout.index(&[manifest]);
        layout
    }

    pub(super) fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    pub(super) fn blob_path(&self, descriptor: &Value) -> PathBuf {
        let digest = descriptor["digest"].as_str().unwrap();
        self.0
            .path()
            .join("blobs/sha256")
            .join(digest.strip_prefix("sha256:").unwrap())
    }

    /// Stores a blob; the answer is its descriptor.
    pub(super) fn blob(&self, media_type: &str, content: &[u8]) -> Value {
        let digest = hex(&Sha256::digest(content));
        fs::write(self.0.path().join("blobs/sha256").join(&digest), content).unwrap();
        json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len()})
    }

    /// Stores an image; a layer is (stored form, plain tar).
    pub(super) fn image(&self, layers: &[(Vec<u8>, Vec<u8>)]) -> Value {
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            &config(layers.iter().map(|layer| &layer.1)),
        );
        let layers: Vec<_> = layers
            .iter()
            .map(|(stored, _)| self.blob("application/vnd.oci.image.layer.v1.tar", stored))
            .collect();
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers});
        self.blob(media_type, manifest.to_string().as_bytes())
    }

    pub(super) fn nested_index(&self, manifests: &[Value]) -> Value {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        self.blob(
            "application/vnd.oci.image.index.v1+json",
            index.to_string().as_bytes(),
        )
    }

    pub(super) fn index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.0.path().join("index.json"), index.to_string()).unwrap();
    }
}

/// An image config as docker writes it, with its nulls.
pub(super) fn config<'a>(plain_layers: impl Iterator<Item = &'a Vec<u8>>) -> Vec<u8> {
    let diff_ids: Vec<_> = plain_layers
        .map(|tar| format!("sha256:{}", hex(&Sha256::digest(tar))))
        .collect();
    json!({
        "architecture": "amd64", "os": "linux", "created": "2024-01-01T00:00:00Z",
        "config": {"Env": ["PATH=/bin", "A=b"], "Cmd": ["sh", "-c", "true"], "Entrypoint": null, "User": "daemon:bin",
                   "WorkingDir": "/srv", "Volumes": null, "OnBuild": null, "Labels": null},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string()
    .into_bytes()
}

/// Packs a directory's files into a tar beside nothing else.
pub(super) fn pack(directory: &Path) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut builder = Builder::new(file.as_file());
    builder.follow_symlinks(false);
    builder.append_dir_all("", directory).unwrap();
    builder.finish().unwrap();
    drop(builder);
    file
}
