//! The files the guest boots from.

use super::{Finding, NeededBy};
use crate::config::Config;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

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

/// A bzImage is the usual mistake.
fn check_kernel(path: &Path) -> Result<(), String> {
    let read = |error: io::Error| format!("{}: {error}", path.display());
    let mut start = Vec::new();
    File::open(path)
        .map_err(read)?
        .take(20)
        .read_to_end(&mut start)
        .map_err(read)?;
    // ELF, 64 bit, little-endian; machine 62 is x86-64.
    if start.starts_with(b"\x7fELF\x02\x01") && start.get(18..20) == Some(&[62, 0]) {
        return Ok(());
    }
    Err(format!(
        "{} is no uncompressed x86-64 kernel (vmlinux)",
        path.display()
    ))
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

    const ELF: &[u8] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0rest of the kernel";

    #[test]
    fn a_kernel_is_an_elf_file_for_this_machine() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), ELF).unwrap();
        check_kernel(file.path()).unwrap();
        for bad in [&b""[..], b"MZ\0\0", &ELF[..19]] {
            fs::write(file.path(), bad).unwrap();
            assert!(check_kernel(file.path()).unwrap_err().contains("vmlinux"));
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
