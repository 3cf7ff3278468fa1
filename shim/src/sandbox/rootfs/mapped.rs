//! Roots of containers with a user namespace: containerd 2 asks for other owners than on disk by the options `uidmap` and `gidmap`.
//!
//! An overlay's layers are mapped, below it; any other mount is mapped itself. All of it is made in a mount namespace of its own, out of
//! which only the finished mount comes, so that nothing else is left by whatever end.

use super::{Options, common_directory, do_mount};
use crate::share::IdMap;
use coffer_mount::{Depth, attach, clone_tree, map_owners};
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::chdir;
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The layers of an overlay.
const LAYERS: &str = "lowerdir=";

/// The mappings of an option: `CONTAINER:HOST:SIZE`, some of them with commas between.
pub(super) fn parse(list: &str) -> Option<Vec<LinuxIdMapping>> {
    let one = |mapping: &str| {
        let mut numbers = mapping.split(':').map(|number| number.parse::<u32>().ok());
        let [inside, outside, size] = [numbers.next()??, numbers.next()??, numbers.next()??];
        let mapping = LinuxIdMappingBuilder::default()
            .container_id(inside)
            .host_id(outside)
            .size(size);
        let complete = numbers.next().is_none() && size > 0;
        mapping.build().ok().filter(|_| complete)
    };
    list.split(',').map(one).collect()
}

/// Mounts on `target`, with other owners.
pub(super) fn mount_on(
    from: &Path,
    target: &Path,
    fs_type: &str,
    options: &Options,
    owners: &IdMap,
) -> io::Result<()> {
    let namespace = owners.user_namespace()?;
    let make = || -> io::Result<OwnedFd> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        let layers = options
            .data
            .iter()
            .position(|option| option.starts_with(LAYERS));
        let Some(layers) = layers.filter(|_| fs_type == "overlay") else {
            do_mount(
                from,
                target,
                fs_type,
                options.flags,
                &options.data.join(","),
            )?;
            let tree = clone_tree(directory(target)?, Depth::Recursive)?;
            map_owners(&tree, Depth::Recursive, &namespace)?;
            return Ok(tree);
        };
        let mut data = options.data.clone();
        data[layers] = map_layers(&data[layers], target, &namespace)?;
        do_mount(from, target, fs_type, options.flags, &data.join(","))?;
        Ok(clone_tree(directory(target)?, Depth::One)?)
    };
    let tree = std::thread::scope(|scope| {
        let made = scope.spawn(make).join();
        made.unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })?;
    Ok(attach(tree, directory(target)?)?)
}

/// Puts the directory that all layers are in on `point`, with other owners, and makes it this thread's; gives the layers relative to it.
fn map_layers(option: &str, point: &Path, namespace: &OwnedFd) -> io::Result<String> {
    let layers = option.trim_start_matches(LAYERS).split(':');
    let layers: Vec<&Path> = layers.map(Path::new).collect();
    let base = common_directory(&layers);
    let relative: Option<Vec<&str>> = layers
        .iter()
        .map(|layer| layer.strip_prefix(&base).ok()?.to_str())
        .collect();
    let relative = relative.ok_or_else(|| io::Error::other("a layer's path is not UTF-8"))?;
    let tree = clone_tree(directory(&base)?, Depth::One)?;
    map_owners(&tree, Depth::One, namespace)?;
    attach(tree, directory(point)?)?;
    chdir(point)?;
    Ok(format!("{LAYERS}{}", relative.join(":")))
}

fn directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::super::{RootfsMount, mount_all};
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;

    #[test]
    fn mappings_are_three_numbers_each() {
        let two = parse("0:100000:65536,70000:1:5").unwrap();
        let numbers = |m: &LinuxIdMapping| (m.container_id(), m.host_id(), m.size());
        assert_eq!(numbers(&two[0]), (0, 100_000, 65_536));
        assert_eq!(numbers(&two[1]), (70_000, 1, 5));
        for wrong in ["", "0:1", "0:1:2:3", "0:1:0", "a:1:2", "0:1:2,"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn files_of_a_root_have_the_owners_of_its_user_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two, upper, work, target] =
            ["l/1/fs", "l/2/fs", "upper", "work", "target"].map(|name| dir.path().join(name));
        for made in [&one, &two, &upper, &work] {
            fs::create_dir_all(made).unwrap();
        }
        fs::write(one.join("one"), "x").unwrap();
        fs::write(two.join("two"), "x").unwrap();
        let maps = ["uidmap=0:100000:65536", "gidmap=0:200000:65536"].map(str::to_owned);
        let option = |name: &str, value: String| format!("{name}={value}");
        let mut options = vec![
            option("lowerdir", format!("{}:{}", two.display(), one.display())),
            option("upperdir", upper.display().to_string()),
            option("workdir", work.display().to_string()),
        ];
        options.extend(maps.clone());
        let root = |fs_type: &str, source: &Path, options: Vec<String>| RootfsMount {
            fs_type: fs_type.into(),
            source: source.into(),
            target: PathBuf::new(),
            options,
        };
        let owners = |name: &str| {
            let meta = fs::metadata(target.join(name)).unwrap();
            (meta.uid(), meta.gid())
        };
        mount_all(&[root("overlay", Path::new("overlay"), options)], &target).unwrap();
        assert_eq!(
            (owners("one"), owners("two")),
            ((100_000, 200_000), (100_000, 200_000))
        );
        crate::cleanup::unmount(&target).unwrap();
        assert_eq!(
            fs::read_dir(&target).unwrap().count(),
            0,
            "the layers are left"
        );

        let bind = [vec!["rbind".to_owned(), "ro".to_owned()], maps.to_vec()].concat();
        mount_all(&[root("bind", &one, bind)], &target).unwrap();
        assert_eq!(owners("one"), (100_000, 200_000));
        assert!(
            fs::write(target.join("new"), "x").is_err(),
            "it is read-only"
        );
        crate::cleanup::unmount(&target).unwrap();
    }
}
