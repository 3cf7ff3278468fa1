//! The files the guest boots from.

use super::{Finding, NeededBy};
use crate::config::Config;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Size of an `Elf64_Ehdr`, and of an `Elf64_Phdr`.
const ELF_HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const REMEDY: &str = "run cargo xtask build, or reinstall Coffer";

/// The part of manifest.json that is compared.
#[derive(Debug, Deserialize)]
struct Manifest {
    version: String,
    kernel: Kernel,
    vmlinux: Described,
    initrd: Described,
}

#[derive(Debug, Deserialize)]
struct Kernel {
    release: String,
}

#[derive(Debug, Deserialize)]
struct Described {
    sha256: String,
}

/// The versions of the installed guest image.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Version {
    pub version: String,
    /// `uname -r` in the guest.
    pub kernel: String,
}

/// What the manifest says; the reason in one line where there is none.
pub fn guest_image_version(config: &Config) -> Result<Version, String> {
    let manifest = read_manifest(&config.libexec().join("manifest.json"))?;
    Ok(Version {
        version: manifest.version,
        kernel: manifest.kernel.release,
    })
}

/// A quick look before a VM is started: kernel and initrd are there and whole, as far as they tell themselves. The
/// hashes are left to `coffer check`.
pub fn guest_image(config: &Config) -> Result<(), String> {
    check_kernel(&config.kernel())?;
    let initrd = config.initrd();
    let metadata = initrd
        .metadata()
        .map_err(|error| format!("{}: {error}", initrd.display()))?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Err(format!(
            "{} is no initrd: it is empty or no regular file",
            initrd.display()
        ));
    }
    Ok(())
}

pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let manifest = read_manifest(&config.libexec().join("manifest.json"));
    let described = manifest.as_ref().ok();
    // A kernel or initrd of the user's own is not in our manifest.
    let kernel_hash = described
        .filter(|_| config.kernel.is_none())
        .map(|manifest| manifest.vmlinux.sha256.as_str());
    let initrd_hash = described
        .filter(|_| config.initrd.is_none())
        .map(|manifest| manifest.initrd.sha256.as_str());
    let (kernel, initrd) = (config.kernel(), config.initrd());
    let kernel = check_kernel(&kernel).and_then(|()| check_file(&kernel, kernel_hash));
    let initrd = check_file(&initrd, initrd_hash);
    let manifest = manifest.map(|manifest| {
        format!(
            "version {}, Linux {}",
            manifest.version, manifest.kernel.release
        )
    });
    vec![
        Finding::of("guest kernel", NeededBy::Everything, kernel, REMEDY),
        Finding::of("guest initrd", NeededBy::Everything, initrd, REMEDY),
        Finding::of("guest manifest", NeededBy::Optional, manifest, REMEDY),
    ]
}

fn read_manifest(path: &Path) -> Result<Manifest, String> {
    let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// An x86-64 ELF file with all its segments. A bzImage is the usual mistake, a partial copy the next.
fn check_kernel(path: &Path) -> Result<(), String> {
    let read = |error: io::Error| format!("{}: {error}", path.display());
    let file = File::open(path).map_err(read)?;
    let mut header = Vec::new();
    (&file)
        .take(ELF_HEADER_BYTES)
        .read_to_end(&mut header)
        .map_err(read)?;
    // 64 bit, little-endian; machine 62 is x86-64.
    if header.len() as u64 != ELF_HEADER_BYTES
        || !header.starts_with(b"\x7fELF\x02\x01")
        || header[18..20] != [62, 0]
    {
        return Err(format!(
            "{} is no uncompressed x86-64 kernel (vmlinux)",
            path.display()
        ));
    }
    let (table, entry_bytes) = (number(&header, 32, 8), number(&header, 54, 2));
    let length = file.metadata().map_err(read)?.len();
    for index in 0..number(&header, 56, 2) {
        let mut entry = [0; PROGRAM_HEADER_BYTES];
        let whole = file
            .read_exact_at(&mut entry, table.saturating_add(index * entry_bytes))
            .is_ok()
            && number(&entry, 8, 8).saturating_add(number(&entry, 32, 8)) <= length;
        if !whole {
            return Err(format!(
                "{} is cut off: segment {index} is not all there",
                path.display()
            ));
        }
    }
    Ok(())
}

/// A little-endian field.
fn number(bytes: &[u8], offset: usize, length: usize) -> u64 {
    bytes[offset..offset + length]
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn check_file(path: &Path, expected: Option<&str>) -> Result<String, String> {
    let read = |error: io::Error| format!("{}: {error}", path.display());
    let mut file = File::open(path).map_err(read)?;
    if !file.metadata().map_err(read)?.is_file() {
        return Err(format!("{} is no regular file", path.display()));
    }
    let Some(expected) = expected else {
        return Ok(path.display().to_string());
    };
    let mut hash = Hasher(Sha256::new());
    io::copy(&mut file, &mut hash).map_err(read)?;
    let actual = crate::image::hex(&hash.0.finalize());
    if actual != expected {
        return Err(format!(
            "{} has SHA-256 {actual}, the manifest says {expected}",
            path.display()
        ));
    }
    Ok(format!("{}, as in the manifest", path.display()))
}

struct Hasher(Sha256);

impl io::Write for Hasher {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.update(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// An ELF header with one segment of `segment` bytes at 120.
    fn elf(segment: u64) -> Vec<u8> {
        let mut file = vec![0; 120];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (file[18], file[32], file[54], file[56]) = (62, 64, 56, 1);
        file[64 + 8..64 + 16].copy_from_slice(&120_u64.to_le_bytes());
        file[64 + 32..64 + 40].copy_from_slice(&segment.to_le_bytes());
        file.extend([7; 100]);
        file
    }

    #[test]
    fn a_kernel_is_a_whole_elf_file_for_this_machine() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), elf(100)).unwrap();
        check_kernel(file.path()).unwrap();
        for bad in [&b""[..], b"MZ\0\0", &elf(100)[..60]] {
            fs::write(file.path(), bad).unwrap();
            assert!(check_kernel(file.path()).unwrap_err().contains("vmlinux"));
        }
        for bad in [&elf(101)[..], &elf(u64::MAX), &elf(100)[..100]] {
            fs::write(file.path(), bad).unwrap();
            assert!(check_kernel(file.path()).unwrap_err().contains("cut off"));
        }
        assert!(
            check_kernel(Path::new("/no/vmlinux"))
                .unwrap_err()
                .contains("/no/vmlinux")
        );
    }

    #[test]
    fn a_file_must_have_the_hash_of_the_manifest() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "abc").unwrap();
        let hash = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        check_file(file.path(), Some(hash)).unwrap();
        check_file(file.path(), None).unwrap();
        fs::write(file.path(), "abd").unwrap();
        assert!(
            check_file(file.path(), Some(hash))
                .unwrap_err()
                .contains(hash)
        );
        assert!(
            check_file(Path::new("/dev"), None)
                .unwrap_err()
                .contains("no regular file")
        );
    }
}
