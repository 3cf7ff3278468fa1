//! `linux.cgroupsPath`: where a container's processes are in the host's cgroups.
//!
//! Engines write it in one of two forms: a path within the hierarchy, or `slice:prefix:name` when systemd manages
//! cgroups, which means the scope `prefix-name.scope` in that slice.

use super::Error;

/// Slice of a scope that names none, as with runc.
const DEFAULT_SLICE: &str = "system.slice";

/// The absolute path within the hierarchy.
pub(super) fn absolute(cgroups_path: &str) -> Result<String, Error> {
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let path = match parts[..] {
        [slice, prefix, name] => {
            let unit = match (prefix, name) {
                (_, name) if name.ends_with(".slice") => name.to_owned(),
                ("", name) => format!("{name}.scope"),
                (prefix, name) => format!("{prefix}-{name}.scope"),
            };
            format!("{}/{unit}", expand_slice(slice)?)
        }
        _ => format!("/{}", cgroups_path.trim_start_matches('/')),
    };
    Ok(path)
}

/// The cgroup of the VM. That of a container of its own is in the container's, which so has the figures of all it causes; that of
/// a pod is beside its first container's, below the limits of the pod, and does not end with that container.
pub(super) fn of_sandbox(container: &str, sandbox: &str, is_pod: bool) -> String {
    let parent = container.rsplit_once('/').map_or("", |(parent, _)| parent);
    if is_pod {
        format!("{parent}/coffer-{sandbox}")
    } else {
        format!("{container}/coffer-vm")
    }
}

/// `a-b.slice` is below `a.slice`; `-.slice` is the root.
fn expand_slice(slice: &str) -> Result<String, Error> {
    let slice = if slice.is_empty() {
        DEFAULT_SLICE
    } else {
        slice
    };
    let wrong = || {
        Error::Usage(format!(
            "config.json: linux.cgroupsPath: {slice:?} is no slice"
        ))
    };
    let name = slice.strip_suffix(".slice").ok_or_else(wrong)?;
    if name == "-" {
        return Ok(String::new());
    }
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return Err(wrong());
    }
    let mut path = String::new();
    for (i, _) in name.match_indices('-').chain([(name.len(), "")]) {
        path.push_str(&format!("/{}.slice", &name[..i]));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_become_paths() {
        let of = |path: &str| absolute(path).unwrap();
        assert_eq!(of("/libpod_parent/libpod-1"), "/libpod_parent/libpod-1");
        assert_eq!(of("docker/1"), "/docker/1");
        assert_eq!(
            of("machine.slice:libpod:1"),
            "/machine.slice/libpod-1.scope"
        );
        assert_eq!(of(":crio:1"), "/system.slice/crio-1.scope");
        assert_eq!(
            of("kubepods-burstable-pod2.slice:crio:1"),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod2.slice/crio-1.scope"
        );
        assert_eq!(of("-.slice::x"), "/x.scope");
        for bad in ["a:b:c", "a--b.slice:x:y", "/a.slice:x:y"] {
            assert!(absolute(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn the_vm_of_a_pod_is_beside_its_first_container() {
        assert_eq!(of_sandbox("/a/b/c", "s", true), "/a/b/coffer-s");
        assert_eq!(of_sandbox("/c", "s", true), "/coffer-s");
        assert_eq!(of_sandbox("/a/c", "c", false), "/a/c/coffer-vm");
    }
}
