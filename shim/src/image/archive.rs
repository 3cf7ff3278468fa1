//! Reads tar streams: ustar, with the long names of GNU and the extended headers of PAX.
//!
//! The `tar` crate parses the fixed header here. Its own iterator is not used, because it takes extended headers of
//! any size into memory and splits PAX records at newlines, which binary values (`security.capability`) contain.
//!
//! ```text
//! ┌──────────────┬───────────────────┬──────────────┬────────────────────┬──────┬──────┐
//! │ header x/L/K │ its data, padded  │ header       │ contents, padded   │ ...  │ zero │
//! └──────────────┴───────────────────┴──────────────┴────────────────────┴──────┴──────┘
//!       512            to 512              512             to 512                  512
//! ```

use std::ffi::OsString;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use tar::{EntryType, Header};

const BLOCK: u64 = 512;
/// Bytes of extended headers before one member: a path of PATH_MAX, its link target and a page of attributes fit many
/// times.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Where PAX keeps extended attributes.
const XATTR_KEY: &str = "SCHILY.xattr.";

/// One file, directory, link or device.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) path: PathBuf,
    pub(super) kind: EntryType,
    /// Target of a link, as stored.
    pub(super) link: PathBuf,
    /// Permission bits with setuid, setgid and sticky.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub(super) mtime: (i64, i64),
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    /// Bytes of contents, which the reader gives next.
    pub(super) size: u64,
    pub(super) xattrs: Vec<(OsString, Vec<u8>)>,
}

/// Iterates over members; between two of them it reads as the contents of the first.
pub(super) struct TarReader<R> {
    inner: R,
    skip: fn(&mut R, u64) -> io::Result<()>,
    /// Offset of the next byte in the stream.
    position: u64,
    contents_left: u64,
    padding: u64,
}

impl<R: Read> TarReader<R> {
    pub(super) fn new(inner: R) -> Self {
        let skip = |inner: &mut R, bytes| {
            let skipped = io::copy(&mut inner.take(bytes), &mut io::sink())?;
            if skipped < bytes {
                Err(io::ErrorKind::UnexpectedEof.into())
            } else {
                Ok(())
            }
        };
        Self {
            inner,
            skip,
            position: 0,
            contents_left: 0,
            padding: 0,
        }
    }

    /// Offset at which the current member's contents start.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// The next member, or None at the end of the archive.
    pub(super) fn next(&mut self) -> io::Result<Option<Member>> {
        let mut extension = Extension::default();
        loop {
            self.skip_contents()?;
            let Some(header) = self.read_header()? else {
                return Ok(None);
            };
            let size = header.entry_size()?;
            match header.entry_type() {
                EntryType::XHeader => extension.take_pax(&self.read_extension(size)?)?,
                EntryType::GNULongName => {
                    extension.path = Some(until_nul(self.read_extension(size)?));
                }
                EntryType::GNULongLink => {
                    extension.link = Some(until_nul(self.read_extension(size)?));
                }
                // Defaults for the members that follow; tools write only comments there.
                EntryType::XGlobalHeader => _ = self.read_extension(size)?,
                _ => return self.finish(&header, extension, size).map(Some),
            }
        }
    }

    fn finish(&mut self, header: &Header, extension: Extension, size: u64) -> io::Result<Member> {
        let path = extension
            .path
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extension
            .link
            .unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned());
        let size = extension.size.unwrap_or(size);
        let kind = match header.entry_type() {
            // Before ustar a directory was a file whose name ends with a slash.
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => {
                EntryType::Directory
            }
            EntryType::Continuous => EntryType::Regular,
            kind => kind,
        };
        // Only files have contents; others sometimes carry a meaningless size.
        let has_contents = !matches!(
            kind,
            EntryType::Directory
                | EntryType::Link
                | EntryType::Symlink
                | EntryType::Char
                | EntryType::Block
                | EntryType::Fifo
        );
        self.contents_left = if has_contents { size } else { 0 };
        self.padding = self.contents_left.next_multiple_of(BLOCK) - self.contents_left;
        let id = |value: u64| {
            u32::try_from(value).map_err(|_| invalid(format!("user or group id {value}")))
        };
        let number = |field: io::Result<Option<u32>>| field.ok().flatten().unwrap_or(0);
        Ok(Member {
            path: OsString::from_vec(path).into(),
            link: OsString::from_vec(link).into(),
            kind,
            mode: header.mode()? & 0o7777,
            uid: id(extension.uid.map_or_else(|| header.uid(), Ok)?)?,
            gid: id(extension.gid.map_or_else(|| header.gid(), Ok)?)?,
            mtime: extension
                .mtime
                .unwrap_or((header.mtime().unwrap_or(0).try_into().unwrap_or(0), 0)),
            device: (number(header.device_major()), number(header.device_minor())),
            size: self.contents_left,
            xattrs: extension.xattrs,
        })
    }

    fn skip_contents(&mut self) -> io::Result<()> {
        let bytes = self.contents_left + self.padding;
        (self.skip)(&mut self.inner, bytes)?;
        self.position += bytes;
        (self.contents_left, self.padding) = (0, 0);
        Ok(())
    }

    /// None at the end: a block of zeros, or no further byte.
    fn read_header(&mut self) -> io::Result<Option<Header>> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < block.len() {
            match self.inner.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        self.position += BLOCK;
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        // Header checksum: the sum of all bytes, its own field counted as spaces.
        let sum = block[..148]
            .iter()
            .chain(&block[156..])
            .map(|&byte| u32::from(byte))
            .sum::<u32>()
            + 8 * 32;
        if header.cksum().ok() != Some(sum) {
            return Err(invalid("a tar header with a wrong checksum".into()));
        }
        Ok(Some(header))
    }

    fn read_extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION_BYTES {
            return Err(invalid(format!("an extended tar header of {size} bytes")));
        }
        let mut data = Vec::new();
        self.inner.by_ref().take(size).read_to_end(&mut data)?;
        if (data.len() as u64) < size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position += size;
        self.padding = size.next_multiple_of(BLOCK) - size;
        Ok(data)
    }
}

