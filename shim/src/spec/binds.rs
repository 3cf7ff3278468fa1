//! Bind mounts: which of them the share shows to the guest, and which mean the guest's own.

use super::{SpecError, field};
use crate::mirror;
use crate::share::IdMap;
use coffer_proto::ids::ContainerId;
use coffer_proto::limits::{MIRROR_DIR, SHARE_DIR};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::{Linux, Mount, Spec};
use std::fs;
use std::path::{Path, PathBuf};

/// Host directories of kernel file systems: a container that binds them wants its own kernel's, which is the guest's.
const KERNEL_FILE_SYSTEMS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Where POSIX shared memory is.
const GUEST_SHM: &str = "/dev/shm";

/// A host directory or file which the share has to show at its index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub index: usize,
    pub source: PathBuf,
    pub read_only: bool,
    /// Other owners than on disk.
    pub idmap: Option<IdMap>,
    /// The guest gets a copy that follows it, see [`crate::mirror`].
    pub mirrored: bool,
}

/// Turns a bind mount of the host into one of the share. None for mounts that the guest makes by itself.
pub(super) fn take(
    mount: &mut Mount,
    i: usize,
    id: &ContainerId,
    bundle: &Path,
    user: &IdMap,
) -> Result<Option<Bind>, SpecError> {
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
        return Ok(None);
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
    if is_shared_memory(mount, &source) {
        mount.set_source(Some(GUEST_SHM.into()));
        return Ok(None);
    }
    if KERNEL_FILE_SYSTEMS
        .iter()
        .any(|dir| source.starts_with(dir))
    {
        return keep_in_guest(&name, &source);
    }
    let meta = fs::metadata(&source).map_err(|e| SpecError::Source {
        field: name.clone(),
        path: source.clone(),
        source: e,
    })?;
    if !(meta.is_dir() || meta.is_file() || is_endpoint(&meta)) {
        return field(
            name,
            source.display().to_string(),
            "is a device; devices of the host are not passed into the VM",
        );
    }
    // The last of "ro" and "rw" wins, as in mount(8).
    let read_only = options
        .iter()
        .rev()
        .find(|o| matches!(o.as_str(), "ro" | "rw" | "rro"))
        .is_some_and(|o| o != "rw");
    let idmap = take_idmap(mount, user);
    let mirrored = read_only && idmap.is_none() && mirror::is_for(&source);
    let in_guest = if mirrored {
        format!("{MIRROR_DIR}/{id}/{i}")
    } else {
        format!("{SHARE_DIR}/{id}/mounts/{i}")
    };
    mount.set_source(Some(PathBuf::from(in_guest)));
    Ok(Some(Bind {
        index: i,
        source,
        read_only,
        idmap,
        mirrored,
    }))
}

/// The shared memory of a pod: a tmpfs named `shm`, which containerd, CRI-O and podman make on the host for all its containers. In the
/// VM that is the guest's; the host's, through file sharing, would not be one memory for two containers.
fn is_shared_memory(mount: &Mount, source: &Path) -> bool {
    mount.destination() == Path::new(GUEST_SHM)
        && source.file_name().is_some_and(|name| name == "shm")
        && statfs(source).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC)
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
fn keep_in_guest(name: &str, source: &Path) -> Result<Option<Bind>, SpecError> {
    match fs::metadata(source) {
        Ok(meta) if meta.is_dir() || meta.is_file() => Ok(None),
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
