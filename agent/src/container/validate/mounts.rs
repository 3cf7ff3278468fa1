//! `mounts`: what may be mounted, from where and over what.

use std::path::Path;

use oci_spec::runtime::Mount;

use super::super::mounts::{Kind, Source};
use super::super::options;
use super::{Result, path, refuse, refuse_present};

/// Files below /proc over which engines mount an emulation (LXCFS); anything else there could fake the kernel.
const PROC_FILES: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/net/dev",
];

/// Checks entry `i` of `mounts`.
pub fn mount(id: &str, i: usize, mount: &Mount) -> Result {
    let field = |name: &str| format!("mounts[{i}].{name}");
    let destination = mount.destination();
    path(field("destination"), destination)?;
    let mapped = [
        (
            &*field("uidMappings"),
            mount.uid_mappings().as_ref().is_some_and(|m| !m.is_empty()),
        ),
        (
            &*field("gidMappings"),
            mount.gid_mappings().as_ref().is_some_and(|m| !m.is_empty()),
        ),
    ];
    refuse_present(&mapped, "ID-mapped mounts are not supported")?;
    let options = mount.options().as_deref().unwrap_or_default();
    if options.iter().any(|option| option.contains('\0')) {
        return refuse(field("options"), "has a NUL in it");
    }
    let options = options::parse(options)
        .or_else(|option| refuse(field("options"), format!("{option:?} is not supported")))?;
    let Some(kind) = Kind::of(mount, &options) else {
        let name = mount.typ().as_deref().unwrap_or_default();
        return refuse(field("type"), format!("{name:?} is not supported"));
    };
    if destination == Path::new("/") {
        return refuse(field("destination"), "is the root, which root.path is for");
    }
    let over_proc = destination == Path::new("/proc") && kind != Kind::Proc;
    let below_proc = destination.starts_with("/proc") && destination != Path::new("/proc");
    let allowed = PROC_FILES.iter().any(|file| destination == Path::new(file));
    if over_proc || (below_proc && !allowed) {
        let reason = format!("{} would hide a part of /proc", destination.display());
        return refuse(field("destination"), reason);
    }
    if options.copy_up && kind != Kind::Tmpfs {
        return refuse(field("options"), "tmpcopyup is for tmpfs");
    }
    if let Kind::Bind(_) = kind {
        let Some(source) = mount.source() else {
            return refuse(field("source"), "is missing for a bind mount");
        };
        path(field("source"), source)?;
        if Source::of(id, source).is_none() {
            let reason = format!("{} is not in this container's share", source.display());
            return refuse(field("source"), reason);
        }
    }
    Ok(())
}
