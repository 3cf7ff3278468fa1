//! Changes that the host makes in a volume raise inotify events in the guest.

use coffer_tests::{Test, asset, wait_for};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

/// Prints the events of a directory, one a line; the Debian root has no inotify-tools.
const WATCHER: &str = r#"
$| = 1;
my %names = (2 => 'MODIFY', 4 => 'ATTRIB', 8 => 'CLOSE_WRITE', 64 => 'MOVED_FROM', 128 => 'MOVED_TO', 256 => 'CREATE', 512 => 'DELETE');
my $fd = syscall(294, 0);
syscall(254, $fd, $ARGV[0], 0x3ce) >= 0 or die "add_watch: $!";
open(my $events, '<&=', $fd) or die;
print "watching\n";
while (sysread($events, my $b, 65536)) {
    while (length $b) {
        my (undef, $mask, undef, $length) = unpack('iIII', $b);
        my $name = unpack('Z*', substr($b, 16, $length));
        print $names{$mask & 0xfff}, " $name\n";
        $b = substr($b, 16 + $length);
    }
}
"#;

/// Makes a version of a configMap as kubelet does: a new directory, then one swap of a symlink.
fn publish(volume: &Path, version: &str, text: &str) {
    fs::create_dir(volume.join(version)).unwrap();
    fs::write(volume.join(version).join("key"), text).unwrap();
    symlink(version, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
}

#[test]
fn an_update_of_a_config_map_is_seen_by_who_watches_it() {
    let test = Test::new("inotify");
    let volume = test.dir().join("volumes/kubernetes.io~configmap/app");
    fs::create_dir_all(&volume).unwrap();
    publish(&volume, "..first", "one");
    symlink("..data/key", volume.join("key")).unwrap();
    let (rootfs, mount) = (asset("debian"), format!("{}:/mnt:ro", volume.display()));
    let sandbox = test.background_on(
        &["--rootfs", rootfs.to_str().unwrap()],
        &["--volume", &mount],
        &["sleep", "600"],
    );
    assert_eq!(sandbox.sh("cat /mnt/key"), "one");
    assert_eq!(
        sandbox
            .sh("touch /mnt/x 2>&1 || echo refused")
            .lines()
            .last(),
        Some("refused")
    );

    let mut watcher = sandbox
        .exec_command(&[], &["perl", "-e", WATCHER, "/mnt"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let reader = std::thread::spawn({
        let (out, lines) = (watcher.stdout.take().unwrap(), lines.clone());
        move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        }
    });
    let position = |wanted: &str| lines.lock().unwrap().iter().position(|line| line == wanted);
    wait_for("the watcher", || position("watching").is_some());

    publish(&volume, "..second", "two");
    fs::remove_dir_all(volume.join("..first")).unwrap();
    wait_for("the old version to go", || {
        position("DELETE ..first").is_some()
    });
    let (created, swapped) = (position("CREATE ..second"), position("MOVED_TO ..data"));
    assert!(
        created.is_some() && created < swapped && swapped < position("DELETE ..first"),
        "{lines:?}"
    );
    assert_eq!(sandbox.sh("cat /mnt/key"), "two");

    // Not only kubelet's way: a plain file is written in place.
    fs::write(volume.join("plain"), "a").unwrap();
    wait_for("a new file", || position("CREATE plain").is_some());
    wait_for("its contents", || sandbox.sh("cat /mnt/plain") == "a");
    fs::write(volume.join("plain"), "longer").unwrap();
    wait_for("its new contents", || {
        sandbox.sh("cat /mnt/plain") == "longer"
    });
    assert!(position("MODIFY plain").is_some(), "{lines:?}");

    drop(sandbox);
    watcher.wait().unwrap();
    reader.join().unwrap();
}
