//! Where in the host's cgroups something is, and how `linux.cgroupsPath` says so.
//!
//! Engines write it in one of two forms, and the form tells which:
//!
//! - A path, as for a runtime that makes cgroups itself. An absolute one is relative to the root of the hierarchy (OCI runtime
//!   spec, "Cgroups path"), and so is, as with runc, one without a slash in front.
//! - `slice:prefix:name`, as for systemd: the scope `prefix-name.scope` in the slice, which is `system.slice` if it is empty. A name that
//!   ends in `.slice` is the unit itself (runc, docs/systemd.md). The slice `a-b.slice` is in `a.slice`, and `-.slice` is the root
//!   (systemd.slice(5)).

use super::hierarchy;
use coffer_proto::ids::SandboxId;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Parent of the cgroups that nobody else named. It comes with the first and goes with the last.
const OWN_PARENT: &str = "coffer";
/// Where systemd has the units that name no slice.
const DEFAULT_SLICE: &str = "system.slice";
/// The leaf for a container's own processes, as crun calls its like.
const STAND_INS: &str = "container";
/// The VM of a container of its own, in the container's cgroup. No pod's VM is called so: theirs begin with `coffer-`.
const VM: &str = "coffer.vm";
/// What containerd's CRI plugin calls the scopes of its containers.
const CRI_PREFIX: &str = "cri-containerd";

/// A cgroup other than the root: its path from the root of the hierarchy, with a slash in front and no `.` or `..` in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CgroupPath(String);

/// What names no cgroup.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the cgroup path {path:?} {reason}")]
pub struct CgroupPathError {
    pub path: String,
    pub reason: &'static str,
}

impl CgroupPath {
    /// Reads an OCI `linux.cgroupsPath` that is not empty.
    pub fn parse(cgroups_path: &str) -> Result<Self, CgroupPathError> {
        let parts: Vec<&str> = cgroups_path.split(':').collect();
        let path = match parts[..] {
            [slice, prefix, name] if !cgroups_path.starts_with('/') => of_unit(slice, prefix, name),
            _ => normal(cgroups_path),
        };
        path.map(Self).map_err(|reason| CgroupPathError {
            path: cgroups_path.to_owned(),
            reason,
        })
    }

    /// The cgroup of a pod's sandbox below the `cgroup_parent` that a kubelet gives, which is a path or, last in it, a slice.
    pub fn in_cri_parent(parent: &str, id: &str) -> Result<Self, CgroupPathError> {
        let base = parent.trim_end_matches('/').rsplit('/').next();
        match base.filter(|base| base.ends_with(".slice")) {
            Some(slice) => Self::parse(&format!("{slice}:{CRI_PREFIX}:{id}")),
            None => Self::parse(&format!("/{parent}/{id}")),
        }
    }

    /// Where a sandbox goes for which nobody named a cgroup. The pid tells it from one of the same name in another state root.
    pub fn own(id: &SandboxId) -> Self {
        Self(format!("/{OWN_PARENT}/{id}-{}", std::process::id()))
    }

    /// The cgroup above one of [`own`](Self::own).
    pub(super) fn own_parent(&self) -> Option<Self> {
        let parent = Self(format!("/{OWN_PARENT}"));
        (parent.child(self.name()) == *self).then_some(parent)
    }

    fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    /// The cgroup `name` in this one.
    pub fn child(&self, name: &str) -> Self {
        Self(format!("{self}/{name}"))
    }

    /// Where the stand-ins of the container with this cgroup are: in it or, with cgroup v2, in a leaf of it. There a cgroup that
    /// passes controllers on, as this one does to that of the VM, can't have processes of its own ("no internal processes").
    pub fn of_stand_ins(&self) -> Self {
        if hierarchy::is_v2() {
            self.child(STAND_INS)
        } else {
            self.clone()
        }
    }

    /// The innermost slice of systemd's that it is in.
    pub fn slice(&self) -> Option<&str> {
        self.0.rsplit('/').find(|part| part.ends_with(".slice"))
    }

    /// That of a VM for this container alone: in the container's, which so has the figures of all it causes.
    pub fn of_vm(&self) -> Self {
        self.child(VM)
    }

    /// The container's that one of a VM is in. It stays until the VM ends, which may be after that container.
    pub fn around_vm(&self) -> Option<Self> {
        let container = self.0.strip_suffix(VM)?.strip_suffix('/')?;
        (!container.is_empty()).then(|| Self(container.to_owned()))
    }

    /// The cgroup `name` beside this one.
    pub fn sibling(&self, name: &str) -> Self {
        let parent = self.0.rsplit_once('/').map_or("", |(parent, _)| parent);
        Self(format!("{parent}/{name}"))
    }

    /// Its directory in a hierarchy that is mounted at `root`.
    pub fn below(&self, root: &Path) -> PathBuf {
        root.join(self.0.trim_start_matches('/'))
    }
}

impl std::fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<CgroupPath> for String {
    fn from(path: CgroupPath) -> Self {
        path.0
    }
}

impl TryFrom<String> for CgroupPath {
    type Error = CgroupPathError;

    fn try_from(path: String) -> Result<Self, CgroupPathError> {
        Self::parse(&path)
    }
}

