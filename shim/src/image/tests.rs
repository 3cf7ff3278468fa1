use super::fixture::{LayerTar, Layout, config, pack};
use super::manifest::hex;
use super::{Error, Image, RunConfig, tree};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use tar::{EntryType, Header};
use tempfile::TempDir;

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

/// The whole chain in one line, as the user sees it.
fn message(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text += &format!(": {next}");
        cause = next.source();
    }
    text
}

fn describe(header: &mut Header, owner: (u64, u64), mode: u32, size: u64) {
    header.set_uid(owner.0);
    header.set_gid(owner.1);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_size(size);
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
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
fn layers_are_plain_gzip_or_zstd_with_many_frames() {
    let tar = |name| LayerTar::new().file(name, name).finish();
    let layout = Layout::new();
    let third = tar("third");
    let (head, tail) = third.split_at(700);
    let skippable = [
        &0x184d_2a50_u32.to_le_bytes()[..],
        &3_u32.to_le_bytes(),
        b"abc",
    ]
    .concat();
    let frames = [
        &skippable[..],
        &zstd(head),
        &skippable,
        &zstd(tail),
        &skippable,
    ]
    .concat();
    let members = [gzip(&tar("fourth")[..600]), gzip(&tar("fourth")[600..])].concat();
    let layers = [
        (tar("first"), tar("first")),
        (gzip(&tar("second")), tar("second")),
        (frames, tar("third")),
        (members, tar("fourth")),
    ];
    layout.index(&[layout.image(&layers)]);
    let root = unpack(layout.path()).unwrap();
    for name in ["first", "second", "third", "fourth"] {
        assert_eq!(read(&root, name), name);
    }
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
fn other_compressions_are_refused() {
    let layout = Layout::new();
    layout.index(&[layout.image(&[(b"BZh91AY&SY".to_vec(), Vec::new())])]);
    assert!(message(&unpack(layout.path()).unwrap_err()).contains("gzip and zstd"));
}

#[test]
fn upper_layers_replace_and_hide_lower_ones() {
    let lower = LayerTar::new()
        .file("etc/kept", "lower")
        .file("etc/hidden", "lower")
        .file("gone/deep/file", "lower")
        .file("opaque/old", "lower")
        .file("opaque/sub/old", "lower")
        .file("was-file", "lower")
        .file("was-directory/x", "lower")
        .symlink("was-link", "etc/kept");
    let upper = LayerTar::new()
        .file("etc/.wh.hidden", "")
        .file(".wh.gone", "")
        .file("opaque/new", "upper")
        .file("opaque/sub/new", "upper")
        // The order in the layer does not matter: own entries stay.
        .file("opaque/.wh..wh..opq", "")
        .directory("was-file")
        .file("was-directory", "upper")
        .file("was-link", "upper");
    let root = unpack_layers(&[lower.finish(), upper.finish()]).unwrap();
    assert_eq!(read(&root, "etc/kept"), "lower");
    assert!(!root.path().join("etc/hidden").exists() && !root.path().join("gone").exists());
    assert!(
        !root.path().join("opaque/old").exists() && !root.path().join("opaque/sub/old").exists()
    );
    assert_eq!(
        (read(&root, "opaque/new"), read(&root, "opaque/sub/new")),
        ("upper".into(), "upper".into())
    );
    assert!(root.path().join("was-file").is_dir());
    assert_eq!(
        (read(&root, "was-directory"), read(&root, "was-link")),
        ("upper".into(), "upper".into())
    );
    let names = fs::read_dir(root.path().join("opaque"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert!(
        names
            .into_iter()
            .all(|name| !name.to_string_lossy().starts_with(".wh."))
    );
}

#[test]
fn whiteouts_of_nothing_pass_and_of_parents_do_not() {
    unpack_layers(&[LayerTar::new().file("a/.wh.b", "").finish()]).unwrap();
    for bad in ["a/.wh.", "a/.wh..", "a/.wh...", "a/.wh..wh.aufs"] {
        let error =
            unpack_layers(&[LayerTar::new().file("b", "").file(bad, "").finish()]).unwrap_err();
        assert!(message(&error).contains(bad), "{}", message(&error));
    }
}

#[test]
fn owners_modes_times_links_and_capabilities_are_kept() {
    // CAP_DAC_OVERRIDE and CAP_FOWNER: their bits are a newline, which splits naive PAX readers.
    let capability = [
        1, 0, 0, 2, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let mut layer = LayerTar::new().directory("bin");
    layer = layer.pax(&[
        ("SCHILY.xattr.security.capability", &capability),
        ("mtime", b"1234.5"),
    ]);
    let mut header = Header::new_ustar();
    header.set_path("bin/ping").unwrap();
    describe(&mut header, (1000, 1001), 0o4751, 2);
    layer.append(header, b"hi");
    let layer = layer
        .hard_link("bin/pong", "bin/ping")
        .symlink("bin/link", "/bin/ping")
        .finish();
    let root = unpack_layers(&[layer]).unwrap();

    let file = fs::metadata(root.path().join("bin/ping")).unwrap();
    assert_eq!(
        (file.uid(), file.gid(), file.mode() & 0o7777),
        (1000, 1001, 0o4751)
    );
    assert_eq!(
        (file.mtime(), file.mtime_nsec(), file.nlink()),
        (1234, 500_000_000, 2)
    );
    assert_eq!(
        fs::metadata(root.path().join("bin/pong")).unwrap().ino(),
        file.ino()
    );
    assert_eq!(
        fs::read_link(root.path().join("bin/link")).unwrap(),
        Path::new("/bin/ping")
    );
    assert_eq!(
        fs::metadata(root.path().join("bin")).unwrap().mtime(),
        1_000_000
    );
    assert_eq!(
        xattr(&root.path().join("bin/ping"), c"security.capability"),
        capability
    );
}

#[allow(unsafe_code)]
fn xattr(path: &Path, name: &std::ffi::CStr) -> Vec<u8> {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let mut value = vec![0; 256];
    // SAFETY: all pointers are valid for the call, the last with its length.
    let length = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(usize::try_from(length).expect("the attribute exists"));
    value
}

#[test]
fn devices_and_fifos_are_made() {
    let mut layer = LayerTar::new().entry(EntryType::Fifo, "fifo", "", b"");
    let mut header = Header::new_ustar();
    header.set_path("null").unwrap();
    header.set_entry_type(EntryType::Char);
    describe(&mut header, (0, 0), 0o666, 0);
    header.set_device_major(1).unwrap();
    header.set_device_minor(3).unwrap();
    layer.append(header, b"");
    let root = unpack_layers(&[layer.finish()]).unwrap();
    assert!(
        fs::metadata(root.path().join("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    let null = fs::metadata(root.path().join("null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(
        (null.rdev(), null.permissions().mode() & 0o777),
        (nix::sys::stat::makedev(1, 3), 0o666)
    );
}

#[test]
fn names_that_lead_out_are_refused() {
    for bad in ["../escaped", "a/../../escaped", "a/.."] {
        let error = unpack_layers(&[LayerTar::new().file(bad, "x").finish()]).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Layer {
                    source: tree::Error::Refused { .. },
                    ..
                }
            ),
            "{bad}: {error:?}"
        );
        assert!(message(&error).contains(bad), "{}", message(&error));
        let error = unpack_layers(&[LayerTar::new().hard_link("link", bad).finish()]).unwrap_err();
        assert!(message(&error).contains(bad), "{}", message(&error));
    }
    let deep = "d/".repeat(49);
    let layer = LayerTar::new()
        .pax(&[("path", deep.repeat(3).as_bytes())])
        .directory("d")
        .finish();
    assert!(message(&unpack_layers(&[layer]).unwrap_err()).contains("too deep"));
}

#[test]
fn links_and_absolute_names_stay_inside() {
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().to_str().unwrap();
    fs::write(outside.path().join("victim"), "host").unwrap();
    let layer = LayerTar::new()
        .file("/absolute", "in")
        .symlink("up", "../../../../..")
        .file("up/through-up", "in")
        .directory(&format!("{}/", out.trim_start_matches('/')))
        .symlink("abs", out)
        .file("abs/victim", "guest")
        .symlink("final", &format!("{out}/victim"))
        .file("final", "guest");
    let root = unpack_layers(&[layer.finish()]).unwrap();
    assert_eq!(read(&root, "absolute"), "in");
    assert_eq!(read(&root, "through-up"), "in");
    assert_eq!(
        fs::read_to_string(outside.path().join("victim")).unwrap(),
        "host"
    );
    assert_eq!(
        read(&root, &format!("{}/victim", out.trim_start_matches('/'))),
        "guest"
    );
    assert!(
        fs::symlink_metadata(root.path().join("final"))
            .unwrap()
            .is_file()
    );
    // A hard link to what a symbolic link points to would be a link to a file of the host.
    let layer = LayerTar::new()
        .symlink("abs", out)
        .hard_link("stolen", "abs/victim");
    assert!(unpack_layers(&[layer.finish()]).is_err());
    // The whiteout behind a link that leads out.
    let layer = LayerTar::new()
        .symlink("abs", out)
        .file("abs/.wh.victim", "");
    let _ = unpack_layers(&[layer.finish()]);
    assert!(outside.path().join("victim").exists());
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
