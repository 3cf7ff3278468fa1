use super::fixture::{LayerTar, Layout, config, pack};
use super::manifest::hex;
use super::{Error, Image, RunConfig};
use coffer_proto::error_chain::chain as message;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;

mod layers;

fn unpack(reference: &str) -> Result<TempDir, Error> {
    let directory = tempfile::tempdir().unwrap();
    Image::open(reference)?.unpack(directory.path(), &AtomicBool::new(false))?;
    Ok(directory)
}

fn unpack_layers(layers: &[Vec<u8>]) -> Result<TempDir, Error> {
    unpack(Layout::of(layers).path())
}

fn read(root: &TempDir, path: &str) -> String {
    fs::read_to_string(root.path().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn the_config_of_the_image_is_read() {
    let image = Layout::of(&[LayerTar::new().finish()]);
    let expected = RunConfig {
        entrypoint: None,
        cmd: Some(vec!["sh".into(), "-c".into(), "true".into()]),
        env: Some(vec!["PATH=/bin".into(), "A=b".into()]),
        user: "daemon:bin".into(),
        working_dir: Some("/srv".into()),
    };
    assert_eq!(*Image::open(image.path()).unwrap().config(), expected);
}

#[test]
fn an_image_without_layers_is_an_empty_root() {
    let root = unpack_layers(&[]).unwrap();
    assert!(fs::read_dir(root.path()).unwrap().next().is_none());
}

#[test]
fn unpacking_can_be_stopped() {
    let image = Layout::of(&[LayerTar::new().file("a", "").finish()]);
    let directory = tempfile::tempdir().unwrap();
    let stopped = Image::open(image.path())
        .unwrap()
        .unpack(directory.path(), &AtomicBool::new(true));
    assert!(matches!(stopped, Err(Error::Stopped)));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn wrong_sizes_and_digests_name_the_blob() {
    let layer = LayerTar::new().file("a", "content").finish();
    let layout = Layout::of(std::slice::from_ref(&layer));
    let descriptor = layout.blob("layer", &layer);
    let blob = layout.blob_path(&descriptor);
    let name = blob.file_name().unwrap().to_str().unwrap().to_owned();

    let mut corrupt = layer.clone();
    corrupt[700] ^= 1;
    fs::write(&blob, &corrupt).unwrap();
    let error = unpack(layout.path()).unwrap_err();
    assert!(
        matches!(error, Error::Digest { .. }) && message(&error).contains(&name),
        "{}",
        message(&error)
    );
    // A damaged header is reported as the digest's fault too, not as a tar error.
    corrupt = layer.clone();
    corrupt[0] ^= 1;
    fs::write(&blob, &corrupt).unwrap();
    assert!(matches!(
        unpack(layout.path()).unwrap_err(),
        Error::Digest { .. }
    ));
    fs::write(&blob, &layer[..512]).unwrap();
    assert!(matches!(
        unpack(layout.path()).unwrap_err(),
        Error::Size { actual: 512, .. }
    ));
    fs::remove_file(&blob).unwrap();
    let error = unpack(layout.path()).unwrap_err();
    assert!(
        matches!(error, Error::NoFile { .. }) && message(&error).contains(&name),
        "{}",
        message(&error)
    );
}

#[test]
fn a_layer_that_is_not_the_one_of_the_config_is_refused() {
    let (stored, described) = (
        LayerTar::new().file("a", "1").finish(),
        LayerTar::new().file("a", "2").finish(),
    );
    let layout = Layout::new();
    layout.index(&[layout.image(&[(gzip(&stored), described)])]);
    assert!(message(&unpack(layout.path()).unwrap_err()).contains("unpacked blobs/sha256/"));
}

#[test]
fn a_changed_manifest_is_noticed() {
    let layout = Layout::new();
    let manifest = layout.image(&[]);
    layout.index(std::slice::from_ref(&manifest));
    let path = layout.blob_path(&manifest);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        text.replace("schemaVersion\":2", "schemaVersion\":3"),
    )
    .unwrap();
    assert!(matches!(
        Image::open(layout.path()).unwrap_err(),
        Error::Digest { .. }
    ));
}

fn on(mut descriptor: Value, os: &str, architecture: &str) -> Value {
    descriptor["platform"] = json!({"os": os, "architecture": architecture});
    descriptor
}

fn named(mut descriptor: Value, name: &str) -> Value {
    descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
    descriptor
}

fn one_file(layout: &Layout, name: &str) -> Value {
    let tar = LayerTar::new().file(name, name).finish();
    layout.image(&[(tar.clone(), tar)])
}

#[test]
fn the_image_for_this_machine_is_chosen_through_nested_indexes() {
    let layout = Layout::new();
    let nested = layout.nested_index(&[
        on(one_file(&layout, "arm"), "linux", "arm64"),
        on(one_file(&layout, "amd"), "linux", "amd64"),
        on(one_file(&layout, "attestation"), "unknown", "unknown"),
    ]);
    layout.index(&[nested]);
    assert_eq!(read(&unpack(layout.path()).unwrap(), "amd"), "amd");

    layout.index(&[on(one_file(&layout, "arm"), "linux", "arm64")]);
    let error = message(&Image::open(layout.path()).unwrap_err());
    assert!(
        error.contains("linux/amd64") && error.contains("linux/arm64"),
        "{error}"
    );
}

#[test]
fn endless_indexes_end() {
    let layout = Layout::new();
    let mut index = one_file(&layout, "x");
    for _ in 0..6 {
        index = layout.nested_index(&[index]);
    }
    layout.index(&[index]);
    assert!(message(&Image::open(layout.path()).unwrap_err()).contains("nested"));
}

#[test]
fn one_of_several_images_is_chosen_by_name() {
    let layout = Layout::new();
    layout.index(&[
        named(one_file(&layout, "one"), "docker.io/a:1"),
        named(one_file(&layout, "two"), "two"),
    ]);
    let error = message(&Image::open(layout.path()).unwrap_err());
    assert!(error.contains("docker.io/a:1, two"), "{error}");
    for (name, file) in [("two", "two"), ("docker.io/a:1", "one"), ("a:1", "one")] {
        assert_eq!(
            read(&unpack(&format!("{}:{name}", layout.path())).unwrap(), file),
            file
        );
    }
    let error = message(&Image::open(&format!("oci:{}:three", layout.path())).unwrap_err());
    assert!(error.contains("three") && error.contains("two"), "{error}");
}

#[test]
fn a_layout_may_be_a_tar() {
    let layout = Layout::new();
    layout.index(&[one_file(&layout, "in-a-tar")]);
    let tar = pack(layout.0.path());
    let path = tar.path().to_str().unwrap();
    assert_eq!(read(&unpack(path).unwrap(), "in-a-tar"), "in-a-tar");
    assert_eq!(
        read(&unpack(&format!("oci-archive:{path}")).unwrap(), "in-a-tar"),
        "in-a-tar"
    );

    let compressed = tempfile::NamedTempFile::new().unwrap();
    fs::write(compressed.path(), gzip(&fs::read(path).unwrap())).unwrap();
    let error = message(&Image::open(compressed.path().to_str().unwrap()).unwrap_err());
    assert!(error.contains("gunzip"), "{error}");
}

#[test]
fn docker_archives_have_layers_by_path_or_link() {
    let (first, second) = (
        LayerTar::new().file("a", "1").finish(),
        LayerTar::new().file("b", "2").finish(),
    );
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let config = config([&first, &second, &first].into_iter());
    let config_name = format!("{}.json", hex(&Sha256::digest(&config)));
    for (name, layer) in [("one", &first), ("two", &second)] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(&format!("{name}/layer.tar")), layer).unwrap();
    }
    fs::create_dir(path("three")).unwrap();
    std::os::unix::fs::symlink("../one/layer.tar", path("three/layer.tar")).unwrap();
    fs::write(path(&config_name), &config).unwrap();
    let layers = ["one/layer.tar", "two/layer.tar", "three/layer.tar"];
    let manifest =
        json!([{"Config": config_name, "RepoTags": ["docker.io/library/x:1"], "Layers": layers}]);
    fs::write(path("manifest.json"), manifest.to_string()).unwrap();

    let archive = pack(directory.path());
    for reference in [
        directory.path().to_str().unwrap(),
        archive.path().to_str().unwrap(),
    ] {
        let root = unpack(reference).unwrap();
        assert_eq!(
            (read(&root, "a"), read(&root, "b")),
            ("1".into(), "2".into())
        );
        assert!(unpack(&format!("{reference}:x:1")).is_ok());
        assert!(
            message(&unpack(&format!("{reference}:y")).unwrap_err())
                .contains("docker.io/library/x:1")
        );
    }

    fs::write(
        path("two/layer.tar"),
        LayerTar::new().file("b", "3").finish(),
    )
    .unwrap();
    assert!(
        message(&unpack(directory.path().to_str().unwrap()).unwrap_err()).contains("two/layer.tar")
    );
    fs::write(path(&config_name), [&config[..], b" "].concat()).unwrap();
    assert!(
        message(&unpack(directory.path().to_str().unwrap()).unwrap_err()).contains(&config_name)
    );
}

