//! Privileges of coffer-qemu, and QEMU as its child.

#![allow(unsafe_code)]

use super::Error;
use crate::jail;
use crate::seccomp::{self, ThreadClass};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};

const QEMU: &str = "qemu-system-x86_64";
/// What is kept of a line that QEMU prints.
const MAX_LINE: usize = 1024;

/// Leaves the host's network and System V objects, and becomes the sandbox's user without any privilege. QEMU
/// inherits all of it and adds its own seccomp filter. It keeps the host's files in view, since it loads its firmware
/// and libraries from there; as that user it can only read what everybody can, and landlock lets it write nowhere.
///
/// The process must have one thread.
pub fn lock_up(uid: u32) -> Result<(), Error> {
    let namespaces = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).map_err(Error::host("make namespaces"))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[]).map_err(Error::host("drop groups"))?;
    setresgid(group, group, group).map_err(Error::host("change the group"))?;
    setresuid(user, user, user).map_err(Error::host("change the user"))?;
    prctl::set_no_new_privs().map_err(Error::host("set no_new_privs"))?;
    jail::enter_first_limits()?;
    Ok(jail::forbid_writes()?)
}

/// Takes away what only the start of the machine needed: new threads and processes, most system calls, and any view of
/// this process's memory. QEMU runs already and keeps its own walls.
pub fn lock_up_further() -> Result<(), Error> {
    prctl::set_dumpable(false).map_err(Error::host("hide from debuggers"))?;
    jail::enter_last_limits(0)?;
    Ok(seccomp::enter_all_threads(ThreadClass::Qemu)?)
}

/// A file that QEMU can open again by the path of its descriptor: the file itself, or a copy in memory where only the
/// one who opened it for us may read it.
pub fn reopenable(file: OwnedFd) -> Result<OwnedFd, Error> {
    if File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).is_ok() {
        return Ok(file);
    }
    let copy = || -> io::Result<OwnedFd> {
        let mut copy = File::from(memfd_create(c"copy", MFdFlags::MFD_CLOEXEC)?);
        io::copy(&mut File::from(file), &mut copy)?;
        Ok(copy.into())
    };
    copy().map_err(Error::host("copy the kernel or the initrd"))
}

/// A running QEMU. Dropping it kills it.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    stderr: BufReader<ChildStderr>,
    last_line: String,
}

impl Qemu {
    /// Starts QEMU with these arguments. It inherits `files` under the numbers they have here.
    pub fn start(arguments: &[OsString], files: &[OwnedFd]) -> Result<Self, Error> {
        let inherited: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new(QEMU);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: prctl and fcntl are async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                for fd in &inherited {
                    nix::errno::Errno::result(libc::fcntl(*fd, libc::F_SETFD, 0))?;
                }
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NoQemu,
            _ => Error::Host {
                what: "start qemu-system-x86_64",
                source: error,
            },
        })?;
        let stderr = child.stderr.take().expect("stderr is a pipe");
        set_nonblocking(&stderr).map_err(Error::host("set up QEMU's stderr"))?;
        Ok(Self {
            child,
            stderr: BufReader::new(stderr),
            last_line: String::new(),
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// QEMU's stderr, for poll.
    pub fn stderr(&self) -> BorrowedFd<'_> {
        self.stderr.get_ref().as_fd()
    }

    /// Passes on what QEMU printed and keeps its last line. False: no more will come.
    pub fn read_stderr(&mut self) -> bool {
        loop {
            let mut line = Vec::new();
            match self
                .stderr
                .by_ref()
                .take(MAX_LINE as u64)
                .read_until(b'\n', &mut line)
            {
                Ok(0) => return false,
                Ok(_) => {
                    let text = String::from_utf8_lossy(&line);
                    let text = text.trim_end().trim_start_matches("qemu-system-x86_64: ");
                    if !text.is_empty() {
                        eprintln!("coffer-qemu: QEMU says: {}", text.escape_debug());
                        text.clone_into(&mut self.last_line);
                    }
                }
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    /// Kills QEMU without waiting.
    pub fn kill(&mut self) {
        // It fails only when QEMU ended already.
        let _ = self.child.kill();
    }

    /// Waits for the end; the reason is QEMU's last words, or how it ended.
    pub fn wait(&mut self) -> String {
        let status = self.child.wait();
        while self.read_stderr() {}
        match status {
            Ok(status) if self.last_line.is_empty() => ended(status),
            Ok(_) => self.last_line.clone(),
            Err(error) => format!("can't wait for it: {error}"),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

fn ended(status: ExitStatus) -> String {
    format!("it ended with {status} and said nothing")
}

fn set_nonblocking(file: &impl AsFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(file.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop)
}
