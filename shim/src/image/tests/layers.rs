//! What becomes of the entries of layers.

use super::super::fixture::{LayerTar, Layout};
use super::super::{Error, tree};
use super::{gzip, message, read, unpack, unpack_layers};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use tar::{EntryType, Header};

fn describe(header: &mut Header, owner: (u64, u64), mode: u32, size: u64) {
    header.set_uid(owner.0);
    header.set_gid(owner.1);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_size(size);
}

fn zstd(data: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
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
