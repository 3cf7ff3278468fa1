//! Mount options of the OCI spec, as flags of the mount system calls.

use coffer_mount::{Attributes, Change, Depth, Propagation};

/// The options of one mount, parsed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// `bind` or `rbind`.
    pub bind: Option<Depth>,
    /// For the mount itself.
    pub change: Change,
    /// For it and all below it: `rro` and its like.
    pub recursive_change: Change,
    /// Applied in this order after the mount is attached.
    pub propagation: Vec<(Depth, Propagation)>,
    /// Copies what the mount will hide into the new tmpfs.
    pub copy_up: bool,
    /// What only the file system understands.
    pub parameters: Vec<(String, Option<String>)>,
}

/// Option, whether it sets or clears, and what.
const ATTRIBUTES: &[(&str, bool, Attributes)] = &[
    ("ro", true, Attributes::RDONLY),
    ("rw", false, Attributes::RDONLY),
    ("nosuid", true, Attributes::NOSUID),
    ("suid", false, Attributes::NOSUID),
    ("nodev", true, Attributes::NODEV),
    ("dev", false, Attributes::NODEV),
    ("noexec", true, Attributes::NOEXEC),
    ("exec", false, Attributes::NOEXEC),
    ("nodiratime", true, Attributes::NODIRATIME),
    ("diratime", false, Attributes::NODIRATIME),
    ("nosymfollow", true, Attributes::NOSYMFOLLOW),
    ("symfollow", false, Attributes::NOSYMFOLLOW),
    ("noatime", true, Attributes::NOATIME),
    ("strictatime", true, Attributes::STRICTATIME),
    // The rest is the kernel's default, relatime, which is 0.
    ("relatime", false, Attributes::ATIME),
    ("atime", false, Attributes::ATIME),
    ("norelatime", false, Attributes::ATIME),
    ("nostrictatime", false, Attributes::ATIME),
];

const PROPAGATION: &[(&str, Depth, Propagation)] = &[
    ("shared", Depth::One, Propagation::Shared),
    ("rshared", Depth::Recursive, Propagation::Shared),
    ("slave", Depth::One, Propagation::Slave),
    ("rslave", Depth::Recursive, Propagation::Slave),
    ("private", Depth::One, Propagation::Private),
    ("rprivate", Depth::Recursive, Propagation::Private),
    ("unbindable", Depth::One, Propagation::Unbindable),
    ("runbindable", Depth::Recursive, Propagation::Unbindable),
];

/// They change nothing: the kernel's default, or only how loud it is.
const WITHOUT_EFFECT: &[&str] = &["defaults", "silent", "loud"];

/// Known to mount(8) and to other runtimes, but not here.
const REFUSED: &[&str] = &["remount", "idmap", "ridmap", "iversion", "noiversion"];

/// The propagation an option or `linux.rootfsPropagation` names.
pub fn propagation(name: &str) -> Option<(Depth, Propagation)> {
    PROPAGATION
        .iter()
        .find(|(n, ..)| *n == name)
        .map(|(_, depth, propagation)| (*depth, *propagation))
}

/// Parses; the error is the option that can't be honoured.
pub fn parse<S: AsRef<str>>(options: &[S]) -> Result<MountOptions, String> {
    let mut parsed = MountOptions::default();
    for option in options.iter().map(AsRef::as_ref) {
        if let Some(found) = attribute(option) {
            apply(&mut parsed.change, found);
        } else if let Some(found) = option.strip_prefix('r').and_then(attribute) {
            apply(&mut parsed.recursive_change, found);
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

fn attribute(option: &str) -> Option<(bool, Attributes)> {
    ATTRIBUTES
        .iter()
        .find(|(name, ..)| *name == option)
        .map(|(_, set, flag)| (*set, *flag))
}

/// A later option wins over an earlier one.
fn apply(change: &mut Change, (set, attribute): (bool, Attributes)) {
    // The access time modes are one field: it is cleared as a whole before one is set.
    let is_mode = attribute.intersects(Attributes::ATIME);
    let field = if is_mode {
        Attributes::ATIME
    } else {
        attribute
    };
    change.set.remove(field);
    change.clear.remove(field);
    if set {
        change.set |= attribute;
    }
    if !set || is_mode {
        change.clear |= field;
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
        let change = parse(&["ro", "nosuid", "rw"]).unwrap().change;
        assert_eq!(
            (change.set, change.clear),
            (Attributes::NOSUID, Attributes::RDONLY)
        );
    }

    #[test]
    fn access_time_is_one_field() {
        let change = parse(&["noatime", "strictatime"]).unwrap().change;
        assert_eq!(
            (change.set, change.clear),
            (Attributes::STRICTATIME, Attributes::ATIME)
        );
        let change = parse(&["noatime", "relatime"]).unwrap().change;
        assert_eq!(
            (change.set, change.clear),
            (Attributes::empty(), Attributes::ATIME)
        );
    }

    #[test]
    fn recursive_options_are_kept_apart() {
        let parsed = parse(&["rbind", "rro", "relatime"]).unwrap();
        assert_eq!(parsed.bind, Some(Depth::Recursive));
        assert_eq!(parsed.recursive_change.set, Attributes::RDONLY);
        assert_eq!(
            (parsed.change.set, parsed.change.clear),
            (Attributes::empty(), Attributes::ATIME)
        );
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
