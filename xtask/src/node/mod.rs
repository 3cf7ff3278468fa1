//! The test node: a Linux machine with a real /dev/kvm for machines that have none.
//!
//! It is QEMU with software emulation (TCG) of an AMD CPU with SVM, so that KVM works inside it, slowly. Booting it takes
//! ten seconds and more; therefore it is booted once, its state is saved when it waits for a command, and every command
//! runs in a fresh copy restored from that state.
//!
//! Disks (all virtio-blk, as 9p and vhost-user devices can't be saved):
//!
//! | disk | content | mounted at |
//! |---|---|---|
//! | vda | the node's root, EROFS under a tmpfs overlay | / |
//! | vdb | test assets, EROFS | /assets |
//! | vdc | the directory shared with this command, EROFS | /coffer |
//! | vdd | fresh, sparse ext4 | /scratch |

mod kernel;
mod machine;
mod output;
mod root;

use std::ffi::OsString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::cache::Key;
use crate::node::machine::{Disks, Machine};
use crate::process;
use crate::project::Project;
use crate::{assets, step};

/// Where a node sees the shared directory and the test assets.
pub const SHARE: &str = "/coffer";
pub const ASSETS: &str = "/assets";

/// Size of the share's disk; the saved state fixes it.
const SHARE_BYTES: u64 = 2 << 30;
/// Size of the scratch disk; sparse, so it costs what a test writes.
const SCRATCH_BYTES: u64 = 16 << 30;

/// A saved node, ready to be restored any number of times.
#[derive(Debug)]
pub struct Node {
    files: Files,
    state: PathBuf,
}

/// What a node boots from; the same for all commands.
#[derive(Debug)]
struct Files {
    vmlinuz: PathBuf,
    initrd: PathBuf,
    root: PathBuf,
    assets: PathBuf,
}

impl Node {
    /// The saved node, from the cache or made.
    pub fn get(project: &Project) -> Result<Self> {
        let assets = assets_disk(project)?;
        let root = root::get(project)?;
        let key = Key::default()
            .add("root", path_bytes(&root))
            .add("assets", path_bytes(&assets))
            .add(
                "qemu",
                process::output(Command::new(machine::QEMU).arg("--version"))?,
            )
            .add("machine", machine::identity());
        let files = Files {
            vmlinuz: root.join("vmlinuz"),
            initrd: root.join("initrd"),
            root: root.join("root.erofs"),
            assets,
        };
        let what = "boot the test node and save its state (about 30 s)";
        let entry = project.cache.get("node-state", &key, what, |dir| {
            let (share, scratch) = (UnnamedFile::new(SHARE_BYTES)?, scratch()?);
            let disks = Disks {
                share: share.path(),
                scratch: scratch.path(),
            };
            let sockets = tempfile::tempdir()?;
            let monitor = sockets.path().join("qmp");
            Machine::boot(&files, &disks, &monitor)?.save(&monitor, &dir.join("state"))
        })?;
        Ok(Self {
            files,
            state: entry.join("state"),
        })
    }

    /// Runs a command in a fresh copy of the node, its output going to ours; returns its exit status.
    pub fn run(
        &self,
        share: Option<&Path>,
        command: &[OsString],
        environment: &[(OsString, OsString)],
    ) -> Result<u8> {
        ensure!(!command.is_empty(), "no command for the node");
        let (blank, scratch) = (UnnamedFile::new(SHARE_BYTES)?, scratch()?);
        let disks = Disks {
            share: share.map_or_else(|| blank.path(), Path::to_path_buf),
            scratch: scratch.path(),
        };
        Machine::restore(&self.files, &disks, &self.state)?.run(&script(command, environment))
    }
}

/// A file that goes when this process does, however it ends.
#[derive(Debug)]
struct UnnamedFile(fs::File);

impl UnnamedFile {
    /// A sparse file of that size; on disk, not in a tmpfs, as a test may write gigabytes.
    fn new(size: u64) -> Result<Self> {
        let file = tempfile::tempfile_in("/var/tmp").context("make a file in /var/tmp")?;
        file.set_len(size)?;
        Ok(Self(file))
    }

    /// A name for programs that we start, while we live.
    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}

/// Makes the disk image with which a directory's content gets into a node.
pub fn share_disk(directory: &Path, image: &Path) -> Result<()> {
    step::step("put the node's inputs into a disk image", || {
        erofs(directory, image)?;
        let size = fs::metadata(image)?.len();
        ensure!(
            size <= SHARE_BYTES,
            "{} is too large for the node: {size} bytes",
            directory.display()
        );
        Ok(fs::OpenOptions::new()
            .write(true)
            .open(image)?
            .set_len(SHARE_BYTES)?)
    })
}

/// An uncompressed EROFS image of a directory, with the files' owners.
fn erofs(directory: &Path, image: &Path) -> Result<()> {
    // An image that is there would be written over, not replaced.
    if image.exists() {
        fs::remove_file(image)?;
    }
    process::run(
        Command::new("mkfs.erofs")
            .args(["--quiet", "-T0"])
            .arg(image)
            .arg(directory),
    )
}

fn assets_disk(project: &Project) -> Result<PathBuf> {
    let assets = assets::get(project)?;
    let key = Key::default().add("assets", path_bytes(&assets));
    let entry = project.cache.get(
        "assets-disk",
        &key,
        "put the test assets into a disk image",
        |dir| erofs(&assets, &dir.join("assets.erofs")),
    )?;
    Ok(entry.join("assets.erofs"))
}

/// An empty file system; without a journal, as its machine never boots again.
fn scratch() -> Result<UnnamedFile> {
    let disk = UnnamedFile::new(SCRATCH_BYTES)?;
    let options = [
        "-q",
        "-F",
        "-O",
        "^has_journal",
        "-E",
        "lazy_itable_init=1,nodiscard",
    ];
    process::run(Command::new("mkfs.ext4").args(options).arg(disk.path()))?;
    Ok(disk)
}

/// A cache entry's path names all of its inputs.
fn path_bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// The shell script that the node runs.
fn script(command: &[OsString], environment: &[(OsString, OsString)]) -> Vec<u8> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let mut script = format!("date -s @{now} > /dev/null\n").into_bytes();
    for (name, value) in environment {
        script.extend_from_slice(b"export ");
        script.extend_from_slice(name.as_bytes());
        script.push(b'=');
        quote(value.as_bytes(), &mut script);
        script.push(b'\n');
    }
    script.extend_from_slice(b"exec");
    for word in command {
        script.push(b' ');
        quote(word.as_bytes(), &mut script);
    }
    script.push(b'\n');
    script
}

/// One word for a POSIX shell, whatever bytes it has.
fn quote(word: &[u8], script: &mut Vec<u8>) {
    script.push(b'\'');
    for byte in word {
        match byte {
            b'\'' => script.extend_from_slice(br"'\''"),
            byte => script.push(*byte),
        }
    }
    script.push(b'\'');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        let word = "it's \"a\" $word\nwith `all` \\ of * it";
        let script = script(
            &["printf".into(), "%s".into(), word.into()],
            &[("NAME".into(), "a'b".into())],
        );
        let script = [b"date() { :; }\n", script.as_slice()].concat();
        let output = Command::new("sh")
            .arg("-c")
            .arg(std::ffi::OsStr::from_bytes(&script))
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
    }
}
