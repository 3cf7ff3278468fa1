//! coffer-fsd as the shim starts it, driven by a hostile guest. Needs root.

mod driver;
#[path = "../server/mod.rs"]
mod server;

use driver::{Driver, Op, ROOT, text};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

/// A served share: DIR is a shared mount in a mount namespace of this test's thread, beside a file that the guest
/// must never reach.
struct Sandbox {
    directory: tempfile::TempDir,
    server: Child,
}

impl Sandbox {
    fn start() -> (Self, UnixStream) {
        unshare(CloneFlags::CLONE_NEWNS).expect("needs root");
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_PRIVATE | MsFlags::MS_REC,
            None::<&str>,
        )
        .unwrap();
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("secret"), "of the host").unwrap();
        let share = directory.path().join("share");
        fs::create_dir(&share).unwrap();
        mount(
            Some("none"),
            &share,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        mount(
            None::<&str>,
            &share,
            None::<&str>,
            MsFlags::MS_SHARED,
            None::<&str>,
        )
        .unwrap();

        let (server, connection) = server::serve(&share);
        (Self { directory, server }, connection)
    }

    fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    /// The process that serves: the only child of the one that was started.
    fn serving_pid(&self) -> u32 {
        let pid = self.server.id();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
            if let Some(child) = children.split_whitespace().next() {
                return child.parse().unwrap();
            }
            assert!(Instant::now() < deadline, "no serving process");
            std::thread::yield_now();
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = umount2(&self.share(), MntFlags::MNT_DETACH);
    }
}

fn stderr_of(server: &mut Child) -> String {
    use std::io::Read;
    let mut text = String::new();
    server
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(!server.wait().unwrap().success());
    text
}

#[test]
fn files_mounts_and_the_end_are_seen_from_both_sides() {
    let (mut sandbox, connection) = Sandbox::start();
    fs::write(sandbox.share().join("early"), "text").unwrap();
    let mut guest = Driver::new(connection);
    guest.lookup(ROOT, "early").unwrap();

    // A container root that is mounted while the server runs, with a read-only volume in it. Propagation copies a
    // mount's flags when it is attached and never again, so it has to be read-only before that.
    let rootfs = sandbox.directory.path().join("rootfs");
    fs::create_dir_all(rootfs.join("volume")).unwrap();
    fs::write(rootfs.join("volume/file"), "unchanged").unwrap();
    let target = sandbox.share().join("c1");
    fs::create_dir(&target).unwrap();
    mount(
        Some(&rootfs),
        &target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let staged = sandbox.directory.path().join("staged");
    fs::create_dir(&staged).unwrap();
    mount(
        Some(&rootfs.join("volume")),
        &staged,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, &staged, None::<&str>, read_only, None::<&str>).unwrap();
    let volume = target.join("volume");
    mount(
        Some(&staged),
        &volume,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();

    let container = guest.lookup(ROOT, "c1").unwrap();
    let inside = guest.lookup(container, "volume").unwrap();
    let file = guest.lookup(inside, "file").unwrap();
    assert_eq!(guest.open(file, libc::O_WRONLY), Err(libc::EROFS));
    assert_eq!(
        guest.request(Op::Mknod, inside, &mknod(libc::S_IFREG | 0o644, 0, "new")),
        Err(libc::EROFS)
    );
    assert_eq!(fs::read(rootfs.join("volume/file")).unwrap(), b"unchanged");

    guest
        .request(
            Op::Mknod,
            container,
            &mknod(libc::S_IFREG | 0o640, 0, "made"),
        )
        .unwrap();
    assert_eq!(
        fs::metadata(rootfs.join("made")).unwrap().mode() & 0o7777,
        0o640
    );

    // The shim takes the mount away while the server still knows inodes in it.
    umount2(&volume, MntFlags::MNT_DETACH).unwrap();
    umount2(&target, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(
        guest
            .lookup(ROOT, "c1")
            .and_then(|c1| guest.lookup(c1, "made")),
        Err(libc::ENOENT)
    );
    umount2(&staged, MntFlags::MNT_DETACH).unwrap();
    drop(guest);
    assert!(
        sandbox.server.wait().unwrap().success(),
        "the end of the connection is an orderly end"
    );
}

#[test]
fn the_server_is_locked_up() {
    let (sandbox, connection) = Sandbox::start();
    let _guest = Driver::new(connection);
    let pid = sandbox.serving_pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().last().unwrap().to_owned()
    };
    // CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, SETGID 6, SETUID 7, SETFCAP 31.
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(field(set), "00000000800000db", "{set}");
    }
    assert_eq!(field("CapInh:"), "0000000000000000");
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        ("1".into(), "2".into())
    );
    assert_eq!(field("NSpid:"), "1");
    for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let theirs = fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(
            theirs,
            fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap(),
            "{namespace}"
        );
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(
        mounts.lines().count(),
        1,
        "only the share is mounted:\n{mounts}"
    );
    assert!(
        mounts.contains(" / / rw,nosuid,nodev") && mounts.contains("master:"),
        "{mounts}"
    );
    let parent = fs::read_to_string(format!("/proc/{}/status", sandbox.server.id())).unwrap();
    assert!(parent.contains("CapEff:\t0000000000000000"), "{parent}");
}

