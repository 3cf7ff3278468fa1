//! The mounts with which containerd's snapshotter describes a container's root (`CreateTaskRequest.rootfs`).
//!
//! They are those of mount(8): a bind mount, an overlay, or a file system on a block device or, with the option `loop`, in a
//! file. What only containerd's mount manager can make (`mkfs/…`, `format/…`) it makes itself, since we don't ask it not to.

mod mapped;

use super::loop_device::LoopDevice;
use crate::share::IdMap;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::io;
use std::path::{Component, Path, PathBuf};

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    pub fs_type: String,
    pub source: PathBuf,
    /// A directory below the root, or empty.
    pub target: PathBuf,
    pub options: Vec<String>,
}

/// Why the root could not be mounted; the number is the mount's place in the list.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    #[error("rootfs[{0}]: the mount type {1:?} is not known; known are {types}", types = TYPES.join(", "))]
    Type(usize, String),
    #[error("rootfs[{0}]: the option {1:?} is not supported")]
    Option(usize, String),
    #[error("rootfs[{0}]: the target {1} below the root is not supported")]
    Target(usize, PathBuf),
    #[error("rootfs[{0}]: {1} bytes of options are more than mount(2) takes")]
    TooLong(usize, usize),
    #[error("rootfs[{index}]: can't put {image} behind a loop device")]
    Loop {
        index: usize,
        image: PathBuf,
        source: io::Error,
    },
    #[error("rootfs[{index}]: can't mount {from} as {fs_type} on {target}")]
    Mount {
        index: usize,
        from: PathBuf,
        fs_type: String,
        target: PathBuf,
        source: io::Error,
    },
    #[error("can't make the directory {path}")]
    Directory { path: PathBuf, source: io::Error },
}

impl RootfsError {
    /// Whether the caller asked for something that can't be done, rather than that doing it failed.
    pub fn is_bad_request(&self) -> bool {
        !matches!(
            self,
            Self::Loop { .. } | Self::Mount { .. } | Self::Directory { .. }
        )
    }
}

/// What snapshotters give.
const TYPES: [&str; 9] = [
    "bind", "overlay", "ext4", "xfs", "btrfs", "erofs", "squashfs", "zfs", "tmpfs",
];

/// Options that are flags of mount(2), and whether they set or clear.
const FLAGS: [(&str, MsFlags, bool); 28] = [
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("mand", MsFlags::MS_MANDLOCK, true),
    ("nomand", MsFlags::MS_MANDLOCK, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("bind", MsFlags::MS_BIND, true),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
    ("private", MsFlags::empty(), true),
    ("rprivate", MsFlags::empty(), true),
    ("silent", MsFlags::empty(), true),
    ("loud", MsFlags::empty(), true),
    ("defaults", MsFlags::empty(), true),
];

/// Options that somebody else would have to act on, as containerd's mount manager.
const REFUSED: [&str; 2] = ["X-containerd.", "remount"];

/// mount(2) copies one page of options, with the NUL at their end.
const MAX_DATA: usize = 4095;

/// The options of one mount, parsed.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MsFlags,
    /// What only the file system understands.
    data: Vec<String>,
    /// The source is a file that holds the file system.
    on_loop: bool,
    /// Other owners than on disk.
    owners: Option<IdMap>,
}

/// The error is the option that can't be honoured.
fn parse(options: &[String]) -> Result<Options, String> {
    let mut parsed = Options {
        flags: MsFlags::empty(),
        data: Vec::new(),
        on_loop: false,
        owners: None,
    };
    for option in options {
        if REFUSED.iter().any(|prefix| option.starts_with(prefix)) {
            return Err(option.clone());
        }
        if let Some((name @ ("uidmap" | "gidmap"), list)) = option.split_once('=') {
            let list = mapped::parse(list).ok_or_else(|| option.clone())?;
            let owners = parsed.owners.get_or_insert_default();
            if name == "uidmap" {
                owners.uids = list;
            } else {
                owners.gids = list;
            }
            continue;
        }
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, flag, set)) => parsed.flags.set(*flag, *set),
            None if option == "loop" => parsed.on_loop = true,
            None => parsed.data.push(option.clone()),
        }
    }
    Ok(parsed)
}

/// Mounts all of them on `target`, in order.
pub fn mount_all(mounts: &[RootfsMount], target: &Path) -> Result<(), RootfsError> {
    std::fs::create_dir_all(target).map_err(|source| RootfsError::Directory {
        path: target.to_owned(),
        source,
    })?;
    for (index, rootfs) in mounts.iter().enumerate() {
        mount_one(index, rootfs, target)?;
    }
    Ok(())
}

