//! The single-threaded stage: the agent's executable, run once for each new process of a container.
//!
//! It takes the agent's [`Work`], prepares with the guest's privileges, clones the process as a child of the agent, tells
//! the agent its pid, and ends. The clone goes on in here too, with a copy of everything the stage has.
#![allow(unsafe_code, reason = "clone3(2) has no wrapper")]

use std::convert::Infallible;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Pid, Uid, pipe2, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::{ContainerState, Linux, Process, Spec};

use super::failure::{Failure, at};
use super::namespaces::{self, Plan};
use super::process::{Launcher, Streams, null_device};
use super::root::Root;
use super::rootfs::{self, Prepared};
use super::wire::{self, ExecTask, FdName, Fds, GO, Report, Stdio, Task, Work};
use super::{affinity, console, hooks, program};

/// What the executable does when it is started under the stage's name.
pub fn main() -> ! {
    let Ok(socket) = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from)
    else {
        std::process::exit(1);
    };
    let status = match run(&socket) {
        Ok(()) => 0,
        Err(failure) => {
            let status = failure.status.unwrap_or(1);
            // If the agent is gone, nobody wants to know.
            let _ = wire::send(&socket, &Report::Failed(failure), &[]);
            i32::from(status)
        }
    };
    std::process::exit(status)
}

/// Returns in the stage when the process is cloned, and in the process only when it can't run its program.
fn run(socket: &UnixStream) -> Result<(), Failure> {
    // No process of a container may look into this one while it is half way in.
    prctl::set_dumpable(false).map_err(at("set non-dumpable"))?;
    umask(Mode::empty());
    let received = wire::receive::<Work>(socket).map_err(at("receive work"))?;
    let (work, fds) = received.ok_or_else(|| Failure::new("receive work", "nothing came"))?;
    let mut fds: Fds = work.fds.iter().copied().zip(fds).collect();
    match work.task {
        Task::Create(spec) => {
            namespaces::join_pod(&fds)?;
            let streams = streams(work.stdio, &mut fds)?;
            create(&work.id, &spec, streams, &fds, socket)
        }
        Task::Exec(task) => {
            let streams = streams(work.stdio, &mut fds)?;
            exec(&task, streams, &fds, socket)
        }
    }
}

/// Streams that are there already, or the size of a terminal that is still to be made.
enum Source {
    Streams(Streams),
    Terminal(u16, u16),
}

fn streams(stdio: Stdio, fds: &mut Fds) -> Result<Source, Failure> {
    if let Stdio::Terminal { rows, columns } = stdio {
        return Ok(Source::Terminal(rows, columns));
    }
    let mut take = |name| {
        let given = fds.remove(&name).map_or_else(null_device, Ok);
        given.map_err(at("open /dev/null"))
    };
    let streams = [
        take(FdName::Stdin)?,
        take(FdName::Stdout)?,
        take(FdName::Stderr)?,
    ];
    Ok(Source::Streams(Streams::Fds(streams)))
}

fn create(
    id: &str,
    spec: &Spec,
    source: Source,
    fds: &Fds,
    socket: &UnixStream,
) -> Result<(), Failure> {
    let plan = Plan::of(spec, fds.contains_key(&FdName::Pid))?;
    let default = Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&default);
    namespaces::write_sysctls(linux)?;
    if plan.time {
        namespaces::unshare_time(linux)?;
    }
    let mut prepared = rootfs::prepare(id, spec, plan.cgroup, plan.user)?;
    let score = spec.process().as_ref().and_then(Process::oom_score_adj);
    let born = |pid: Pid| {
        if plan.user {
            namespaces::write_id_maps(pid, linux)?;
        }
        set_oom_score(pid, score)
    };
    match clone(plan.clone_flags(), fds, plan.join_flags(), born, socket)? {
        Side::Stage => Ok(()),
        Side::Process => match init(id, spec, plan, &mut prepared, source, socket)? {},
    }
}

