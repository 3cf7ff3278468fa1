//! The program that a process executes: its arguments, its environment, and the file.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use coffer_proto::exec_failure::Unexecutable;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{AccessFlags, faccessat};
use oci_spec::runtime::Process;

use super::failure::Failure;
use super::root::Root;

/// Of /etc/passwd no more is read to find a home directory.
const MAX_PASSWD: u64 = 1 << 20;

/// Refuses a program that is not there or can't be executed by anybody, as runc does before anyone waits for it. A program that
/// depends on the working directory is only looked for at the start.
pub fn check(process: &Process, root: &Root) -> Result<(), Failure> {
    let Some(name) = process.args().iter().flatten().next() else {
        return Ok(());
    };
    let env = environment(process, root)?;
    let absolute = |name: &str| name.starts_with('/');
    if absolute(name) || !name.contains('/') && search_path(&env).split(':').all(absolute) {
        find(name, &env)?;
    }
    Ok(())
}

/// The program as the spec names it; empty if it has none.
pub fn name(process: &Process) -> &str {
    let first = process.args().iter().flatten().next();
    first.map_or("", String::as_str)
}

fn search_path(env: &[String]) -> &str {
    let mut values = env.iter().rev();
    values
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or("")
}

/// The environment of the spec, with HOME from the container's passwd file where it has none.
pub fn environment(process: &Process, root: &Root) -> Result<Vec<String>, Failure> {
    let mut env = process.env().clone().unwrap_or_default();
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        let home = home_directory(root, process.user().uid()).unwrap_or_else(|| "/".into());
        env.push(format!("HOME={home}"));
    }
    Ok(env)
}

fn home_directory(root: &Root, uid: u32) -> Option<String> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let fd = root.open(Path::new("/etc/passwd"), flags).ok()?;
    if fstat(&fd).ok()?.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return None;
    }
    let mut text = Vec::new();
    File::from(fd)
        .take(MAX_PASSWD)
        .read_to_end(&mut text)
        .ok()?;
    home_in_passwd(&String::from_utf8_lossy(&text), uid)
}

/// name:password:uid:gid:comment:home:shell
fn home_in_passwd(text: &str, uid: u32) -> Option<String> {
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let is_user = fields.get(2)?.parse() == Ok(uid);
        let home = fields
            .get(5)
            .filter(|home| !home.is_empty() && !home.contains('\0'))?;
        is_user.then(|| (*home).to_owned())
    })
}

/// The file to execute, found as execvp(3) would with the process's own PATH.
pub fn find(name: &str, env: &[String]) -> Result<CString, Failure> {
    let candidates: Vec<PathBuf> = if name.contains('/') {
        vec![PathBuf::from(name)]
    } else {
        search_path(env)
            .split(':')
            .map(|directory| if directory.is_empty() { "." } else { directory })
            .map(|directory| Path::new(directory).join(name))
            .collect()
    };
    let mut denied = None;
    for candidate in candidates {
        match check_executable(&candidate) {
            Ok(()) => {
                return CString::new(candidate.into_os_string().into_encoded_bytes())
                    .map_err(|_| Failure::exec_errno(name, Errno::ENOENT));
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno) => denied = denied.or(Some(errno)),
        }
    }
    match denied {
        Some(errno) => Err(Failure::exec_errno(name, errno)),
        None if name.contains('/') => Err(Failure::exec_errno(name, Errno::ENOENT)),
        None => Err(Failure::exec(
            name,
            Unexecutable::NotFound,
            "executable file not found in $PATH",
        )),
    }
}

/// A link of /proc is no program: /proc/self/exe is the agent here.
fn check_executable(path: &Path) -> nix::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let how = OpenHow::new()
        .flags(flags)
        .resolve(ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let fd = openat2(AT_FDCWD, path, how)?;
    if fstat(&fd)?.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Err(Errno::EACCES);
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

pub fn c_strings<S: AsRef<str>>(strings: &[S]) -> Result<Vec<CString>, Failure> {
    let convert = |s: &S| CString::new(s.as_ref());
    strings
        .iter()
        .map(convert)
        .collect::<Result<_, _>>()
        .map_err(|error| Failure::new("process.args or process.env", error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_found_by_uid() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\nx:x:5:5:::\n";
        assert_eq!(home_in_passwd(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(home_in_passwd(passwd, 5), None);
        assert_eq!(home_in_passwd(passwd, 1), None);
    }

    #[test]
    fn programs_are_found_in_path_or_told_why_not() {
        let path = |dirs: &str| vec!["A=b".to_owned(), format!("PATH={dirs}")];
        let found = find("sh", &path("/nowhere:/bin")).unwrap();
        assert_eq!(found.as_c_str(), c"/bin/sh");
        let cases = [
            (
                "sh",
                "/nowhere",
                127,
                "exec: \"sh\": executable file not found in $PATH",
            ),
            (
                "/bin/none",
                "/bin",
                127,
                "exec: \"/bin/none\": no such file or directory",
            ),
            (
                "/etc/passwd",
                "/bin",
                126,
                "exec: \"/etc/passwd\": permission denied",
            ),
            ("/etc", "/bin", 126, "exec: \"/etc\": permission denied"),
            (
                "/proc/self/exe",
                "/bin",
                126,
                "exec: \"/proc/self/exe\": too many symbolic links encountered",
            ),
        ];
        for (name, dirs, status, message) in cases {
            let failure = find(name, &path(dirs)).unwrap_err();
            assert_eq!(
                (failure.status, failure.message.as_str()),
                (Some(status), message)
            );
        }
    }
}
