//! Real mounts, each test in a mount namespace of its own. They need root.

use super::*;
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use tempfile::TempDir;

/// Takes the test's thread into a mount namespace from which nothing gets out; gives it a directory with `names` in it.
fn scene(names: &[&str]) -> TempDir {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    change(place("/"), Depth::Recursive, Propagation::Private).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for name in names {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    dir
}

fn place(path: impl AsRef<Path>) -> File {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_PATH);
    options.open(path).unwrap()
}

/// Mounts a tmpfs and puts the file `f` into it.
fn tmpfs(on: &Path) {
    let size = ("size".to_owned(), Some("1m".to_owned()));
    let tree = new_mount(c"tmpfs", &[size], Attributes::NODEV).unwrap();
    attach(&tree, place(on)).unwrap();
    fs::write(on.join("f"), "x").unwrap();
}

fn error_of(written: io::Result<()>) -> Option<Errno> {
    let number = written.err()?.raw_os_error()?;
    Some(Errno::from_raw(number))
}

/// The optional fields of a mount point in proc_pid_mountinfo(5), and its options before them.
fn mountinfo(point: &Path) -> String {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let lines = text.lines().rev();
    let mut found = lines.filter(|line| line.split(' ').nth(4) == point.to_str());
    let line = found.next().expect("it is mounted");
    line.split(" - ").next().unwrap().to_owned()
}

#[test]
fn a_copy_has_attributes_of_its_own() {
    let dir = scene(&["from", "to"]);
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    tmpfs(&from);
    let copy = clone_tree(place(&from), Depth::One).unwrap();
    change(&copy, Depth::One, Attributes::RDONLY).unwrap();
    attach(&copy, place(&to)).unwrap();
    assert_eq!(fs::read(to.join("f")).unwrap(), b"x");
    assert_eq!(error_of(fs::write(to.join("f"), "y")), Some(Errno::EROFS));
    fs::write(from.join("f"), "y").unwrap();

    let writable = Change {
        clear: Attributes::RDONLY,
        ..Change::default()
    };
    change(place(&to), Depth::One, writable).unwrap();
    fs::write(to.join("f"), "z").unwrap();
    assert!(mountinfo(&to).contains("nodev"), "what is not named stays");
}

#[test]
fn what_is_mounted_below_comes_along_only_where_it_is_asked_for() {
    let dir = scene(&["from", "one", "all"]);
    let from = dir.path().join("from");
    tmpfs(&from);
    fs::create_dir(from.join("below")).unwrap();
    tmpfs(&from.join("below"));
    for (name, depth, shown) in [("one", Depth::One, false), ("all", Depth::Recursive, true)] {
        let copy = clone_tree(place(&from), depth).unwrap();
        change(&copy, depth, Attributes::RDONLY).unwrap();
        let to = dir.path().join(name);
        attach(&copy, place(&to)).unwrap();
        let below = to.join("below/f");
        assert_eq!(below.exists(), shown, "{name}");
        assert_eq!(error_of(fs::write(below, "y")), Some(Errno::EROFS));
    }
}

#[test]
fn a_file_is_mounted_on_a_file() {
    let dir = scene(&[]);
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, "from").unwrap();
    fs::write(&to, "to").unwrap();
    let copy = clone_tree(place(&from), Depth::One).unwrap();
    attach(&copy, place(&to)).unwrap();
    assert_eq!(fs::read(&to).unwrap(), b"from");
    let directory = attach(
        clone_tree(place(&from), Depth::One).unwrap(),
        place(dir.path()),
    );
    assert_eq!(directory, Err(Errno::EINVAL));
}

#[test]
fn mounts_pass_between_peers_as_their_propagation_says() {
    let dir = scene(&["from", "peer", "slave"]);
    let [from, peer, slave] = ["from", "peer", "slave"].map(|name| dir.path().join(name));
    tmpfs(&from);
    fs::create_dir(from.join("later")).unwrap();
    change(place(&from), Depth::One, Propagation::Shared).unwrap();
    for (to, propagation) in [(&peer, Propagation::Shared), (&slave, Propagation::Slave)] {
        let copy = clone_tree(place(&from), Depth::One).unwrap();
        change(&copy, Depth::One, propagation).unwrap();
        attach(&copy, place(to)).unwrap();
    }
    assert!(mountinfo(&peer).contains("shared:"));
    assert!(mountinfo(&slave).contains("master:"));
    tmpfs(&slave.join("later"));
    assert!(!from.join("later/f").exists());
    nix::mount::umount(&slave.join("later")).unwrap();
    tmpfs(&peer.join("later"));
    assert!(from.join("later/f").exists() && slave.join("later/f").exists());
}

#[test]
fn the_kernel_names_the_parameter_that_it_refuses() {
    let bad = ("size".to_owned(), Some("many".to_owned()));
    let error = new_mount(c"tmpfs", &[bad], Attributes::empty()).unwrap_err();
    assert!(error.to_string().contains("size"), "{error}");
    let unknown = new_mount(c"nosuchfs", &[], Attributes::empty());
    assert_eq!(unknown.unwrap_err().raw_os_error(), Some(libc::ENODEV));
}

#[test]
fn only_a_mount_can_be_changed() {
    let dir = scene(&["plain"]);
    let plain = place(dir.path().join("plain"));
    let refused = change(&plain, Depth::One, Attributes::RDONLY);
    assert_eq!(refused, Err(Errno::EINVAL));
    assert_eq!(change(&plain, Depth::One, Change::default()), Ok(()));
}
