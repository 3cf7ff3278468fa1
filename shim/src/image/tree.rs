//! Applies layers to a directory, as the OCI image specification's "Applying Changesets" says.
//!
//! Names in a layer are hostile. Each is brought into the form `directory/name` first: the directory is opened by the
//! kernel inside the root ([`Root`]), and then only single names are used, relative to that open directory and never
//! following a link. A name with `..` is refused.
//!
//! Whiteouts take away what *lower* layers brought: `.wh.NAME` the one entry, `.wh..wh..opq` all entries of its
//! directory, wherever in the layer it stands. What the layer itself made is known by inode.

use super::archive::{Member, TarReader};
use super::root::Root;
use super::{MAX_ENTRIES, MAX_UNPACKED_BYTES};
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, fstatat, futimens,
    makedev, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{
    Gid, LinkatFlags, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat,
};
use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use tar::EntryType;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Directories inside one another. Deeper trees could exhaust the stack or file descriptors of what walks them.
const MAX_DEPTH: usize = 128;

/// Why a layer can't be applied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("it is not a valid tar")]
    Tar { source: io::Error },
    #[error("its entry {path:?} {reason}")]
    Refused { path: PathBuf, reason: &'static str },
    #[error("writing its entry {path:?} failed")]
    Write { path: PathBuf, source: io::Error },
    #[error("it was stopped")]
    Stopped,
    #[error("it brings the image to more than {MAX_ENTRIES} entries")]
    TooManyEntries,
    #[error("it brings the image to more than {} GiB", MAX_UNPACKED_BYTES >> 30)]
    TooLarge,
}

/// A directory to which layers are applied.
#[derive(Debug)]
pub(super) struct Tree {
    root: Root,
    entries: u64,
    bytes: u64,
}

/// What is known of the layer being applied.
#[derive(Default)]
struct Applied {
    /// Device and inode of all it brought.
    inodes: HashSet<(u64, u64)>,
    /// Times of directories; set last, since every new entry changes them.
    directory_times: Vec<(PathBuf, TimeSpec)>,
}

impl Applied {
    fn note(&mut self, stat: &FileStat) {
        self.inodes.insert((stat.st_dev, stat.st_ino));
    }

    fn brought(&self, stat: &FileStat) -> bool {
        self.inodes.contains(&(stat.st_dev, stat.st_ino))
    }
}

/// An entry's place: an open directory and one name in it.
struct Place {
    directory: OwnedFd,
    name: CString,
}

impl Tree {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            root: Root::open(path)?,
            entries: 0,
            bytes: 0,
        })
    }

    /// Applies one layer; ends before the next entry when `stop` becomes true.
    pub(super) fn apply(&mut self, layer: impl Read, stop: &AtomicBool) -> Result<(), Error> {
        let mut reader = TarReader::new(layer);
        let mut applied = Applied::default();
        while let Some(member) = reader.next().map_err(|source| Error::Tar { source })? {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped);
            }
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(Error::TooManyEntries);
            }
            self.bytes += member.size;
            if self.bytes > MAX_UNPACKED_BYTES {
                return Err(Error::TooLarge);
            }
            self.apply_member(&member, &mut reader, &mut applied)?;
        }
        for (path, time) in applied.directory_times.iter().rev() {
            let set = self
                .root
                .directory(path)
                .and_then(|directory| futimens(directory, time, time));
            // A later entry of the layer may have replaced the directory.
            if let Err(error) = set
                && !matches!(error, nix::Error::ENOENT | nix::Error::ENOTDIR)
            {
                return Err(Error::Write {
                    path: path.clone(),
                    source: error.into(),
                });
            }
        }
        Ok(())
    }

    fn apply_member(
        &self,
        member: &Member,
        contents: &mut impl Read,
        applied: &mut Applied,
    ) -> Result<(), Error> {
        let path = safe_path(&member.path)?;
        let failed = |source: io::Error| Error::Write {
            path: path.clone(),
            source,
        };
        let Some(name) = path.file_name() else {
            // The entry for the root directory itself.
            let directory = self
                .root
                .directory(Path::new(""))
                .map_err(|error| failed(error.into()))?;
            applied.directory_times.push((path.clone(), time(member)));
            return describe(&directory, member).map_err(failed);
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        let directory = self
            .root
            .make_directory(parent)
            .map_err(|error| failed(error.into()))?;
        if name.as_bytes() == OPAQUE {
            return remove_lower(&directory, applied, 0).map_err(failed);
        }
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") || hidden.starts_with(WHITEOUT) {
                return Err(Error::Refused {
                    path,
                    reason: "is no valid whiteout",
                });
            }
            let place = Place {
                directory,
                name: c_name(OsStr::from_bytes(hidden)),
            };
            return remove_unless_brought(&place, applied).map_err(failed);
        }
        let place = Place {
            directory,
            name: c_name(name),
        };
        match member.kind {
            EntryType::Directory => applied.directory_times.push((path.clone(), time(member))),
            EntryType::Link => return self.hard_link(member, &place, applied).map_err(failed),
            EntryType::Regular
            | EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Fifo => {}
            _ => {
                return Err(Error::Refused {
                    path,
                    reason: "is of a kind that is not supported",
                });
            }
        }
        create(member, contents, &place).map_err(failed)?;
        let stat = place.stat().map_err(|error| failed(error.into()))?;
        applied.note(&stat);
        Ok(())
    }

    fn hard_link(&self, member: &Member, place: &Place, applied: &mut Applied) -> io::Result<()> {
        let target = safe_path(&member.link).map_err(io::Error::other)?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(io::Error::other("a hard link to the root directory"));
        };
        let directory = self.root.directory(parent)?;
        let name = c_name(name);
        let target = fstatat(&directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if place
            .stat()
            .is_ok_and(|own| (own.st_dev, own.st_ino) == (target.st_dev, target.st_ino))
        {
            return Ok(());
        }
        place.clear()?;
        linkat(
            &directory,
            name.as_c_str(),
            &place.directory,
            place.name.as_c_str(),
            LinkatFlags::empty(),
        )?;
        applied.note(&target);
        Ok(())
    }
}