/// The container's init, from its birth to the user's program.
fn init(
    id: &str,
    spec: &Spec,
    plan: Plan,
    prepared: &mut Prepared,
    source: Source,
    socket: &UnixStream,
) -> Result<Infallible, Failure> {
    setsid().map_err(at("setsid"))?;
    if plan.user {
        become_namespace_root()?;
    }
    if plan.cgroup {
        unshare(CloneFlags::CLONE_NEWCGROUP).map_err(at("unshare the cgroup namespace"))?;
    }
    if plan.own_uts {
        namespaces::set_host_names(spec)?;
    }
    let root = rootfs::enter(spec, prepared)?;
    let size = match source {
        Source::Terminal(rows, columns) => Some((rows, columns)),
        Source::Streams(_) => None,
    };
    let terminal = rootfs::furnish(&root, spec, prepared, size)?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Failure::new("process", "is missing"))?;
    let linux = spec.linux().as_ref();
    let launcher = Launcher::new(
        process,
        linux.and_then(|linux| linux.seccomp().as_ref()),
        linux.and_then(|linux| linux.personality().as_ref()),
    )?;
    launcher.prepare()?;
    let own = spec.hooks().as_ref();
    let state = hooks::state(id, ContainerState::Creating, spec.annotations().as_ref());
    hooks::run_all(
        "createContainer",
        own.and_then(|h| h.create_container().as_ref()),
        &state,
    )?;
    program::check(process, &root)?;
    let streams = wait_for_go(source, terminal, socket)?;
    let state = hooks::state(id, ContainerState::Created, spec.annotations().as_ref());
    hooks::run_all(
        "startContainer",
        own.and_then(|h| h.start_container().as_ref()),
        &state,
    )?;
    launcher.launch(&root, &streams)
}

fn exec(task: &ExecTask, source: Source, fds: &Fds, socket: &UnixStream) -> Result<(), Failure> {
    let init = fds
        .get(&FdName::Init)
        .ok_or_else(|| Failure::new("exec", "no init"))?
        .as_fd();
    join(init, libc::CLONE_NEWPID)?;
    let affinity = task.affinity.as_ref();
    if let Some(initial) = affinity.and_then(|affinity| affinity.initial().as_ref()) {
        affinity::set(initial).map_err(at(format!("set execCPUAffinity.initial {initial}")))?;
    }
    let born = |pid: Pid| set_oom_score(pid, task.process.oom_score_adj());
    match clone(0, fds, task.namespaces, born, socket)? {
        Side::Stage => Ok(()),
        Side::Process => match further(task, init, source, socket)? {},
    }
}

/// A further process of a container, from its birth to the user's program.
fn further(
    task: &ExecTask,
    init: BorrowedFd<'_>,
    source: Source,
    socket: &UnixStream,
) -> Result<Infallible, Failure> {
    setsid().map_err(at("setsid"))?;
    let affinity = task.affinity.as_ref();
    if let Some(last) = affinity.and_then(|affinity| affinity.cpu_affinity_final().as_ref()) {
        affinity::set(last).map_err(at(format!("set execCPUAffinity.final {last}")))?;
    }
    join(init, task.namespaces)?;
    if task.namespaces & libc::CLONE_NEWUSER != 0 {
        become_namespace_root()?;
    }
    let root = Root::current().map_err(at("open the root"))?;
    let terminal = match source {
        Source::Terminal(rows, columns) => Some(console::open(&root, rows, columns)?),
        Source::Streams(_) => None,
    };
    let launcher = Launcher::new(
        &task.process,
        task.seccomp.as_ref(),
        task.personality.as_ref(),
    )?;
    launcher.prepare()?;
    let streams = wait_for_go(source, terminal, socket)?;
    launcher.launch(&root, &streams)
}

fn join(init: BorrowedFd<'_>, namespaces: libc::c_int) -> Result<(), Failure> {
    setns(init, CloneFlags::from_bits_retain(namespaces)).map_err(|errno| match errno {
        Errno::ESRCH => Failure::new("join the container", "its init has ended"),
        errno => at("join the container's namespaces")(errno),
    })
}

