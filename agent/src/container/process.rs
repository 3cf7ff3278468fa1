//! From the `process` block of the OCI spec to execve(2).
//!
//! What can fail is parsed and compiled in [`Launcher::new`] and set in [`Launcher::prepare`], both before the process
//! waits to be started. [`Launcher::launch`] is the rest: streams, filter, user, capabilities, program.
#![allow(unsafe_code, reason = "system calls without wrapper")]

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use coffer_proto::exec_failure::Unexecutable;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::{Mode, SFlag, fstat, umask};
use nix::unistd::{
    AccessFlags, Gid, Uid, faccessat, fchdir, fchown, setgroups, setresgid, setresuid,
};
use oci_spec::runtime::{
    IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, LinuxSeccomp, PosixRlimit, PosixRlimitType, Process, Scheduler, User,
};

use super::capabilities::{self, Sets};
use super::failure::{Failure, at};
use super::root::Root;
use super::{console, seccomp};

/// As login(1) and other runtimes have it, where the spec says nothing.
const DEFAULT_UMASK: u32 = 0o022;
/// Of /etc/passwd no more is read to find a home directory.
const MAX_PASSWD: u64 = 1 << 20;

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
        for limit in self.process.rlimits().iter().flatten() {
            set_rlimit(limit)?;
        }
        if let Some(priority) = self.process.io_priority() {
            set_io_priority(priority.class(), priority.priority())?;
        }
        if let Some(scheduler) = self.process.scheduler() {
            set_scheduler(scheduler)?;
        }
        new_session_keyring()
    }

    /// Refuses a program that is not there or can't be executed by anybody, as runc does before anyone waits for it. A program that
    /// depends on the working directory is only looked for at the start.
    pub fn check_program(&self, root: &Root) -> Result<(), Failure> {
        let env = environment(self.process, root)?;
        let path = env
            .iter()
            .rev()
            .find_map(|entry| entry.strip_prefix("PATH="));
        let absolute = |name: &str| name.starts_with('/');
        match self.process.args().iter().flatten().next() {
            Some(name) if absolute(name) => find_program(name, &env).map(drop),
            Some(name) if !name.contains('/') && path.unwrap_or("").split(':').all(absolute) => {
                find_program(name, &env).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Becomes the user's program. Returns only if that failed.
    pub fn launch(self, root: &Root, streams: &Streams) -> Result<Infallible, Failure> {
        let user = self.process.user();
        let env = environment(self.process, root)?;
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
        let args = c_strings(self.process.args().as_deref().unwrap_or_default())?;
        let name = self
            .process
            .args()
            .iter()
            .flatten()
            .next()
            .map_or("", String::as_str);
        let program = find_program(name, &env)?;
        let env = c_strings(&env)?;
        reset_signals().map_err(at("reset signals"))?;
        close_on_exec().map_err(at("close_range"))?;
        if let (true, Some(filter)) = (no_new_privs, &self.filter) {
            filter.load()?;
        }
        let errno = match nix::unistd::execve(&program, &args, &env) {
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

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}

fn set_rlimit(limit: &PosixRlimit) -> Result<(), Failure> {
    let step = format!("set {} to {}:{}", limit.typ(), limit.soft(), limit.hard());
    setrlimit(resource(limit.typ()), limit.soft(), limit.hard()).map_err(at(step))
}

/// The ranges that the kernel would take silently or refuse without saying why.
pub fn check_scheduling(process: &Process) -> Result<(), (&'static str, String)> {
    if let Some(priority) = process.io_priority()
        && !(0..=7).contains(&priority.priority())
    {
        return Err((
            "ioPriority.priority",
            format!("{} is not 0 to 7", priority.priority()),
        ));
    }
    let policy = process
        .scheduler()
        .as_ref()
        .map(|scheduler| *scheduler.policy());
    if policy == Some(LinuxSchedulerPolicy::SchedIso) {
        return Err(("scheduler.policy", "SCHED_ISO is not in Linux".into()));
    }
    Ok(())
}

fn set_io_priority(class: IOPriorityClass, priority: i64) -> Result<(), Failure> {
    // linux/ioprio.h
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_SHIFT: u32 = 13;
    let class: i64 = match class {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let value = (class << IOPRIO_CLASS_SHIFT) | priority;
    // SAFETY: three integers; 0 is the calling process.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) })
        .map(|_| ())
        .map_err(at("set process.ioPriority"))
}

fn set_scheduler(scheduler: &Scheduler) -> Result<(), Failure> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther | LinuxSchedulerPolicy::SchedIso => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    let attr = libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).unwrap_or_default(),
        sched_policy: policy.cast_unsigned(),
        sched_flags: flags,
        sched_nice: scheduler.nice().unwrap_or(0),
        sched_priority: scheduler.priority().unwrap_or(0).cast_unsigned(),
        sched_runtime: scheduler.runtime().unwrap_or(0),
        sched_deadline: scheduler.deadline().unwrap_or(0),
        sched_period: scheduler.period().unwrap_or(0),
    };
    // SAFETY: `attr` is a `struct sched_attr` that says its own size; 0 is the calling process.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(&attr), 0)
    })
    .map(|_| ())
    .map_err(at(format!(
        "set process.scheduler to {}",
        scheduler.policy()
    )))
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

/// The environment of the spec, with HOME from the container's passwd file where it has none.
fn environment(process: &Process, root: &Root) -> Result<Vec<String>, Failure> {
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

/// Never through a link of /proc, which could lead to a directory of the guest that is still open here.
fn enter_cwd(root: &Root, cwd: &Path) -> Result<(), Failure> {
    root.open(cwd, OFlag::O_PATH | OFlag::O_DIRECTORY)
        .and_then(fchdir)
        .map_err(at(format!("enter process.cwd {}", cwd.display())))
}

/// The file to execute, found as execvp(3) would with the process's own PATH.
fn find_program(name: &str, env: &[String]) -> Result<CString, Failure> {
    let candidates: Vec<PathBuf> = if name.contains('/') {
        vec![PathBuf::from(name)]
    } else {
        let path = env
            .iter()
            .rev()
            .find_map(|entry| entry.strip_prefix("PATH="))
            .unwrap_or("");
        path.split(':')
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
    use nix::fcntl::{AT_FDCWD, OpenHow, ResolveFlag, openat2};
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

fn c_strings<S: AsRef<str>>(strings: &[S]) -> Result<Vec<CString>, Failure> {
    let convert = |s: &S| CString::new(s.as_ref());
    strings
        .iter()
        .map(convert)
        .collect::<Result<_, _>>()
        .map_err(|error| Failure::new("process.args or process.env", error.to_string()))
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
        let found = find_program("sh", &path("/nowhere:/bin")).unwrap();
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
            let failure = find_program(name, &path(dirs)).unwrap_err();
            assert_eq!(
                (failure.status, failure.message.as_str()),
                (Some(status), message)
            );
        }
    }
}
