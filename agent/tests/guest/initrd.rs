//! An initrd: a cpio archive of the "newc" kind (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

use std::path::Path;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

#[derive(Default)]
pub struct Initrd {
    bytes: Vec<u8>,
    entries: u32,
    directories: std::collections::BTreeSet<String>,
}

impl Initrd {
    /// Adds a file of the host, with the directories above it.
    pub fn add_file(&mut self, host: &Path, guest: &str) -> anyhow::Result<()> {
        self.add_parents(guest);
        self.entry(guest, S_IFREG | 0o755, &std::fs::read(host)?);
        Ok(())
    }

    pub fn add_directory(&mut self, guest: &str) {
        self.add_parents(guest);
        if self.directories.insert(guest.to_owned()) {
            self.entry(guest, S_IFDIR | 0o755, &[]);
        }
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn add_parents(&mut self, guest: &str) {
        if let Some((parent, _)) = guest.trim_start_matches('/').rsplit_once('/') {
            self.add_directory(parent);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        let name = name.trim_start_matches('/');
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("no file here has 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        let links = if mode & S_IFDIR != 0 { 2 } else { 1 };
        // inode, mode, uid, gid, links, mtime, size, device major and minor, own major and minor, name size, checksum
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
