//! Where the files of an image are: a directory, or a tar file read in place.
//!
//! A tar is indexed once (header by header, seeking over the contents) and its members are then read at their
//! offset; nothing is copied. Members of docker archives may be links to other members.

use super::Error;
use super::archive::TarReader;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tar::EntryType;

/// Most members of an image's tar: its documents and layers.
const MAX_MEMBERS: usize = 65_536;
/// Links from member to member that are followed.
const MAX_LINKS: usize = 8;

/// The files of one image.
#[derive(Debug)]
pub(super) enum Source {
    /// A directory; every file is opened beneath it.
    Directory { root: OwnedFd },
    /// A tar file and the place of each member.
    Archive {
        file: Arc<File>,
        members: HashMap<PathBuf, Member>,
    },
}

/// One member of the tar.
#[derive(Debug)]
pub(super) enum Member {
    File { offset: u64, size: u64 },
    Link(PathBuf),
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let fd = open(
            path,
            OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK,
            Mode::empty(),
        )
        .map_err(|error| Error::Read {
            name: path.display().to_string(),
            source: error.into(),
        })?;
        let file = File::from(fd);
        let read = |source| Error::Read {
            name: path.display().to_string(),
            source,
        };
        let kind = file.metadata().map_err(read)?.file_type();
        if kind.is_dir() {
            return Ok(Self::Directory { root: file.into() });
        }
        if !kind.is_file() {
            return Err(Error::NoImage {
                path: path.into(),
                reason: "it is neither a directory nor a file",
            });
        }
        refuse_other_formats(path, &file)?;
        let members = index_members(&file).map_err(read)?;
        Ok(Self::Archive {
            file: Arc::new(file),
            members,
        })
    }

    /// Opens a file of the image by its relative name; None where there is no such file.
    pub(super) fn file(&self, name: &str) -> Result<Option<Section>, Error> {
        let section = match self {
            Self::Directory { root } => open_beneath(root, name),
            Self::Archive { file, members } => find_member(members, name).map(|place| {
                place.map(|(offset, size)| Section {
                    file: file.clone(),
                    position: offset,
                    end: offset + size,
                })
            }),
        };
        section.map_err(|source| Error::Read {
            name: name.into(),
            source,
        })
    }

    /// As [`Self::file`], for one that has to be there.
    pub(super) fn required(&self, name: &str) -> Result<Section, Error> {
        self.file(name)?
            .ok_or_else(|| Error::NoFile { name: name.into() })
    }
}

/// A part of an open file, read with its own position.
#[derive(Debug)]
pub(super) struct Section {
    file: Arc<File>,
    position: u64,
    end: u64,
}

impl Section {
    pub(super) fn size(&self) -> u64 {
        self.end - self.position
    }
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.size())
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let read = self.file.read_at(&mut buffer[..room], self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

/// Compressed archives and disk images would only give an obscure tar error.
fn refuse_other_formats(path: &Path, file: &File) -> Result<(), Error> {
    let mut magic = [0; 4];
    let read = file.read_at(&mut magic, 0).map_err(|source| Error::Read {
        name: path.display().to_string(),
        source,
    })?;
    let reason = match magic {
        _ if read < magic.len() => "the file is empty or cut off",
        [0x1f, 0x8b, ..] => "the tar is compressed; run gunzip first",
        [0x28, 0xb5, 0x2f, 0xfd] => "the tar is compressed; run unzstd first",
        [0xfd, b'7', b'z', b'X'] => "the tar is compressed; run unxz first",
        [b'B', b'Z', b'h', _] => "the tar is compressed; run bunzip2 first",
        _ => return Ok(()),
    };
    Err(Error::NoImage {
        path: path.into(),
        reason,
    })
}

fn open_beneath(root: &OwnedFd, name: &str) -> io::Result<Option<Section>> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = match openat2(root, name, how) {
        Ok(fd) => File::from(fd),
        Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    Ok(Some(Section {
        file: Arc::new(file),
        position: 0,
        end: metadata.len(),
    }))
}

fn index_members(file: &File) -> io::Result<HashMap<PathBuf, Member>> {
    let mut archive = TarReader::seeking(file);
    let mut members = HashMap::new();
    while let Some(member) = archive.next()? {
        if members.len() == MAX_MEMBERS {
            return Err(io::Error::other(format!(
                "the tar has more than {MAX_MEMBERS} members"
            )));
        }
        let name = plain(&member.path);
        let base = name.parent().unwrap_or(Path::new(""));
        let place = match member.kind {
            EntryType::Regular => Member::File {
                offset: archive.position(),
                size: member.size,
            },
            // A symbolic link starts at its own directory, a hard link at the top of the archive.
            EntryType::Symlink => Member::Link(plain(&base.join(member.link))),
            EntryType::Link => Member::Link(plain(&member.link)),
            _ => continue,
        };
        members.insert(name, place);
    }
    Ok(members)
}

/// A member name without `.`, `..` and a leading `/`; it is only ever looked up in the index.
fn plain(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => plain.push(part),
            Component::ParentDir => _ = plain.pop(),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    plain
}

fn find_member(members: &HashMap<PathBuf, Member>, name: &str) -> io::Result<Option<(u64, u64)>> {
    let mut name = plain(Path::new(name));
    for _ in 0..=MAX_LINKS {
        match members.get(&name) {
            None => return Ok(None),
            Some(Member::File { offset, size }) => return Ok(Some((*offset, *size))),
            Some(Member::Link(target)) => name.clone_from(target),
        }
    }
    Err(io::Error::other(format!("more than {MAX_LINKS} links")))
}
