//! A root file system whose owner, the guest, changes it while the host works in it.

use coffer::mount_points::{MountPoint, make};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

/// A directory of the image becomes a symlink to the host, and a directory again, all the time.
#[test]
fn a_directory_that_turns_into_a_symlink_leads_nowhere_on_the_host() {
    let (rootfs, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (swapped, other) = (rootfs.path().join("swapped"), rootfs.path().join("other"));
    fs::create_dir(&swapped).unwrap();
    symlink(outside.path(), &other).unwrap();
    let done = AtomicBool::new(false);
    let (mut made, mut swaps) = (0, 0u64);
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                let exchange = RenameFlags::RENAME_EXCHANGE;
                renameat2(AT_FDCWD, &swapped, AT_FDCWD, &other, exchange).unwrap();
                count += 1;
            }
            count
        });
        for round in 0..2000 {
            let point = |file| MountPoint {
                path: format!("/swapped/{round}-{file}/deep").into(),
                file,
            };
            // What loses the race is an error, and that is all right.
            made += usize::from(make(rootfs.path(), &[point(false), point(true)]).is_ok());
        }
        done.store(true, Ordering::Relaxed);
        swaps = swapper.join().unwrap();
    });
    assert!(made > 0 && swaps > 100, "{made} made, {swaps} swaps");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}