fn mount_one(index: usize, rootfs: &RootfsMount, target: &Path) -> Result<(), RootfsError> {
    let fs_type = rootfs.fs_type.as_str();
    if !TYPES.contains(&fs_type) {
        return Err(RootfsError::Type(index, fs_type.to_owned()));
    }
    if !rootfs.target.as_os_str().is_empty() {
        return Err(RootfsError::Target(index, rootfs.target.clone()));
    }
    let options = parse(&rootfs.options).map_err(|option| RootfsError::Option(index, option))?;
    let device = if options.on_loop {
        let read_only = options.flags.contains(MsFlags::MS_RDONLY);
        let attached = LoopDevice::attach(&rootfs.source, read_only);
        Some(attached.map_err(|source| RootfsError::Loop {
            index,
            image: rootfs.source.clone(),
            source,
        })?)
    } else {
        None
    };
    let from = device
        .as_ref()
        .map_or(rootfs.source.as_path(), |device| &device.path);
    let (base, data) = fit(&options.data);
    if data.len() > MAX_DATA {
        return Err(RootfsError::TooLong(index, data.len()));
    }
    let mounted = match &options.owners {
        Some(owners) => mapped::mount_on(from, target, fs_type, &options, owners),
        None => mount_in(base.as_deref(), || {
            do_mount(from, target, fs_type, options.flags, &data)
        }),
    };
    mounted.map_err(|source| RootfsError::Mount {
        index,
        from: rootfs.source.clone(),
        fs_type: fs_type.to_owned(),
        target: target.to_owned(),
        source,
    })
}

fn do_mount(
    from: &Path,
    target: &Path,
    fs_type: &str,
    flags: MsFlags,
    data: &str,
) -> io::Result<()> {
    mount(Some(from), target, Some(fs_type), flags, Some(data))?;
    if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        // mount(2) takes read-only of a bind mount only in a second call.
        let again = flags | MsFlags::MS_REMOUNT;
        mount(Some(from), target, None::<&str>, again, None::<&str>)?;
    }
    Ok(())
}

/// The options as mount(2) gets them. An overlay of many layers has more than fit; then its layers are named relative to the
/// directory they are all in, which the caller of mount(2) has to be in.
fn fit(data: &[String]) -> (Option<PathBuf>, String) {
    let whole = data.join(",");
    if whole.len() <= MAX_DATA {
        return (None, whole);
    }
    let Some((place, layers)) = data
        .iter()
        .enumerate()
        .find_map(|(i, option)| Some((i, option.strip_prefix("lowerdir=")?)))
    else {
        return (None, whole);
    };
    let layers: Vec<&Path> = layers.split(':').map(Path::new).collect();
    let base = common_directory(&layers);
    let relative: Option<Vec<&str>> = layers
        .iter()
        .map(|layer| layer.strip_prefix(&base).ok()?.to_str())
        .collect();
    let Some(relative) = relative else {
        return (None, whole);
    };
    let mut shorter = data.to_vec();
    shorter[place] = format!("lowerdir={}", relative.join(":"));
    (Some(base), shorter.join(","))
}

/// The deepest directory above all of them.
fn common_directory(paths: &[&Path]) -> PathBuf {
    let mut common: Vec<Component<'_>> = paths
        .first()
        .and_then(|path| path.parent())
        .map(|parent| parent.components().collect())
        .unwrap_or_default();
    for path in paths {
        let same = common
            .iter()
            .zip(path.parent().unwrap_or(path).components())
            .take_while(|(a, b)| **a == *b)
            .count();
        common.truncate(same);
    }
    common.iter().collect()
}

