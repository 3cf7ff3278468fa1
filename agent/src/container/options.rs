//! Mount options of the OCI spec, as flags of the mount system calls.

use nix::mount::MsFlags;

use super::mount_api::{
    Depth, MOUNT_ATTR_ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_STRICTATIME, MountAttr,
};

/// The options of one mount, parsed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// `bind` or `rbind`.
    pub bind: Option<Depth>,
    /// For the mount itself.
    pub attr: MountAttr,
    /// For it and all below it: `rro` and its like.
    pub recursive_attr: MountAttr,
    /// Applied in this order after the mount is attached.
    pub propagation: Vec<(Depth, MsFlags)>,
    /// Copies what the mount will hide into the new tmpfs.
    pub copy_up: bool,
    /// What only the file system understands.
    pub parameters: Vec<(String, Option<String>)>,
}

/// Option, whether it sets or clears, and what.
const ATTRIBUTES: &[(&str, bool, u64)] = &[
    ("ro", true, MOUNT_ATTR_RDONLY),
    ("rw", false, MOUNT_ATTR_RDONLY),
    ("nosuid", true, MOUNT_ATTR_NOSUID),
    ("suid", false, MOUNT_ATTR_NOSUID),
    ("nodev", true, MOUNT_ATTR_NODEV),
    ("dev", false, MOUNT_ATTR_NODEV),
    ("noexec", true, MOUNT_ATTR_NOEXEC),
    ("exec", false, MOUNT_ATTR_NOEXEC),
    ("nodiratime", true, MOUNT_ATTR_NODIRATIME),
    ("diratime", false, MOUNT_ATTR_NODIRATIME),
    ("nosymfollow", true, MOUNT_ATTR_NOSYMFOLLOW),
    ("symfollow", false, MOUNT_ATTR_NOSYMFOLLOW),
    ("noatime", true, MOUNT_ATTR_NOATIME),
    ("strictatime", true, MOUNT_ATTR_STRICTATIME),
    // The rest is the kernel's default, relatime, which is 0.
    ("relatime", false, MOUNT_ATTR_ATIME),
    ("atime", false, MOUNT_ATTR_ATIME),
    ("norelatime", false, MOUNT_ATTR_ATIME),
    ("nostrictatime", false, MOUNT_ATTR_ATIME),
];

const PROPAGATION: &[(&str, Depth, MsFlags)] = &[
    ("shared", Depth::One, MsFlags::MS_SHARED),
    ("rshared", Depth::Recursive, MsFlags::MS_SHARED),
    ("slave", Depth::One, MsFlags::MS_SLAVE),
    ("rslave", Depth::Recursive, MsFlags::MS_SLAVE),
    ("private", Depth::One, MsFlags::MS_PRIVATE),
    ("rprivate", Depth::Recursive, MsFlags::MS_PRIVATE),
    ("unbindable", Depth::One, MsFlags::MS_UNBINDABLE),
    ("runbindable", Depth::Recursive, MsFlags::MS_UNBINDABLE),
];

/// They change nothing: the kernel's default, or only how loud it is.
const WITHOUT_EFFECT: &[&str] = &["defaults", "silent", "loud"];

/// Known to mount(8) and to other runtimes, but not here.
const REFUSED: &[&str] = &["remount", "idmap", "ridmap", "iversion", "noiversion"];

/// The propagation an option or `linux.rootfsPropagation` names.
pub fn propagation(name: &str) -> Option<(Depth, MsFlags)> {
    PROPAGATION
        .iter()
        .find(|(n, ..)| *n == name)
        .map(|(_, depth, flags)| (*depth, *flags))
}

/// Parses; the error is the option that can't be honoured.
pub fn parse<S: AsRef<str>>(options: &[S]) -> Result<MountOptions, String> {
    let mut parsed = MountOptions::default();
    for option in options.iter().map(AsRef::as_ref) {
        if let Some(found) = attribute(option) {
            change(&mut parsed.attr, found);
        } else if let Some(found) = option.strip_prefix('r').and_then(attribute) {
            change(&mut parsed.recursive_attr, found);
        } else if let Some(found) = propagation(option) {
            parsed.propagation.push(found);
        } else if REFUSED.contains(&option) {
            return Err(option.to_owned());
        } else if !WITHOUT_EFFECT.contains(&option) {
            match option {
                "bind" => parsed.bind = parsed.bind.or(Some(Depth::One)),
                "rbind" => parsed.bind = Some(Depth::Recursive),
                "tmpcopyup" => parsed.copy_up = true,
                _ => parsed.parameters.push(parameter(option)),
            }
        }
    }
    // A bind mount has no file system of its own that could take them.
    match (parsed.bind, parsed.parameters.first()) {
        (Some(_), Some((key, _))) => Err(key.clone()),
        _ => Ok(parsed),
    }
}

fn attribute(option: &str) -> Option<(bool, u64)> {
    ATTRIBUTES
        .iter()
        .find(|(name, ..)| *name == option)
        .map(|(_, set, flag)| (*set, *flag))
}

/// A later option wins over an earlier one.
fn change(attr: &mut MountAttr, (set, flag): (bool, u64)) {
    // The access time modes are one field: it is cleared as a whole before one is set.
    let field = if flag & MOUNT_ATTR_ATIME == 0 {
        flag
    } else {
        MOUNT_ATTR_ATIME
    };
    attr.set &= !field;
    attr.clear &= !field;
    if set {
        attr.set |= flag;
    }
    if !set || field == MOUNT_ATTR_ATIME {
        attr.clear |= field;
    }
}

fn parameter(option: &str) -> (String, Option<String>) {
    match option.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (option.to_owned(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_option_wins() {
        let attr = parse(&["ro", "nosuid", "rw"]).unwrap().attr;
        assert_eq!(
            (attr.set, attr.clear),
            (MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY)
        );
    }

    #[test]
    fn access_time_is_one_field() {
        let attr = parse(&["noatime", "strictatime"]).unwrap().attr;
        assert_eq!(
            (attr.set, attr.clear),
            (MOUNT_ATTR_STRICTATIME, MOUNT_ATTR_ATIME)
        );
        let attr = parse(&["noatime", "relatime"]).unwrap().attr;
        assert_eq!((attr.set, attr.clear), (0, MOUNT_ATTR_ATIME));
    }

    #[test]
    fn recursive_options_are_kept_apart() {
        let parsed = parse(&["rbind", "rro", "relatime"]).unwrap();
        assert_eq!(parsed.bind, Some(Depth::Recursive));
        assert_eq!(parsed.recursive_attr.set, MOUNT_ATTR_RDONLY);
        assert_eq!((parsed.attr.set, parsed.attr.clear), (0, MOUNT_ATTR_ATIME));
    }

    #[test]
    fn what_the_file_system_must_understand_is_passed_on() {
        let parsed = parse(&["mode=755", "newinstance"]).unwrap();
        let expected = [
            ("mode".into(), Some("755".into())),
            ("newinstance".into(), None),
        ];
        assert_eq!(parsed.parameters, expected);
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        assert_eq!(parse(&["bind", "idmap"]), Err("idmap".into()));
        assert_eq!(parse(&["remount"]), Err("remount".into()));
        assert_eq!(parse(&["bind", "size=1m"]), Err("size".into()));
    }
}
