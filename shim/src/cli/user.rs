//! `--user` and the user of an image, looked up in the container's own etc/passwd and etc/group.

use crate::image::Root;
use std::io;
use std::path::Path;

/// Longest passwd or group file that is read; large sites have some MiB.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// Most supplementary groups that a process can have (NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;

/// Why a user can't be told.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error("the image has no user {0:?} in /etc/passwd")]
    NoUser(String),
    #[error("the image has no group {0:?} in /etc/group")]
    NoGroup(String),
    #[error("can't read {file} of the container")]
    Read {
        file: &'static str,
        source: io::Error,
    },
}

/// Whom a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ResolvedUser {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) additional_gids: Vec<u32>,
    pub(super) home: Option<String>,
}

/// One line of passwd: `name:password:uid:gid:gecos:home:shell`.
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        Some(Self {
            name,
            uid,
            gid: fields.next()?.parse().ok()?,
            home: fields.nth(1).unwrap_or_default(),
        })
    }
}

/// One line of group: `name:password:gid:member,member`.
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        Some(Self {
            name,
            gid: fields.nth(1)?.parse().ok()?,
            members: fields.next().unwrap_or_default(),
        })
    }
}

/// Resolves `user`, `uid`, `user:group` and so on; empty means root. As docker does it: a uid that passwd does not know
/// is taken with group 0, and supplementary groups are the user's unless a group was named.
pub(super) fn resolve(root: &Root, wanted: &str) -> Result<ResolvedUser, UserError> {
    let passwd = read(root, "etc/passwd")?;
    let groups = read(root, "etc/group")?;
    let (user, group) = wanted.split_once(':').unwrap_or((wanted, ""));
    let user = if user.is_empty() { "0" } else { user };
    let number: Option<u32> = user.parse().ok();
    let accounts = || passwd.lines().filter_map(Account::parse);
    let account = accounts()
        .find(|account| account.name == user)
        .or_else(|| number.and_then(|uid| accounts().find(|account| account.uid == uid)));
    let mut resolved = match (&account, number) {
        (Some(account), _) => ResolvedUser {
            uid: account.uid,
            gid: account.gid,
            additional_gids: Vec::new(),
            home: (!account.home.is_empty()).then(|| account.home.to_owned()),
        },
        (None, Some(uid)) => ResolvedUser {
            uid,
            gid: 0,
            additional_gids: Vec::new(),
            home: None,
        },
        (None, None) => return Err(UserError::NoUser(user.into())),
    };
    let groups = groups.lines().filter_map(Group::parse);
    if !group.is_empty() {
        resolved.gid = find_group(groups, group)?;
    } else if let Some(account) = account {
        let own = groups.filter(|group| {
            group
                .members
                .split(',')
                .any(|member| member == account.name)
        });
        resolved.additional_gids = own.map(|group| group.gid).take(MAX_GROUPS).collect();
    }
    Ok(resolved)
}

fn find_group<'a>(
    mut groups: impl Iterator<Item = Group<'a>>,
    wanted: &str,
) -> Result<u32, UserError> {
    if let Some(group) = groups.find(|group| group.name == wanted) {
        return Ok(group.gid);
    }
    wanted
        .parse()
        .map_err(|_| UserError::NoGroup(wanted.into()))
}

/// A missing file is an empty one: images from scratch have none.
fn read(root: &Root, file: &'static str) -> Result<String, UserError> {
    let content = root
        .read(Path::new(file), MAX_FILE_BYTES)
        .map_err(|source| UserError::Read { file, source })?;
    Ok(String::from_utf8_lossy(&content.unwrap_or_default()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn container() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("etc")).unwrap();
        let passwd = "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken:x\nweb:x:33:34:web:/srv:/bin/false\n7:x:8:9::/seven:\n";
        fs::write(directory.path().join("etc/passwd"), passwd).unwrap();
        fs::write(
            directory.path().join("etc/group"),
            "root:x:0:\nweb:x:34:\nlogs:x:40:web,other\nmail:x:41:other,web\n",
        )
        .unwrap();
        let root = Root::open(directory.path()).unwrap();
        (directory, root)
    }

    fn user(uid: u32, gid: u32, additional_gids: &[u32], home: Option<&str>) -> ResolvedUser {
        ResolvedUser {
            uid,
            gid,
            additional_gids: additional_gids.into(),
            home: home.map(Into::into),
        }
    }

    #[test]
    fn names_and_numbers_are_found() {
        let (_directory, root) = container();
        let resolve = |wanted| resolve(&root, wanted).unwrap();
        assert_eq!(resolve(""), user(0, 0, &[], Some("/root")));
        assert_eq!(resolve("web"), user(33, 34, &[40, 41], Some("/srv")));
        assert_eq!(resolve("33"), user(33, 34, &[40, 41], Some("/srv")));
        assert_eq!(resolve("web:logs"), user(33, 40, &[], Some("/srv")));
        assert_eq!(resolve("1000:2000"), user(1000, 2000, &[], None));
        assert_eq!(resolve("1000"), user(1000, 0, &[], None));
        assert_eq!(resolve(":mail"), user(0, 41, &[], Some("/root")));
        // A name of digits is a name first.
        assert_eq!(resolve("7"), user(8, 9, &[], Some("/seven")));
    }

    #[test]
    fn unknown_names_are_told() {
        let (_directory, root) = container();
        assert!(
            resolve(&root, "nobody-here")
                .unwrap_err()
                .to_string()
                .contains("nobody-here")
        );
        assert!(
            resolve(&root, "web:nogroup")
                .unwrap_err()
                .to_string()
                .contains("nogroup")
        );
        assert!(resolve(&root, "4294967296").is_err());
    }

    #[test]
    fn files_are_those_of_the_container() {
        let (directory, root) = container();
        fs::remove_file(directory.path().join("etc/passwd")).unwrap();
        symlink("/etc/shells", directory.path().join("etc/passwd")).unwrap();
        // The host has /etc/shells, the container does not.
        assert_eq!(resolve(&root, "5").unwrap(), user(5, 0, &[], None));
        fs::remove_file(directory.path().join("etc/passwd")).unwrap();
        nix::unistd::mkfifo(
            &directory.path().join("etc/passwd"),
            nix::sys::stat::Mode::S_IRUSR,
        )
        .unwrap();
        assert!(matches!(resolve(&root, "5"), Err(UserError::Read { .. })));
    }
}