impl Place {
    fn stat(&self) -> nix::Result<FileStat> {
        fstatat(
            &self.directory,
            self.name.as_c_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
    }

    /// Removes what is there, whatever it is.
    fn clear(&self) -> io::Result<()> {
        match self.stat() {
            Err(nix::Error::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(stat) if is_directory(&stat) => {
                remove_lower(&self.open_directory()?, &Applied::default(), 0)?;
                Ok(unlinkat(
                    &self.directory,
                    self.name.as_c_str(),
                    UnlinkatFlags::RemoveDir,
                )?)
            }
            Ok(_) => Ok(unlinkat(
                &self.directory,
                self.name.as_c_str(),
                UnlinkatFlags::NoRemoveDir,
            )?),
        }
    }

    fn open_directory(&self) -> nix::Result<OwnedFd> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        openat(&self.directory, self.name.as_c_str(), flags, Mode::empty())
    }
}

/// The entry's path relative to the root, of plain names only. A leading `/` means the root, as everywhere else.
fn safe_path(path: &Path) -> Result<PathBuf, Error> {
    let refuse = |reason| {
        Err(Error::Refused {
            path: path.into(),
            reason,
        })
    };
    if path.as_os_str().as_bytes().contains(&0) {
        return refuse("contains a NUL");
    }
    let mut safe = PathBuf::new();
    for (depth, component) in path.components().enumerate() {
        match component {
            Component::Normal(name) => safe.push(name),
            Component::ParentDir => return refuse("leads out of the image with \"..\""),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
        if depth >= MAX_DEPTH {
            return refuse("is nested too deep");
        }
    }
    Ok(safe)
}

fn c_name(name: &OsStr) -> CString {
    CString::new(name.as_bytes()).expect("safe_path refused NUL")
}

fn is_directory(stat: &FileStat) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits()
}

fn time(member: &Member) -> TimeSpec {
    TimeSpec::new(member.mtime.0, member.mtime.1)
}

/// Makes one entry, replacing what lower layers had there. Only a directory keeps what it has.
fn create(member: &Member, contents: &mut impl Read, place: &Place) -> io::Result<()> {
    let Place { directory, name } = place;
    let name = name.as_c_str();
    let private = Mode::from_bits_truncate(0o600);
    if member.kind == EntryType::Directory {
        if !place.stat().is_ok_and(|stat| is_directory(&stat)) {
            place.clear()?;
            mkdirat(directory, name, Mode::from_bits_truncate(0o700))?;
        }
        return describe(&place.open_directory()?, member);
    }
    place.clear()?;
    match member.kind {
        EntryType::Regular => {
            let flags = OFlag::O_CREAT
                | OFlag::O_EXCL
                | OFlag::O_NOFOLLOW
                | OFlag::O_WRONLY
                | OFlag::O_CLOEXEC;
            let mut file = File::from(openat(directory, name, flags, private)?);
            io::copy(contents, &mut file)?;
            let file = OwnedFd::from(file);
            describe(&file, member)?;
            return Ok(futimens(&file, &time(member), &time(member))?);
        }
        EntryType::Symlink => symlinkat(member.link.as_path(), directory, name)?,
        EntryType::Fifo => mknodat(directory, name, SFlag::S_IFIFO, private, 0)?,
        kind => {
            let kind = if kind == EntryType::Char {
                SFlag::S_IFCHR
            } else {
                SFlag::S_IFBLK
            };
            mknodat(
                directory,
                name,
                kind,
                private,
                makedev(member.device.0.into(), member.device.1.into()),
            )?;
        }
    }
    let (uid, gid) = (Uid::from_raw(member.uid), Gid::from_raw(member.gid));
    fchownat(
        directory,
        name,
        Some(uid),
        Some(gid),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    if member.kind != EntryType::Symlink {
        fchmodat(
            directory,
            name,
            Mode::from_bits_truncate(member.mode),
            FchmodatFlags::FollowSymlink,
        )?;
    }
    Ok(utimensat(
        directory,
        name,
        &time(member),
        &time(member),
        UtimensatFlags::NoFollowSymlink,
    )?)
}

/// Owner before mode before attributes: chown takes setuid bits and capabilities away.
fn describe(file: &OwnedFd, member: &Member) -> io::Result<()> {
    fchown(
        file,
        Some(Uid::from_raw(member.uid)),
        Some(Gid::from_raw(member.gid)),
    )?;
    fchmod(file, Mode::from_bits_truncate(member.mode))?;
    for (name, value) in &member.xattrs {
        // Others (trusted.overlay.*, security.selinux) would act on the host.
        if name == "security.capability" || name.as_bytes().starts_with(b"user.") {
            set_xattr(file, &c_xattr(name)?, value)?;
        }
    }
    Ok(())
}

fn c_xattr(name: &OsStr) -> io::Result<CString> {
    Ok(CString::new(name.as_bytes())?)
}

#[allow(unsafe_code)]
fn set_xattr(file: &OwnedFd, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: both pointers are valid for the given lengths during the call, which keeps none of them.
    let result = unsafe {
        libc::fsetxattr(
            file.as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    match nix::Error::result(result) {
        Ok(_) => Ok(()),
        // tmpfs has no user attributes before Linux 6.6; programs treat them as optional everywhere.
        Err(nix::Error::EOPNOTSUPP) if name.to_bytes().starts_with(b"user.") => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes all entries of a directory that this layer did not bring, with all below them.
fn remove_lower(directory: &OwnedFd, applied: &Applied, depth: usize) -> io::Result<()> {
    if depth > 4 * MAX_DEPTH {
        return Err(io::Error::other("the directories are nested too deep"));
    }
    let mut names = Vec::new();
    for entry in Dir::from_fd(directory.try_clone()?)?.iter() {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    for name in names {
        let place = Place {
            directory: directory.try_clone()?,
            name,
        };
        let stat = place.stat()?;
        if is_directory(&stat) {
            remove_lower(&place.open_directory()?, applied, depth + 1)?;
        }
        if !applied.brought(&stat) {
            match unlink(&place, &stat) {
                // It still holds something of this layer.
                Err(nix::Error::ENOTEMPTY) => {}
                result => result?,
            }
        }
    }
    Ok(())
}

fn remove_unless_brought(place: &Place, applied: &Applied) -> io::Result<()> {
    match place.stat() {
        Err(nix::Error::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(stat) if applied.brought(&stat) => Ok(()),
        Ok(_) => place.clear(),
    }
}

fn unlink(place: &Place, stat: &FileStat) -> nix::Result<()> {
    let flag = if is_directory(stat) {
        UnlinkatFlags::RemoveDir
    } else {
        UnlinkatFlags::NoRemoveDir
    };
    unlinkat(place.directory.as_fd(), place.name.as_c_str(), flag)
}
