//! Bind mounts: which of them the share shows to the guest, and which mean the guest's own.

use super::{GuestSpec, SharedMemory, SpecError, field};
use crate::mirror;
use crate::share::IdMap;
use coffer_proto::ids::ContainerId;
use coffer_proto::limits::MIRROR_DIR;
use nix::sys::statfs::{HUGETLBFS_MAGIC, statfs};
use oci_spec::runtime::{Linux, Mount, Spec};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Host directories of kernel file systems: a container that binds them wants its own kernel's, which is the guest's.
const KERNEL_FILE_SYSTEMS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Options of a bind mount that a file system of the guest in its place has too.
pub(super) const KEPT_OPTIONS: [&str; 5] = ["ro", "rw", "nosuid", "nodev", "noexec"];

/// A host directory or file which the share has to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// In the spec's mounts.
    pub index: usize,
    pub source: PathBuf,
    pub read_only: bool,
    /// Other owners than on disk.
    pub idmap: Option<IdMap>,
    /// The guest gets a copy that follows it, see [`crate::mirror`].
    pub mirrored: bool,
}

/// What became of a mount of the spec.
#[derive(Debug)]
pub(super) enum Taken {
    /// The guest makes it by itself.
    Guests,
    Volume(Bind),
    SharedMemory(SharedMemory),
}

/// Turns a bind mount of the host into one of the guest.
pub(super) fn take(
    mount: &mut Mount,
    i: usize,
    id: &ContainerId,
    bundle: &Path,
    user: &IdMap,
) -> Result<Taken, SpecError> {
    if !mount.destination().is_absolute() {
        return field(
            format!("mounts[{i}].destination"),
            mount.destination().display().to_string(),
            "is not an absolute path",
        );
    }
    let options = mount.options().clone().unwrap_or_default();
    let has = |names: &[&str]| options.iter().any(|o| names.contains(&o.as_str()));
    if mount.typ().as_deref() != Some("bind") && !has(&["bind", "rbind"]) {
        return Ok(Taken::Guests);
    }
    let Some(source) = mount.source() else {
        return field(
            format!("mounts[{i}].source"),
            "",
            "is missing for a bind mount",
        );
    };
    let name = format!("mounts[{i}].source");
    let source = bundle.join(source);
    if let Some(memory) = SharedMemory::of(mount, i, &source) {
        return Ok(Taken::SharedMemory(memory));
    }
    if KERNEL_FILE_SYSTEMS
        .iter()
        .any(|dir| source.starts_with(dir))
    {
        return keep_in_guest(&name, &source);
    }
    let meta = look_at(name, &source)?;
    if let Some(page_size) = huge_page_size(&source) {
        make_huge_pages(mount, &meta, page_size);
        return Ok(Taken::Guests);
    }
    let read_only = is_read_only(&options);
    let idmap = take_idmap(mount, user);
    let mirrored = read_only && idmap.is_none() && mirror::is_for(&source);
    if mirrored {
        mount.set_source(Some(format!("{MIRROR_DIR}/{id}/{i}").into()));
    }
    Ok(Taken::Volume(Bind {
        index: i,
        source,
        read_only,
        idmap,
        mirrored,
    }))
}

/// What the source is: a directory, a file, a socket or a fifo.
fn look_at(name: String, source: &Path) -> Result<fs::Metadata, SpecError> {
    let looked = fs::metadata(source);
    let meta = looked.map_err(|error| SpecError::Source {
        field: name.clone(),
        path: source.to_owned(),
        source: error,
    })?;
    if meta.is_dir() || meta.is_file() || is_endpoint(&meta) {
        return Ok(meta);
    }
    field(
        name,
        source.display().to_string(),
        "is a device; devices of the host are not passed into the VM",
    )
}

/// The last of "ro" and "rw" wins, as in mount(8).
fn is_read_only(options: &[String]) -> bool {
    let mut latest = options.iter().rev();
    let decisive = latest.find(|o| matches!(o.as_str(), "ro" | "rw" | "rro"));
    decisive.is_some_and(|o| o != "rw")
}

/// Bytes of the pages of a hugetlbfs, which an engine mounts for an emptyDir of medium HugePages.
fn huge_page_size(source: &Path) -> Option<u64> {
    let found = statfs(source).ok()?;
    let size = u64::try_from(found.block_size()).ok()?;
    (found.filesystem_type() == HUGETLBFS_MAGIC).then_some(size)
}

/// Such pages are memory of the guest: it gets a hugetlbfs with the same owner.
fn make_huge_pages(mount: &mut Mount, meta: &fs::Metadata, page_size: u64) {
    let mut options = mount.options().clone().unwrap_or_default();
    options.retain(|option| KEPT_OPTIONS.contains(&option.as_str()));
    options.push(format!("pagesize={page_size}"));
    options.push(format!("mode={:o}", meta.mode() & 0o7777));
    options.push(format!("uid={}", meta.uid()));
    options.push(format!("gid={}", meta.gid()));
    mount
        .set_typ(Some("hugetlbfs".into()))
        .set_source(Some("nodev".into()))
        .set_options(Some(options));
}

impl GuestSpec {
    /// Says where the share shows a volume.
    pub fn place_volume(&mut self, index: usize, path: String) {
        let mounts = self.spec.mounts_mut().as_mut();
        if let Some(mount) = mounts.and_then(|mounts| mounts.get_mut(index)) {
            mount.set_source(Some(path.into()));
        }
    }
}

/// The mappings of the container's user namespace.
pub(super) fn user_mappings(spec: &Spec) -> IdMap {
    let linux = spec.linux().as_ref();
    let of = |list: Option<&Option<Vec<_>>>| list.cloned().flatten().unwrap_or_default();
    IdMap {
        uids: of(linux.map(Linux::uid_mappings)),
        gids: of(linux.map(Linux::gid_mappings)),
        recursive: false,
    }
}

/// Takes the ID mapping out of a mount, for it is the share's mount that gets it. `idmap` without mappings means the container's.
fn take_idmap(mount: &mut Mount, user: &IdMap) -> Option<IdMap> {
    let mut options = mount.options().clone().unwrap_or_default();
    let named = options.iter().any(|option| option == "idmap");
    let recursive = options.iter().any(|option| option == "ridmap");
    options.retain(|option| option != "idmap" && option != "ridmap");
    if mount.options().is_some() {
        mount.set_options(Some(options));
    }
    let own = IdMap {
        uids: mount.uid_mappings().clone().unwrap_or_default(),
        gids: mount.gid_mappings().clone().unwrap_or_default(),
        recursive,
    };
    mount.set_uid_mappings(None).set_gid_mappings(None);
    if !own.uids.is_empty() || !own.gids.is_empty() {
        return Some(own);
    }
    (named || recursive).then(|| IdMap {
        recursive,
        ..user.clone()
    })
}

/// A bind from the host's /proc, /sys or /dev means the guest's own, which must be a directory or plain file there.
fn keep_in_guest(name: &str, source: &Path) -> Result<Taken, SpecError> {
    match fs::metadata(source) {
        Ok(meta) if meta.is_dir() || meta.is_file() => Ok(Taken::Guests),
        Ok(_) => field(
            name,
            source.display().to_string(),
            "is a device; devices of the host are not passed into the VM",
        ),
        Err(e) => Err(SpecError::Source {
            field: name.to_owned(),
            path: source.to_owned(),
            source: e,
        }),
    }
}

fn is_endpoint(meta: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    meta.file_type().is_socket() || meta.file_type().is_fifo()
}