/// The user namespace's root is the only one who may do all that follows.
fn become_namespace_root() -> Result<(), Failure> {
    let step = "become root of the user namespace";
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[]).map_err(at(step))?;
    setresgid(gid, gid, gid).map_err(at(step))?;
    setresuid(uid, uid, uid).map_err(at(step))
}

/// Reports that all is set up, with the master of the terminal, and waits.
fn wait_for_go(
    source: Source,
    terminal: Option<console::Terminal>,
    socket: &UnixStream,
) -> Result<Streams, Failure> {
    let master: Vec<BorrowedFd<'_>> = terminal.iter().map(|t| t.master.as_fd()).collect();
    wire::send(socket, &Report::Ready, &master).map_err(at("report ready"))?;
    let mut byte = [0];
    match (&*socket).read_exact(&mut byte) {
        Ok(()) if byte == [GO] => {}
        // Nobody wants the program any more.
        _ => std::process::exit(1),
    }
    match (source, terminal) {
        (Source::Streams(streams), _) => Ok(streams),
        (_, Some(terminal)) => Ok(Streams::Terminal(terminal.slave)),
        _ => Err(Failure::new("standard streams", "no terminal was made")),
    }
}

/// The agent's own score is not the container's, so one is always set.
fn set_oom_score(pid: Pid, score: Option<i32>) -> Result<(), Failure> {
    let score = score.unwrap_or(0);
    fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
        .map_err(at(format!("set process.oomScoreAdj {score}")))
}

/// Where a clone returns.
enum Side {
    Stage,
    Process,
}

/// Clones a sibling into the container's cgroup. In the stage, `born` finishes it from outside before it goes on.
fn clone(
    flags: libc::c_int,
    fds: &Fds,
    namespaces: libc::c_int,
    born: impl FnOnce(Pid) -> Result<(), Failure>,
    socket: &UnixStream,
) -> Result<Side, Failure> {
    let cgroup = fds
        .get(&FdName::Cgroup)
        .ok_or_else(|| Failure::new("clone", "no cgroup"))?;
    let (ready, finished) = pipe2(OFlag::O_CLOEXEC).map_err(at("pipe"))?;
    match clone3(flags, cgroup.as_fd()).map_err(at("clone the process"))? {
        Some((pid, pidfd)) => {
            born(pid)?;
            let report = Report::Cloned {
                pid: pid.as_raw(),
                namespaces,
            };
            wire::send(socket, &report, &[pidfd.as_fd()]).map_err(at("report the pid"))?;
            fs::File::from(finished)
                .write_all(&[GO])
                .map_err(at("let the process go on"))?;
            Ok(Side::Stage)
        }
        None => {
            drop(finished);
            match fs::File::from(ready).read_exact(&mut [0]) {
                Ok(()) => Ok(Side::Process),
                // The stage failed, and has said why.
                Err(_) => std::process::exit(1),
            }
        }
    }
}

/// `None` in the clone.
fn clone3(flags: libc::c_int, cgroup: BorrowedFd<'_>) -> nix::Result<Option<(Pid, OwnedFd)>> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: all zero is a valid `clone_args`.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    // A sibling: the agent is its parent, and what the agent gets at its end is what it gets at the stage's, SIGCHLD.
    let common = libc::CLONE_PARENT | libc::CLONE_PIDFD;
    args.flags = u64::from((flags | common).cast_unsigned()) | CLONE_INTO_CGROUP;
    args.pidfd = (&raw mut pidfd) as u64;
    args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    // SAFETY: without CLONE_VM and with no stack given this is a fork, and this process has one thread, so the copy of its
    // memory is consistent. The kernel writes the pidfd before it returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    };
    match Errno::result(result)? {
        0 => Ok(None),
        pid => {
            let pid = Pid::from_raw(libc::pid_t::try_from(pid).unwrap_or_default());
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(Some((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })))
        }
    }
}

/// libc has it as a c_int, in which it doesn't fit.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
