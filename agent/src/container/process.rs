//! From the `process` block of the OCI spec to execve(2).
//!
//! What can fail is parsed and compiled in [`Launcher::new`] and set in [`Launcher::prepare`], both before the process
//! waits to be started. [`Launcher::launch`] is the rest: streams, filter, user, capabilities, program.
#![allow(unsafe_code, reason = "system calls without wrapper")]

use std::convert::Infallible;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::{Mode, SFlag, fstat, umask};
use nix::unistd::{Gid, Uid, fchdir, fchown, setgroups, setresgid, setresuid};
use oci_spec::runtime::{LinuxPersonality, LinuxPersonalityDomain, LinuxSeccomp, Process, User};

use super::capabilities::{self, Sets};
use super::failure::{Failure, at};
use super::root::Root;
use super::{console, program, scheduling, seccomp};

/// As login(1) and other runtimes have it, where the spec says nothing.
const DEFAULT_UMASK: u32 = 0o022;

/// What becomes the standard streams.
#[derive(Debug)]
pub enum Streams {
    Fds([OwnedFd; 3]),
    Terminal(OwnedFd),
}

/// A process block, ready to be carried out.
#[derive(Debug)]
pub struct Launcher<'a> {
    process: &'a Process,
    capabilities: Sets,
    filter: Option<seccomp::Filter>,
    personality: Option<&'a LinuxPersonality>,
}

impl<'a> Launcher<'a> {
    pub fn new(
        process: &'a Process,
        profile: Option<&LinuxSeccomp>,
        personality: Option<&'a LinuxPersonality>,
    ) -> Result<Self, Failure> {
        let capabilities = match process.capabilities() {
            Some(sets) => capabilities::parse(sets).map_err(|(set, reason)| {
                Failure::new(format!("process.capabilities.{set}"), reason)
            })?,
            None => Sets::default(),
        };
        let filter = profile.map(seccomp::compile).transpose()?;
        Ok(Self {
            process,
            capabilities,
            filter,
            personality,
        })
    }

    /// Sets what the process may have long before it runs its program.
    pub fn prepare(&self) -> Result<(), Failure> {
        scheduling::apply(self.process)?;
        new_session_keyring()
    }

    /// Becomes the user's program. Returns only if that failed.
    pub fn launch(self, root: &Root, streams: &Streams) -> Result<Infallible, Failure> {
        let user = self.process.user();
        let env = program::environment(self.process, root)?;
        take_streams(streams, user)?;
        set_personality(self.personality)?;
        let no_new_privs = self.process.no_new_privileges() == Some(true);
        if no_new_privs {
            prctl::set_no_new_privs().map_err(at("set no_new_privs"))?;
        } else if let Some(filter) = &self.filter {
            // Without no_new_privs this takes CAP_SYS_ADMIN, which the process may be about to lose.
            filter.load()?;
        }
        self.become_user(user)?;
        enter_cwd(root, self.process.cwd())?;
        let args = program::c_strings(self.process.args().as_deref().unwrap_or_default())?;
        let name = program::name(self.process);
        let file = program::find(name, &env)?;
        let env = program::c_strings(&env)?;
        reset_signals().map_err(at("reset signals"))?;
        close_on_exec().map_err(at("close_range"))?;
        if let (true, Some(filter)) = (no_new_privs, &self.filter) {
            filter.load()?;
        }
        let errno = match nix::unistd::execve(&file, &args, &env) {
            Ok(never) => match never {},
            Err(errno) => errno,
        };
        // The file was there a moment ago: if something is not found now, it is its interpreter.
        Err(Failure::exec_errno(name, errno))
    }

    fn become_user(&self, user: &User) -> Result<(), Failure> {
        umask(Mode::from_bits_truncate(
            user.umask().unwrap_or(DEFAULT_UMASK) & 0o777,
        ));
        self.capabilities.limit_bounding()?;
        // The permitted set has to survive the change of user, to be cut down to the spec's afterwards.
        prctl::set_keepcaps(true).map_err(at("keep capabilities"))?;
        let groups: Vec<Gid> = user
            .additional_gids()
            .iter()
            .flatten()
            .map(|gid| Gid::from_raw(*gid))
            .collect();
        setgroups(&groups).map_err(at(format!("set process.user.additionalGids {groups:?}")))?;
        let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
        setresgid(gid, gid, gid).map_err(at(format!("set process.user.gid {gid}")))?;
        setresuid(uid, uid, uid).map_err(at(format!("set process.user.uid {uid}")))?;
        self.capabilities.apply()?;
        prctl::set_keepcaps(false).map_err(at("keep capabilities"))
    }
}

/// Puts the streams in their places, owned by the user so that /dev/stdout can be opened again.
fn take_streams(streams: &Streams, user: &User) -> Result<(), Failure> {
    let step = "set up the standard streams";
    let fds: [&OwnedFd; 3] = match streams {
        Streams::Fds([stdin, stdout, stderr]) => [stdin, stdout, stderr],
        Streams::Terminal(slave) => [slave; 3],
    };
    if let Streams::Terminal(slave) = streams {
        console::control(std::os::fd::AsFd::as_fd(slave))?;
    }
    for (fd, number) in fds.into_iter().zip(0..) {
        let stat = fstat(fd).map_err(at(step))?;
        let is_null = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits()
            && matches!(streams, Streams::Fds(_));
        if !is_null {
            match fchown(fd, Some(Uid::from_raw(user.uid())), None) {
                // Not mapped, or a file system without owners: the process can still use what it has open.
                Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS) => {}
                Err(errno) => return Err(at(step)(errno)),
            }
        }
        // SAFETY: both are plain descriptor numbers; 0, 1 and 2 belong to nobody in this process any more.
        Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), number) }).map_err(at(step))?;
    }
    Ok(())
}

/// Keys that the agent or another process has are none of this one's business.
fn new_session_keyring() -> Result<(), Failure> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    let name: *const libc::c_char = std::ptr::null();
    // SAFETY: no name makes a new anonymous keyring.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name) };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(at("make a session keyring")(errno)),
    }
}

fn set_personality(personality: Option<&LinuxPersonality>) -> Result<(), Failure> {
    /// linux/personality.h
    const PER_LINUX32: libc::c_int = 0x0008;
    let domain = match personality.map(LinuxPersonality::domain) {
        None => return Ok(()),
        Some(LinuxPersonalityDomain::PerLinux) => 0,
        Some(LinuxPersonalityDomain::PerLinux32) => PER_LINUX32,
    };
    // SAFETY: takes one integer.
    Errno::result(unsafe { libc::personality(libc::c_ulong::from(domain.cast_unsigned())) })
        .map(|_| ())
        .map_err(at("set linux.personality"))
}

/// Never through a link of /proc, which could lead to a directory of the guest that is still open here.
fn enter_cwd(root: &Root, cwd: &Path) -> Result<(), Failure> {
    root.open(cwd, OFlag::O_PATH | OFlag::O_DIRECTORY)
        .and_then(fchdir)
        .map_err(at(format!("enter process.cwd {}", cwd.display())))
}

/// Rust ignores SIGPIPE, and execve keeps what is ignored or blocked.
fn reset_signals() -> nix::Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: sets the default action; the two signals that can't be changed give EINVAL.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

fn close_on_exec() -> nix::Result<()> {
    // SAFETY: marks all descriptors above stderr, and closes none.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    Errno::result(result).map(|_| ())
}

/// What a stream that nobody asked for is connected to.
pub fn null_device() -> nix::Result<OwnedFd> {
    let path: &CStr = c"/dev/null";
    nix::fcntl::open(path, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
}