/// Names that climb or are absolute: CVE-2026-47243.
#[test]
fn raw_names_stay_inside_the_share() {
    let (sandbox, connection) = Sandbox::start();
    fs::write(sandbox.share().join("file"), "").unwrap();
    let mut guest = Driver::new(connection);
    let file = guest.lookup(ROOT, "file").unwrap();
    let outside = sandbox.directory.path().to_str().unwrap().to_owned();
    for name in [
        format!("{outside}/new"),
        "../new".into(),
        "../../../../../../../../tmp/new".into(),
    ] {
        let _ = guest.request(Op::Symlink, ROOT, &text(&[&name, "target"]));
        let _ = guest.request(Op::Mknod, ROOT, &mknod(libc::S_IFREG | 0o600, 0, &name));
        let _ = guest.request(
            Op::Link,
            ROOT,
            &[&file.to_le_bytes()[..], &text(&[&name])].concat(),
        );
        let _ = guest.request(
            Op::Rename,
            ROOT,
            &[&ROOT.to_le_bytes()[..], &text(&["file", &name])].concat(),
        );
        let create = [
            &(libc::O_RDWR.cast_unsigned()).to_le_bytes()[..],
            &0o600u32.to_le_bytes(),
            &[0; 8],
        ]
        .concat();
        let _ = guest.request(Op::Create, ROOT, &[create, text(&[&name])].concat());
    }
    for secret in [
        format!("{outside}/secret"),
        "../secret".into(),
        "../../../../../../../../etc/passwd".into(),
    ] {
        assert_eq!(guest.lookup(ROOT, &secret), Err(libc::ENOENT), "{secret}");
    }
    // A link's target is text for the guest's kernel: it resolves it, the server never does.
    guest
        .request(
            Op::Symlink,
            ROOT,
            &text(&["link", &format!("{outside}/secret")]),
        )
        .unwrap();
    let link = guest.lookup(ROOT, "link").unwrap();
    assert!(guest.open(link, libc::O_RDONLY).is_err());

    let mut names: Vec<_> = fs::read_dir(&outside)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["secret", "share"]);
    assert!(!Path::new("/tmp/new").exists());
}

#[test]
fn device_nodes_can_be_neither_made_nor_opened() {
    let (sandbox, connection) = Sandbox::start();
    // An image layer may hold one; the host's /dev/null stands for the host's disk.
    let null = fs::metadata("/dev/null").unwrap().rdev();
    let node = sandbox.share().join("null");
    nix::sys::stat::mknod(
        &node,
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::S_IRWXU,
        null,
    )
    .unwrap();
    let mut guest = Driver::new(connection);
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        assert_eq!(
            guest.request(Op::Mknod, ROOT, &mknod(kind | 0o600, 0x103, "made")),
            Err(libc::EPERM)
        );
    }
    let present = guest.lookup(ROOT, "null").unwrap();
    assert!(guest.open(present, libc::O_RDWR).is_err());
    // What containers and overlayfs in the guest need still works.
    guest
        .request(Op::Mknod, ROOT, &mknod(libc::S_IFIFO | 0o600, 0, "fifo"))
        .unwrap();
    guest
        .request(
            Op::Mknod,
            ROOT,
            &mknod(libc::S_IFCHR | 0o600, 0, "whiteout"),
        )
        .unwrap();
    assert!(
        fs::metadata(sandbox.share().join("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn root_of_a_user_namespace_writes_where_the_mode_forbids_it() {
    let (sandbox, connection) = Sandbox::start();
    // As the root of Fedora's images. The guest's kernel has let its owner in by CAP_DAC_OVERRIDE.
    let (share, owner) = (sandbox.share(), 100_000);
    chown(&share, Some(owner), Some(owner)).unwrap();
    fs::set_permissions(&share, Permissions::from_mode(0o555)).unwrap();
    let mut guest = Driver::new(connection);
    let mkdir = [
        [0o755_u32, 0].map(u32::to_le_bytes).concat(),
        text(&["made"]),
    ]
    .concat();
    guest.request_as(owner, Op::Mkdir, ROOT, &mkdir).unwrap();
    let made = fs::metadata(share.join("made")).unwrap();
    assert_eq!(
        (made.uid(), made.gid(), made.mode() & 0o777),
        (owner, owner, 0o755)
    );
}

#[test]
fn a_request_that_is_no_fuse_ends_the_server_with_one_line() {
    let (mut sandbox, connection) = Sandbox::start();
    let mut guest = Driver::new(connection);
    guest.send(b"short");
    let text = stderr_of(&mut sandbox.server);
    assert!(
        text.starts_with("coffer-fsd: Failed to handle an incoming request")
            && text.lines().count() == 1,
        "{text}"
    );
}

#[test]
fn mistakes_of_the_caller_are_one_clear_line() {
    let directory = tempfile::tempdir().unwrap();
    let listener = || UnixListener::bind(directory.path().join("s")).unwrap();
    let missing = stderr_of(&mut server::spawn(
        &directory.path().join("absent"),
        &listener().into(),
    ));
    assert!(
        missing.contains("absent") && missing.contains("No such file"),
        "{missing}"
    );
    let no_socket = stderr_of(&mut server::spawn(
        directory.path(),
        &fs::File::open("/dev/null").unwrap().into(),
    ));
    assert!(
        no_socket.contains("file descriptor 3 is not a socket"),
        "{no_socket}"
    );
    for text in [missing, no_socket] {
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

fn mknod(mode: u32, device: u32, name: &str) -> Vec<u8> {
    let numbers = [mode, device, 0, 0].map(u32::to_le_bytes).concat();
    [numbers, text(&[name])].concat()
}