/// Runs a mount in a directory, on a thread that has a working directory of its own.
fn mount_in(
    directory: Option<&Path>,
    mount: impl FnOnce() -> io::Result<()> + Send,
) -> io::Result<()> {
    let Some(directory) = directory else {
        return mount();
    };
    let inside = || {
        unshare(CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(directory)?;
        mount()
    };
    std::thread::scope(|scope| {
        let done = scope.spawn(inside).join();
        done.unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    fn words(options: &[&str]) -> Vec<String> {
        options.iter().map(|option| (*option).to_owned()).collect()
    }

    fn of(fs_type: &str, source: &Path, options: &[&str]) -> RootfsMount {
        RootfsMount {
            fs_type: fs_type.into(),
            source: source.into(),
            target: PathBuf::new(),
            options: words(options),
        }
    }

    #[test]
    fn options_are_flags_or_data() {
        let parsed = parse(&words(&[
            "rbind",
            "ro",
            "lowerdir=/a:/b",
            "index=off",
            "rw",
            "loop",
        ]))
        .unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(parsed.data, words(&["lowerdir=/a:/b", "index=off"]));
        assert!(parsed.on_loop);
    }

    #[test]
    fn what_can_not_be_mounted_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = |rootfs: RootfsMount| {
            let error = mount_all(&[rootfs], dir.path()).unwrap_err();
            assert!(error.is_bad_request());
            error.to_string()
        };
        assert!(error(of("fuse.nydus-overlayfs", dir.path(), &[])).contains("nydus"));
        assert!(error(of("format/mkdir/overlay", dir.path(), &[])).contains("format/mkdir"));
        let verity = of("erofs", dir.path(), &["X-containerd.dmverity=x"]);
        assert!(error(verity).contains("X-containerd.dmverity=x"));
        let below = RootfsMount {
            target: "sub".into(),
            ..of("bind", dir.path(), &["bind"])
        };
        assert!(error(below).contains("sub"));
        let missing = mount_all(&[of("ext4", "/no/image".as_ref(), &["loop"])], dir.path());
        assert!(missing.unwrap_err().to_string().contains("/no/image"));
    }

    #[test]
    fn a_read_only_bind_mount_refuses_writes_and_goes_again() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir(&source).unwrap();
        fs::write(source.join("f"), "x").unwrap();
        mount_all(&[of("bind", &source, &["rbind", "ro"])], &target).unwrap();
        assert_eq!(fs::read(target.join("f")).unwrap(), b"x");
        assert_eq!(
            fs::write(target.join("g"), "").unwrap_err().raw_os_error(),
            Some(libc::EROFS)
        );
        crate::cleanup::unmount(&target).unwrap();
        assert!(!target.join("f").exists());
    }

    #[test]
    fn an_overlay_of_more_layers_than_fit_into_a_page_is_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = dir
            .path()
            .join("a-long-name-as-containerd-has-them/snapshots");
        let layers: Vec<String> = (0..120)
            .map(|i| snapshots.join(format!("{i}/fs")).display().to_string())
            .collect();
        for (i, layer) in layers.iter().enumerate() {
            fs::create_dir_all(layer).unwrap();
            fs::write(Path::new(layer).join(format!("file{i}")), "x").unwrap();
        }
        let [upper, work, target] = ["upper", "work", "target"].map(|name| dir.path().join(name));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let options = [
            format!("lowerdir={}", layers.join(":")),
            format!("upperdir={}", upper.display()),
            format!("workdir={}", work.display()),
        ];
        assert!(options[0].len() > MAX_DATA);
        let options = options.each_ref().map(String::as_str);
        let before = std::env::current_dir().unwrap();
        mount_all(&[of("overlay", "overlay".as_ref(), &options)], &target).unwrap();
        assert_eq!(std::env::current_dir().unwrap(), before);
        assert!(target.join("file0").exists() && target.join("file119").exists());
        crate::cleanup::unmount(&target).unwrap();
    }

    #[test]
    fn layers_are_named_relative_to_their_common_directory_only_when_they_must_be() {
        let short = words(&["lowerdir=/s/1/fs:/s/2/fs", "index=off"]);
        assert_eq!(fit(&short), (None, short.join(",")));
        let paths = ["/s/x/1/fs", "/s/x/2/fs", "/s/x/3/deeper/fs"].map(Path::new);
        assert_eq!(common_directory(&paths), Path::new("/s/x"));
        let none = ["/a/1", "/b/2"].map(Path::new);
        assert_eq!(common_directory(&none), Path::new("/"));
    }

    #[test]
    fn an_image_in_a_file_is_mounted_over_a_loop_device_which_goes_with_the_mount() {
        let dir = tempfile::tempdir().unwrap();
        let (image, content, target) = (
            dir.path().join("image"),
            dir.path().join("content"),
            dir.path().join("target"),
        );
        fs::create_dir(&content).unwrap();
        fs::write(content.join("f"), "x").unwrap();
        fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-d"])
            .args([&content, &image])
            .status();
        assert!(made.unwrap().success());
        mount_all(&[of("ext4", &image, &["loop", "ro"])], &target).unwrap();
        assert_eq!(fs::read(target.join("f")).unwrap(), b"x");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let device = mounts
            .lines()
            .find(|line| line.contains(target.to_str().unwrap()))
            .and_then(|line| {
                line.split_whitespace()
                    .find(|word| word.starts_with("/dev/loop"))
            })
            .unwrap()
            .to_owned();
        crate::cleanup::unmount(&target).unwrap();
        let name = device.rsplit('/').next().unwrap();
        let backing = PathBuf::from(format!("/sys/block/{name}/loop/backing_file"));
        let gone = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            // Another test may have taken the device.
            fs::read_to_string(&backing).map_or(true, |file| file.trim() != image.to_str().unwrap())
        });
        assert!(gone, "{device} still holds the image");
    }
}
