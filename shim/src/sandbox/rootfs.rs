//! The mounts with which containerd's snapshotter describes a container's root (`CreateTaskRequest.rootfs`).

use nix::mount::{MsFlags, mount};
use std::io;
use std::path::{Path, PathBuf};

/// One of them, as in mount(8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    pub fs_type: String,
    pub source: PathBuf,
    pub options: Vec<String>,
}

/// Options that are flags of mount(2), and whether they set or clear.
const FLAGS: [(&str, MsFlags, bool); 18] = [
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
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("bind", MsFlags::MS_BIND, true),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
    ("defaults", MsFlags::empty(), true),
];

/// Splits options into flags and the file system's own data.
fn parse(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, flag, set)) => flags.set(*flag, *set),
            None => data.push(option.as_str()),
        }
    }
    (flags, data.join(","))
}

/// Mounts all of them on `target`, in order.
pub fn mount_all(mounts: &[RootfsMount], target: &Path) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    for RootfsMount {
        fs_type,
        source,
        options,
    } in mounts
    {
        let (flags, data) = parse(options);
        mount(
            Some(source),
            target,
            Some(fs_type.as_str()),
            flags,
            Some(data.as_str()),
        )?;
        if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
            // mount(2) takes read-only of a bind mount only in a second call.
            mount(
                Some(source),
                target,
                None::<&str>,
                flags | MsFlags::MS_REMOUNT,
                None::<&str>,
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_data() {
        let options = ["rbind", "ro", "lowerdir=/a:/b", "index=off", "rw"].map(str::to_owned);
        let (flags, data) = parse(&options);
        assert_eq!(flags, MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(data, "lowerdir=/a:/b,index=off");
    }

    #[test]
    fn a_read_only_bind_mount_refuses_writes_and_goes_again() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("f"), "x").unwrap();
        let options = vec!["rbind".to_owned(), "ro".to_owned()];
        mount_all(
            &[RootfsMount {
                fs_type: "bind".into(),
                source,
                options,
            }],
            &target,
        )
        .unwrap();
        assert_eq!(std::fs::read(target.join("f")).unwrap(), b"x");
        assert_eq!(
            std::fs::write(target.join("g"), "")
                .unwrap_err()
                .raw_os_error(),
            Some(libc::EROFS)
        );
        crate::cleanup::unmount(&target).unwrap();
        assert!(!target.join("f").exists());
    }
}