#[test]
fn what_is_no_image_is_told_apart() {
    let error = |reference: &str| message(&Image::open(reference).unwrap_err());
    assert!(error("docker://alpine:3").contains("skopeo copy docker://alpine:3"));
    assert!(error("alpine:3").contains("skopeo copy docker://alpine:3"));
    assert!(error("/no/such/image").contains("\"/no/such/image\""));
    assert!(error("/dev/null").contains("neither a directory nor a file"));
    let empty = tempfile::tempdir().unwrap();
    assert!(error(empty.path().to_str().unwrap()).contains("index.json"));
    fs::write(empty.path().join("index.json"), "{").unwrap();
    assert!(error(empty.path().to_str().unwrap()).contains("index.json of the image is not valid"));
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), [7; 2048]).unwrap();
    assert!(error(file.path().to_str().unwrap()).contains("checksum"));
}

#[test]
fn blobs_outside_the_layout_are_not_opened() {
    let layout = Layout::new();
    let manifest = one_file(&layout, "x");
    layout.index(std::slice::from_ref(&manifest));
    let path = layout.blob_path(&manifest);
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    fs::copy(&path, elsewhere.path()).unwrap();
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), &path).unwrap();
    assert!(matches!(
        Image::open(layout.path()).unwrap_err(),
        Error::Read { .. }
    ));
}
