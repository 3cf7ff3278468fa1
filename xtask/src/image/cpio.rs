//! cpio archives in the "newc" format, as the kernel unpacks them into its root file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Each entry is a header of thirteen 8-digit hexadecimal fields after the magic number, then the name with its NUL,
//! then the data; name and data are padded to 4 bytes. Times and owners are zero: the same input gives the same bytes.

use anyhow::{Context, Result};

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

#[derive(Debug, Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    /// Inode numbers tell hard links apart; every entry has its own.
    last_inode: u32,
}

impl Cpio {
    pub fn directory(&mut self, name: &str, permissions: u32) {
        self.entry(name, DIRECTORY | permissions, (0, 0), 0);
    }

    /// `device` is major and minor number.
    pub fn character_device(&mut self, name: &str, permissions: u32, device: (u32, u32)) {
        self.entry(name, CHARACTER_DEVICE | permissions, device, 0);
    }

    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> Result<()> {
        let size =
            u32::try_from(data.len()).with_context(|| format!("{name} is too large for cpio"))?;
        self.entry(name, REGULAR | permissions, (0, 0), size);
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// The archive, closed by its trailer.
    pub fn finish(mut self) -> Vec<u8> {
        self.last_inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), 0);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), size: u32) {
        self.last_inode += 1;
        let name_bytes = name.len() + 1;
        let (major, minor) = device;
        let inode = self.last_inode;
        let (user, group, links, time, check) = (0, 0, 1, 0, 0);
        let (on_major, on_minor) = (0, 0);
        let header = format!(
            "070701{inode:08x}{mode:08x}{user:08x}{group:08x}{links:08x}{time:08x}{size:08x}\
             {on_major:08x}{on_minor:08x}{major:08x}{minor:08x}{name_bytes:08x}{check:08x}"
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::process::Command;

    use super::*;

    /// The real cpio program lists and unpacks what we write.
    #[test]
    fn cpio_reads_the_archive() {
        let mut archive = Cpio::default();
        archive.directory("dev", 0o755);
        archive.character_device("dev/console", 0o600, (5, 1));
        archive.file("init", 0o755, b"odd").unwrap();
        archive.file("after", 0o644, b"1234").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive");
        fs::write(&path, archive.finish()).unwrap();

        let list = Command::new("cpio")
            .arg("-tvn")
            .stdin(File::open(&path).unwrap())
            .output()
            .unwrap();
        let list = String::from_utf8(list.stdout).unwrap();
        let lines: Vec<_> = list.lines().collect();
        assert_eq!(lines.len(), 4, "{list}");
        assert!(
            lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" dev"),
            "{list}"
        );
        assert!(
            lines[1].starts_with("crw-------") && lines[1].contains("5,   1"),
            "{list}"
        );
        assert!(
            lines[2].starts_with("-rwxr-xr-x") && lines[2].ends_with(" init"),
            "{list}"
        );

        let unpack = Command::new("cpio")
            .args(["-i", "init", "after"])
            .current_dir(dir.path())
            .stdin(File::open(&path).unwrap())
            .status()
            .unwrap();
        assert!(unpack.success());
        assert_eq!(fs::read(dir.path().join("init")).unwrap(), b"odd");
        assert_eq!(fs::read(dir.path().join("after")).unwrap(), b"1234");
    }
}
