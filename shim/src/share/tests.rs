use super::*;
use std::os::unix::fs::symlink;

fn id(name: &str) -> ContainerId {
    ContainerId::new(name).unwrap()
}

#[test]
fn volumes_appear_writable_or_not_and_go_again() {
    let dir = tempfile::tempdir().unwrap();
    let (sandbox, volume) = (dir.path().join("s"), dir.path().join("v"));
    fs::create_dir(&sandbox).unwrap();
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("f"), "kept").unwrap();

    let share = Share::create(&sandbox).unwrap();
    assert_eq!(
        share.add_rootfs(&id("c"), &volume, false).unwrap(),
        "/run/coffer/share/c/rootfs"
    );
    assert_eq!(
        share.add_volume(&id("c"), &volume, true, None).unwrap(),
        "/run/coffer/share/.volumes/1"
    );
    share
        .add_volume(&id("c"), &volume.join("f"), true, None)
        .unwrap();

    fs::write(share.served().join("c/rootfs/new"), "seen").unwrap();
    assert_eq!(fs::read_to_string(volume.join("new")).unwrap(), "seen");
    let refused = fs::write(share.served().join(".volumes/1/f"), "lost").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    assert_eq!(
        fs::read_to_string(share.served().join(".volumes/2")).unwrap(),
        "kept"
    );

    share.remove_container(&id("c")).unwrap();
    share.remove_container(&id("c")).unwrap();
    Share::remove(&sandbox).unwrap();
    Share::remove(&sandbox).unwrap();
    assert_eq!(fs::read_to_string(volume.join("f")).unwrap(), "kept");
    assert_eq!(fs::read_dir(&sandbox).unwrap().count(), 0);
}

#[test]
fn containers_that_have_the_same_volume_in_the_same_way_have_one_mount() {
    let dir = tempfile::tempdir().unwrap();
    let (sandbox, volume) = (dir.path().join("s"), dir.path().join("v"));
    fs::create_dir(&sandbox).unwrap();
    fs::create_dir_all(volume.join("sub")).unwrap();
    let share = Share::create(&sandbox).unwrap();
    let add = |name: &str, source: &Path, read_only| {
        share
            .add_volume(&id(name), source, read_only, None)
            .unwrap()
    };
    let first = add("a", &volume, false);
    assert_eq!(add("b", &volume, false), first);
    let others = [
        add("b", &volume, true),
        add("b", &volume.join("sub"), false),
    ];
    assert!(!others.contains(&first) && others[0] != others[1]);

    let served = share.served().join(".volumes");
    let count = || fs::read_dir(&served).unwrap().count();
    share.remove_container(&id("a")).unwrap();
    fs::write(served.join("1/still"), "there").unwrap();
    assert_eq!(count(), 3);
    share.remove_container(&id("b")).unwrap();
    assert_eq!(count(), 0);

    // Another directory under the same path is another volume.
    let before = add("a", &volume, false);
    fs::rename(&volume, dir.path().join("old")).unwrap();
    fs::create_dir(&volume).unwrap();
    assert_ne!(add("b", &volume, false), before);
    Share::remove(&sandbox).unwrap();
}

#[test]
fn the_top_of_the_share_is_closed_to_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let share = Share::create(dir.path()).unwrap();
    let refused = symlink("/etc", share.served().join("c")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    Share::remove(dir.path()).unwrap();
}

#[test]
fn an_id_mapped_volume_shows_other_owners_and_stores_the_own() {
    use oci_spec::runtime::LinuxIdMappingBuilder;
    use std::os::unix::fs::{MetadataExt, chown};
    let dir = tempfile::tempdir().unwrap();
    let (sandbox, volume) = (dir.path().join("s"), dir.path().join("v"));
    fs::create_dir(&sandbox).unwrap();
    fs::create_dir(&volume).unwrap();
    let mapping = LinuxIdMappingBuilder::default()
        .container_id(0_u32)
        .host_id(100_000_u32)
        .size(1000_u32)
        .build()
        .unwrap();
    let idmap = IdMap {
        uids: vec![mapping],
        gids: vec![mapping],
        recursive: false,
    };
    let share = Share::create(&sandbox).unwrap();
    share
        .add_volume(&id("c"), &volume, false, Some(&idmap))
        .unwrap();
    let seen = share.served().join(".volumes/1");
    fs::write(volume.join("roots"), "").unwrap();
    assert_eq!(fs::metadata(seen.join("roots")).unwrap().uid(), 100_000);
    chown(seen.join("roots"), Some(100_007), Some(100_008)).unwrap();
    let stored = fs::metadata(volume.join("roots")).unwrap();
    assert_eq!((stored.uid(), stored.gid()), (7, 8));
    Share::remove(&sandbox).unwrap();
}

#[test]
fn a_device_is_no_volume() {
    let dir = tempfile::tempdir().unwrap();
    let share = Share::create(dir.path()).unwrap();
    let refused = share.add_volume(&id("c"), Path::new("/dev/null"), false, None);
    assert!(
        matches!(refused, Err(ShareError::Kind { .. })),
        "{refused:?}"
    );
    Share::remove(dir.path()).unwrap();
}

#[test]
fn mountinfo_escapes_are_read() {
    assert_eq!(unescape(b"/a\\040b\\134"), Path::new("/a b\\"));
}