/// The path without `.`, `..` and empty parts. As with runc, `..` does not lead out of the root.
fn normal(path: &str) -> Result<String, &'static str> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err("names the root");
    }
    Ok(format!("/{}", parts.join("/")))
}

fn of_unit(slice: &str, prefix: &str, name: &str) -> Result<String, &'static str> {
    if name.is_empty() || prefix.contains('/') || name.contains('/') {
        return Err("names no unit of systemd");
    }
    let unit = if name.ends_with(".slice") {
        name.to_owned()
    } else {
        format!("{prefix}-{name}.scope")
    };
    let slice = if slice.is_empty() {
        DEFAULT_SLICE
    } else {
        slice
    };
    Ok(format!("{}/{unit}", of_slice(slice)?))
}

/// The slice's path; the empty one for the root slice.
fn of_slice(slice: &str) -> Result<String, &'static str> {
    const WRONG: &str = "begins with what is no slice of systemd";
    if slice == "-" {
        return Ok(String::new());
    }
    let name = slice.strip_suffix(".slice").ok_or(WRONG)?;
    if name == "-" {
        return Ok(String::new());
    }
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return Err(WRONG);
    }
    let ends = name.match_indices('-').map(|(end, _)| end);
    let slices = ends.chain([name.len()]);
    Ok(slices
        .map(|end| format!("/{}.slice", &name[..end]))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(given: &str) -> Option<String> {
        CgroupPath::parse(given).ok().map(String::from)
    }

    #[test]
    fn the_vm_of_a_container_is_in_the_containers() {
        let container = CgroupPath::parse("/a/c").unwrap();
        assert_eq!(String::from(container.of_vm()), "/a/c/coffer.vm");
        assert_eq!(container.of_vm().around_vm(), Some(container.clone()));
        assert_eq!(container.sibling("coffer-vm").around_vm(), None);
    }

    #[test]
    fn each_form_of_a_cgroups_path_is_one_path() {
        let cases = [
            // Paths.
            ("/kubepods/pod1/c", Some("/kubepods/pod1/c")),
            ("docker/1", Some("/docker/1")),
            ("relative", Some("/relative")),
            ("/a/./b//c/", Some("/a/b/c")),
            ("/a/../../b", Some("/b")),
            ("../../b", Some("/b")),
            ("/a.slice:x:y", Some("/a.slice:x:y")),
            ("a:b", Some("/a:b")),
            ("a.slice:b:c:d", Some("/a.slice:b:c:d")),
            ("", None),
            ("/", None),
            ("/.", None),
            ("..", None),
            // Units of systemd.
            (
                "machine.slice:libpod:1",
                Some("/machine.slice/libpod-1.scope"),
            ),
            (":crio:1", Some("/system.slice/crio-1.scope")),
            ("system.slice::x", Some("/system.slice/-x.scope")),
            ("-.slice:crio:x", Some("/crio-x.scope")),
            ("-:crio:x", Some("/crio-x.scope")),
            (
                "a-b.slice:crio:a-b-c.slice",
                Some("/a.slice/a-b.slice/a-b-c.slice"),
            ),
            (
                "kubepods-burstable-pod2.slice:crio:1",
                Some(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod2.slice/crio-1.scope",
                ),
            ),
            ("a:b:c", None),
            (".slice:b:c", None),
            ("a--b.slice:x:y", None),
            ("-a.slice:x:y", None),
            ("a/b.slice:x:y", None),
            ("a.slice:x:", None),
            ("a.slice:x:../y", None),
            ("a.slice:../x:y", None),
        ];
        for (given, expected) in cases {
            assert_eq!(parsed(given).as_deref(), expected, "{given:?}");
            // What was written into a state file is read as the same.
            let again = expected.map(|path| parsed(path).unwrap());
            assert_eq!(again.as_deref(), expected, "{given:?}");
        }
    }

    #[test]
    fn a_kubelets_parent_is_a_path_or_a_slice() {
        let cases = [
            ("/kubepods/pod1", "/kubepods/pod1/p"),
            ("/kubepods/pod1/", "/kubepods/pod1/p"),
            (
                "kubepods-pod1.slice",
                "/kubepods.slice/kubepods-pod1.slice/cri-containerd-p.scope",
            ),
            (
                "/kubepods.slice/kubepods-pod1.slice",
                "/kubepods.slice/kubepods-pod1.slice/cri-containerd-p.scope",
            ),
        ];
        for (parent, expected) in cases {
            let path = CgroupPath::in_cri_parent(parent, "p").unwrap();
            assert_eq!(path.to_string(), expected, "{parent}");
        }
    }

    #[test]
    fn relatives_of_a_cgroup_are_beside_and_below_it() {
        let path = CgroupPath::parse("/a/b").unwrap();
        assert_eq!(path.sibling("s").to_string(), "/a/s");
        assert_eq!(path.slice(), None);
        let unit = CgroupPath::parse("a-b.slice:x:y").unwrap();
        assert_eq!(unit.of_vm().slice(), Some("a-b.slice"));
        assert_eq!(path.child("s").to_string(), "/a/b/s");
        assert_eq!(
            CgroupPath::parse("c").unwrap().sibling("s").to_string(),
            "/s"
        );
        assert_eq!(path.below(Path::new("/sys")), Path::new("/sys/a/b"));
    }
}
