//! Results that are expensive to make and depend on nothing but their inputs.
//!
//! An entry is a directory named by its kind and a digest of all of its inputs. It is made under a temporary name and
//! renamed when complete, so an entry that exists is a whole one, however the making of another ended.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::step::step;

/// Entries of one kind that are kept: those of the branches one works on. The least recently used ones go.
const KEPT_PER_KIND: usize = 4;
/// Ends the name of an entry that is being made.
const UNFINISHED: &str = ".unfinished";

#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    pub fn open(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("create cache {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// The entry's directory. When there is none yet, `make` fills it; `what` tells the user what it makes.
    pub fn get(
        &self,
        kind: &str,
        key: &Key,
        what: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let name = format!("{kind}-{}", key.short());
        let entry = self.dir.join(&name);
        // One maker per entry: a second process waits here and then finds the entry.
        let lock_path = self.dir.join(format!(".{kind}.lock"));
        let lock =
            File::create(&lock_path).with_context(|| format!("create {}", lock_path.display()))?;
        lock.lock()
            .with_context(|| format!("lock {}", lock_path.display()))?;
        if entry.is_dir() {
            File::open(&entry)?.set_modified(SystemTime::now()).ok();
            return Ok(entry);
        }
        self.remove_unfinished(kind)?;
        let unfinished = self.dir.join(format!(".{name}{UNFINISHED}"));
        fs::create_dir(&unfinished).with_context(|| format!("create {}", unfinished.display()))?;
        step(what, || make(&unfinished))?;
        fs::rename(&unfinished, &entry)
            .with_context(|| format!("rename to {}", entry.display()))?;
        self.prune(kind)?;
        Ok(entry)
    }

    /// Removes what failed or interrupted makings have left.
    fn remove_unfinished(&self, kind: &str) -> Result<()> {
        let prefix = format!(".{kind}-");
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            let key = name
                .strip_prefix(&prefix)
                .and_then(|rest| rest.strip_suffix(UNFINISHED));
            if key.is_some_and(|key| key.len() == Key::SHORT) {
                remove_tree(&self.dir.join(&*name))?;
            }
        }
        Ok(())
    }

    fn prune(&self, kind: &str) -> Result<()> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let digest = name
                .to_str()
                .and_then(|name| name.strip_prefix(kind)?.strip_prefix('-'));
            if digest.is_some_and(|digest| digest.len() == Key::SHORT && !digest.contains('-')) {
                entries.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        entries.sort_unstable_by(|a, b| b.cmp(a));
        entries
            .iter()
            .skip(KEPT_PER_KIND)
            .try_for_each(|(_, path)| remove_tree(path))
    }
}

/// Removes a directory tree; that there is none is fine.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Digest of everything an entry depends on.
#[derive(Debug, Default, Clone)]
pub struct Key(Sha256);

impl Key {
    /// Hexadecimal digits in an entry's name.
    const SHORT: usize = 16;

    /// Adds one input. Name and length keep two inputs from running into each other.
    pub fn add(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.0.update(format!("{name} {}\n", value.len()));
        self.0.update(value);
        self
    }

    pub fn short(&self) -> String {
        let mut digits = hex(&self.0.clone().finalize());
        digits.truncate(Self::SHORT);
        digits
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_make_leaves_no_entry_and_a_made_one_is_not_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().to_path_buf()).unwrap();
        let key = Key::default().add("input", "1");
        let failed = cache.get("thing", &key, "fail", |dir| {
            fs::write(dir.join("half"), "")?;
            anyhow::bail!("no luck")
        });
        assert!(failed.is_err());

        let entry = cache
            .get("thing", &key, "make", |dir| {
                Ok(fs::write(dir.join("whole"), "")?)
            })
            .unwrap();
        assert!(entry.join("whole").exists() && !entry.join("half").exists());
        let again = cache
            .get("thing", &key, "again", |_| panic!("made twice"))
            .unwrap();
        assert_eq!(entry, again);
    }

    #[test]
    fn keys_tell_inputs_apart() {
        let a = Key::default().add("x", "ab").add("y", "c");
        let b = Key::default().add("x", "a").add("y", "bc");
        assert_ne!(a.short(), b.short());
    }
}