impl<R: Read + Seek> TarReader<R> {
    /// For a file: contents that are not read are not touched either.
    pub(super) fn seeking(inner: R) -> Self {
        let skip = |inner: &mut R, bytes: u64| {
            let bytes = i64::try_from(bytes)
                .map_err(|_| invalid(format!("a tar member of {bytes} bytes")))?;
            inner.seek(SeekFrom::Current(bytes)).map(drop)
        };
        Self {
            skip,
            ..Self::new(inner)
        }
    }
}

impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.contents_left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if room == 0 {
            return Ok(0);
        }
        let read = self.inner.read(&mut buffer[..room])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.contents_left -= read as u64;
        self.position += read as u64;
        Ok(read)
    }
}

/// What the extended headers before a member said.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, i64)>,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

impl Extension {
    /// Records of the form `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record.
    fn take_pax(&mut self, mut data: &[u8]) -> io::Result<()> {
        let bad = || invalid("a malformed PAX header".into());
        while !data.is_empty() {
            let space = data.iter().position(|&byte| byte == b' ').ok_or_else(bad)?;
            let length: usize = text(&data[..space])
                .and_then(|text| text.parse().ok())
                .ok_or_else(bad)?;
            if length <= space + 1 || length > data.len() || data[length - 1] != b'\n' {
                return Err(bad());
            }
            let record = &data[space + 1..length - 1];
            let equals = record
                .iter()
                .position(|&byte| byte == b'=')
                .ok_or_else(bad)?;
            let (key, value) = (
                text(&record[..equals]).ok_or_else(bad)?,
                &record[equals + 1..],
            );
            self.take_record(key, value)
                .ok_or_else(|| invalid(format!("a malformed PAX record {key:?}")))?;
            data = &data[length..];
        }
        Ok(())
    }

    fn take_record(&mut self, key: &str, value: &[u8]) -> Option<()> {
        match key {
            "path" => self.path = Some(value.into()),
            "linkpath" => self.link = Some(value.into()),
            "size" => self.size = Some(text(value)?.parse().ok()?),
            "uid" => self.uid = Some(text(value)?.parse().ok()?),
            "gid" => self.gid = Some(text(value)?.parse().ok()?),
            "mtime" => self.mtime = Some(parse_time(text(value)?)?),
            _ if key.starts_with("GNU.sparse.") => return None,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_KEY) {
                    self.xattrs.push((name.into(), value.into()));
                }
            }
        }
        Some(())
    }
}

/// `1350244992.023960108`
fn parse_time(text: &str) -> Option<(i64, i64)> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let nanoseconds = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect::<String>();
    Some((seconds.parse().ok()?, nanoseconds.parse().ok()?))
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(
        bytes
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(bytes.len()),
    );
    bytes
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_values_may_contain_newlines() {
        let mut extension = Extension::default();
        extension
            .take_pax(b"35 SCHILY.xattr.user.key=a\nb=c\nd\n\0\n")
            .unwrap();
        assert_eq!(
            extension.xattrs,
            [("user.key".into(), b"a\nb=c\nd\n\0".to_vec())]
        );
    }

    #[test]
    fn malformed_pax_records_are_refused() {
        for bad in [
            &b"5 a=b"[..],
            b"99 a=b\n",
            b"x a=b\n",
            b"0 \n",
            b"3 \n",
            b"7 ab-c\n",
            b"14 size=-12a\n\n",
        ] {
            assert!(
                Extension::default().take_pax(bad).is_err(),
                "{:?} was taken",
                String::from_utf8_lossy(bad)
            );
        }
    }

    #[test]
    fn times_have_fractions() {
        assert_eq!(parse_time("12.5"), Some((12, 500_000_000)));
        assert_eq!(parse_time("12"), Some((12, 0)));
        assert_eq!(parse_time("1.0000000019"), Some((1, 1)));
        assert_eq!(parse_time("x"), None);
    }

    #[test]
    fn a_huge_extended_header_is_not_read() {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        header.set_size(1 << 40);
        header.set_cksum();
        let error = TarReader::new(&header.as_bytes()[..]).next().unwrap_err();
        assert!(error.to_string().contains("1099511627776"), "{error}");
    }
}
