//! Containers of the guest: namespaces, mounts, cgroup v2 and the set-up of their processes, after the OCI runtime
//! specification for Linux.
//!
//! The agent is threaded, and code that runs between fork and exec of a threaded process must not allocate. So nothing
//! here ever forks the agent: it re-executes itself as a single-threaded *stage* ([`stage_main`]), hands it the work
//! and the file descriptors over a socket, and the stage clones the container's process as a sibling (`CLONE_PARENT`).
//!
//! ```text
//! agent ──spawn──► stage ──clone3(CLONE_PARENT | CLONE_INTO_CGROUP | namespaces)──► init
//!   │  ◄─ pid ──────┘ exits                                                         │ mounts, pivot_root, …
//!   │  ◄─ ready, pty master ────────────────────────────────────────────────────────┤
//!   ├─ go ──────────────────────────────────────────────────────────────────────────► execve
//!   │  ◄─ end of file, or why execve failed ────────────────────────────────────────┘
//! ```
//!
//! Both the stage and the processes it clones are children of the agent, which has to reap every child it has: no
//! function of this module waits for one.

mod affinity;
mod capabilities;
mod cgroup;
mod console;
mod device_filter;
mod devices;
mod failure;
mod hooks;
mod huge_pages;
mod mounts;
mod namespaces;
mod options;
mod pidfd;
mod process;
mod program;
mod readiness;
mod resources;
mod root;
mod rootfs;
mod scheduling;
mod seccomp;
mod stage;
mod stat;
mod validate;
mod wire;

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Component, Path};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

use coffer_bpf::Program;
use coffer_proto::agent::StatContainerResponse;
use coffer_proto::exec_failure::Unexecutable;
use coffer_proto::ids::ContainerId;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use oci_spec::runtime::{
    ExecCPUAffinity, LinuxPersonality, LinuxResources, LinuxSeccomp, Process, Spec,
};

use cgroup::{CGROUP_ROOT, Cgroup};
use failure::{Failure, at};
use huge_pages::HugePages;
use wire::{ExecTask, FdName, Report, Task, Work};

pub use namespaces::SharedNamespaces;
pub use root::beneath;
pub use validate::parse;

/// `argv[0]` of the stage.
pub const STAGE_NAME: &str = "coffer-init-stage";

/// The set-up of a process takes milliseconds; hooks have what their own timeouts allow and this much for the rest.
const SETUP_DEADLINE: Duration = Duration::from_secs(60);

/// What to do with the standard streams of a process.
#[derive(Debug)]
pub enum ChildStdio {
    /// Inherited as they are; `None` is /dev/null.
    Streams {
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    },
    /// A new pseudo-terminal of the container's own devpts, of this size, or of the process's `consoleSize` where both
    /// are 0; its master comes back in [`Started`].
    Terminal { rows: u16, columns: u16 },
}

/// Why a container operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the spec that can't be honoured, by its JSON name.
    #[error("{field}: {reason}")]
    Refused { field: String, reason: String },
    /// The program could not be executed.
    #[error("{message}")]
    Exec { kind: Unexecutable, message: String },
    /// A step of the set-up failed, in the agent, the stage or the new process.
    #[error("{step}: {message}")]
    Step {
        step: String,
        message: String,
        #[source]
        errno: Option<nix::Error>,
    },
}

/// A process that is set up and waits to run its program. Dropping it ends the process.
#[derive(Debug)]
pub struct Started {
    /// In the agent's PID namespace.
    pub pid: Pid,
    /// The master of the process's terminal.
    pub terminal: Option<OwnedFd>,
    socket: UnixStream,
}

impl Started {
    /// Lets the process run its program. Blocks until that has happened or failed ([`Error::Exec`]), and as long as
    /// the `startContainer` hooks take. A process that was killed meanwhile counts as started.
    pub fn release(self) -> Result<(), Error> {
        let step = || format!("start process {}", self.pid);
        match (&self.socket).write_all(&[wire::GO]) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                return Err(at(step())(error).into());
            }
            _ => {}
        }
        self.socket.set_read_timeout(None).map_err(at(step()))?;
        match wire::receive(&self.socket) {
            Ok(None) => Ok(()),
            Ok(Some((Report::Failed(failure), _))) => Err(failure.into()),
            Ok(Some((report, _))) => {
                Err(Failure::new(step(), format!("unexpected {report:?}")).into())
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(at(step())(error).into()),
        }
    }
}

/// A container, from its creation to [`Container::delete`].
#[derive(Debug)]
pub struct Container {
    id: ContainerId,
    cgroup: Cgroup,
    /// The device program, to be replaced by an update.
    devices: Mutex<Program>,
    init: Pid,
    pidfd: OwnedFd,
    /// `CLONE_NEW*` that a further process joins, besides PID.
    namespaces: i32,
    seccomp: Option<LinuxSeccomp>,
    personality: Option<LinuxPersonality>,
    /// For further processes that name none of their own.
    affinity: Option<ExecCPUAffinity>,
    /// Read while a further process is being prepared, which in a frozen cgroup would never be done; written by a pause.
    preparing: RwLock<()>,
    _huge_pages: HugePages,
}

/// Creates a container up to the point before its process runs the user's program.
pub fn create(
    id: &ContainerId,
    spec: &Spec,
    stdio: ChildStdio,
    pod: &SharedNamespaces,
) -> Result<(Container, Started), Error> {
    validate::spec(id.as_str(), spec, pod)?;
    let linux = spec.linux().as_ref();
    let huge_pages = HugePages::reserve(linux.and_then(|linux| linux.resources().as_ref()))?;
    let cgroup = Cgroup::create(id)?;
    match create_in(&cgroup, id, spec, stdio, pod) {
        Ok((devices, born)) => {
            let container = Container {
                id: id.clone(),
                cgroup,
                devices: Mutex::new(devices),
                init: born.started.pid,
                pidfd: born.pidfd,
                namespaces: born.namespaces,
                seccomp: linux.and_then(|linux| linux.seccomp().clone()),
                personality: linux.and_then(|linux| linux.personality().clone()),
                affinity: spec
                    .process()
                    .as_ref()
                    .and_then(|p| p.exec_cpu_affinity().clone()),
                preparing: RwLock::default(),
                _huge_pages: huge_pages,
            };
            Ok((container, born.started))
        }
        Err(failure) => {
            // The first failure is the one to tell.
            let _ = cgroup.remove();
            Err(failure.into())
        }
    }
}

fn create_in(
    cgroup: &Cgroup,
    id: &ContainerId,
    spec: &Spec,
    stdio: ChildStdio,
    pod: &SharedNamespaces,
) -> Result<(Program, Born), Failure> {
    let limits = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    if let Some(limits) = limits {
        resources::apply(cgroup, limits)?;
    }
    let devices = install_device_rules(cgroup, limits, None)?;
    let shared = [
        (FdName::Ipc, &pod.ipc),
        (FdName::Uts, &pod.uts),
        (FdName::Net, &pod.net),
        (FdName::Pid, &pod.pid),
    ];
    let shared = shared
        .into_iter()
        .filter_map(|(name, fd)| Some((name, fd.as_ref()?.as_fd())));
    let mut fds: Vec<_> = shared.collect();
    fds.push((FdName::Cgroup, cgroup.fd()));
    let hooks = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.create_container().as_ref());
    let seconds = hooks
        .into_iter()
        .flatten()
        .filter_map(|hook| u64::try_from(hook.timeout()?).ok())
        .fold(0, u64::saturating_add);
    let deadline = SETUP_DEADLINE.saturating_add(Duration::from_secs(seconds));
    let stdio = with_console_size(stdio, spec.process().as_ref());
    let born = run_stage(
        id,
        Task::Create(Box::new(spec.clone())),
        stdio,
        &fds,
        deadline,
    )?;
    Ok((devices, born))
}

/// A terminal without a size gets the one of the process block.
fn with_console_size(stdio: ChildStdio, process: Option<&Process>) -> ChildStdio {
    let size = process.and_then(Process::console_size);
    match (stdio, size) {
        (
            ChildStdio::Terminal {
                rows: 0,
                columns: 0,
            },
            Some(size),
        ) => ChildStdio::Terminal {
            rows: u16::try_from(size.height()).unwrap_or(u16::MAX),
            columns: u16::try_from(size.width()).unwrap_or(u16::MAX),
        },
        (stdio, _) => stdio,
    }
}

fn install_device_rules(
    cgroup: &Cgroup,
    limits: Option<&LinuxResources>,
    old: Option<&Program>,
) -> Result<Program, Failure> {
    let rules = limits.and_then(|limits| limits.devices().as_ref());
    let rules: Vec<_> = rules
        .into_iter()
        .flatten()
        .filter_map(|rule| device_filter::rule(rule).ok())
        .collect();
    device_filter::install(cgroup.fd(), &rules, old)
}

/// A process that the stage has made.
struct Born {
    started: Started,
    pidfd: OwnedFd,
    namespaces: i32,
}

/// Runs a stage until its process waits to be started.
fn run_stage(
    id: &ContainerId,
    task: Task,
    stdio: ChildStdio,
    fds: &[(FdName, BorrowedFd<'_>)],
    deadline: Duration,
) -> Result<Born, Failure> {
    let (socket, theirs) = UnixStream::pair().map_err(at("make the stage's socket"))?;
    socket
        .set_read_timeout(Some(deadline))
        .map_err(at("set the stage's deadline"))?;
    Command::new("/proc/self/exe")
        .arg0(STAGE_NAME)
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .map_err(at("run the stage"))?;
    send_work(&socket, id, task, stdio, fds)?;
    let (Report::Cloned { pid, namespaces }, mut pidfd) =
        next_report(&socket, "clone the process")?
    else {
        return Err(Failure::new("clone the process", "the stage told no pid"));
    };
    let pidfd = pidfd
        .pop()
        .ok_or_else(|| Failure::new("clone the process", "no pidfd came"))?;
    // A process that hangs half way in, on a file system perhaps, would be nobody's.
    let ready =
        next_report(&socket, "set up the process").inspect_err(|_| pidfd::kill(pidfd.as_fd()));
    let (Report::Ready, mut terminal) = ready? else {
        return Err(Failure::new("set up the process", "it is not ready"));
    };
    let started = Started {
        pid: Pid::from_raw(pid),
        terminal: terminal.pop(),
        socket,
    };
    Ok(Born {
        started,
        pidfd,
        namespaces,
    })
}

fn send_work(
    socket: &UnixStream,
    id: &ContainerId,
    task: Task,
    stdio: ChildStdio,
    fds: &[(FdName, BorrowedFd<'_>)],
) -> Result<(), Failure> {
    let (streams, stdio) = match stdio {
        ChildStdio::Streams {
            stdin,
            stdout,
            stderr,
        } => ([stdin, stdout, stderr], wire::Stdio::Streams),
        ChildStdio::Terminal { rows, columns } => {
            ([None, None, None], wire::Stdio::Terminal { rows, columns })
        }
    };
    let names = [FdName::Stdin, FdName::Stdout, FdName::Stderr];
    let streams = names.into_iter().zip(&streams);
    let streams = streams.filter_map(|(name, fd)| Some((name, fd.as_ref()?.as_fd())));
    let (names, fds): (Vec<_>, Vec<_>) = streams.chain(fds.iter().copied()).unzip();
    let work = Work {
        fds: names,
        id: id.to_string(),
        stdio,
        task,
    };
    wire::send(socket, &work, &fds).map_err(at("send the stage its work"))
}

fn next_report(socket: &UnixStream, step: &str) -> Result<(Report, Vec<OwnedFd>), Failure> {
    let received = wire::receive(socket).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => Failure::new(step, "not done within the time for it"),
        _ => at(step)(error),
    });
    match received? {
        Some((Report::Failed(failure), _)) => Err(failure),
        Some(report) => Ok(report),
        None => Err(Failure::new(
            step,
            "it ended without a word; killed for memory, perhaps",
        )),
    }
}

/// What the agent's executable does when its `argv[0]` is [`STAGE_NAME`].
pub fn stage_main() -> ! {
    stage::main()
}

impl Container {
    /// The namespaces of a container that shall see this one's processes.
    pub fn shared_with(&self, pod: &SharedNamespaces) -> Result<SharedNamespaces, Error> {
        let step = format!("share the PID namespace of container {}", self.id);
        Ok(pod.with_pid_of(self.pidfd.as_fd()).map_err(at(step))?)
    }

    /// Prepares another process in the container.
    pub fn exec(&self, process: &Process, stdio: ChildStdio) -> Result<Started, Error> {
        validate::process(process, "")?;
        let _no_pause = self.preparing.read();
        if self.cgroup.is_frozen()? {
            return Err(Failure::new("exec", "the container is paused").into());
        }
        let nested = self.nested_cgroup()?;
        let cgroup = nested.as_ref().map_or(self.cgroup.fd(), AsFd::as_fd);
        let task = ExecTask {
            process: process.clone(),
            namespaces: self.namespaces,
            seccomp: self.seccomp.clone(),
            personality: self.personality.clone(),
            affinity: process
                .exec_cpu_affinity()
                .clone()
                .or_else(|| self.affinity.clone()),
        };
        let fds = [(FdName::Cgroup, cgroup), (FdName::Init, self.pidfd.as_fd())];
        let task = Task::Exec(Box::new(task));
        let stdio = with_console_size(stdio, Some(process));
        Ok(run_stage(&self.id, task, stdio, &fds, SETUP_DEADLINE)?.started)
    }

    /// A container that manages cgroups of its own has handed out its controllers, and then no process may be in its
    /// uppermost one: a further process goes where its init is.
    fn nested_cgroup(&self) -> Result<Option<OwnedFd>, Failure> {
        let handed_out = self
            .cgroup
            .read("cgroup.subtree_control")?
            .unwrap_or_default();
        if handed_out.trim().is_empty() {
            return Ok(None);
        }
        let step = format!("find the cgroup of process {}", self.init);
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.init)).map_err(at(&*step))?;
        let path = text.trim().strip_prefix("0::/").unwrap_or_default();
        if Path::new(path)
            .components()
            .next()
            .map(Component::as_os_str)
            != Some(self.id.as_str().as_ref())
        {
            return Err(Failure::new(
                step,
                format!("{path:?} is not the container's"),
            ));
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        nix::fcntl::open(&Path::new(CGROUP_ROOT).join(path), flags, Mode::empty())
            .map(Some)
            .map_err(at(step))
    }

    /// Freezes all processes; returns when they are frozen. Waits for those that are being prepared.
    pub fn pause(&self) -> Result<(), Error> {
        let _no_exec = self.preparing.write();
        Ok(self.cgroup.freeze(true)?)
    }

    pub fn resume(&self) -> Result<(), Error> {
        Ok(self.cgroup.freeze(false)?)
    }

    /// Applies new limits; fields that are absent stay as they are.
    pub fn update(&self, limits: &LinuxResources) -> Result<(), Error> {
        validate::resources(limits, "")?;
        resources::apply(&self.cgroup, limits)?;
        if limits
            .devices()
            .as_ref()
            .is_some_and(|rules| !rules.is_empty())
        {
            let mut program = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
            *program = install_device_rules(&self.cgroup, Some(limits), Some(&program))?;
        }
        Ok(())
    }

    pub fn stat(&self) -> Result<StatContainerResponse, Error> {
        Ok(stat::stat(&self.cgroup)?)
    }

    /// All processes of the container, in the agent's PID namespace.
    pub fn pids(&self) -> Result<Vec<Pid>, Error> {
        Ok(self.cgroup.pids()?)
    }

    /// SIGKILL to every process, also in a paused container.
    pub fn kill_all(&self) -> Result<(), Error> {
        Ok(self.cgroup.kill()?)
    }

    /// An inotify descriptor, non-blocking, that becomes readable when [`Container::oom_kills`] may have changed.
    pub fn oom_events(&self) -> Result<OwnedFd, Error> {
        Ok(self.cgroup.watch_memory_events()?)
    }

    /// How many processes the kernel has killed for memory in this container.
    pub fn oom_kills(&self) -> Result<u64, Error> {
        Ok(self.cgroup.value("memory.events", "oom_kill")?)
    }

    /// Kills what is left and removes the cgroup. Does nothing the second time. The container's mounts went with its
    /// last process.
    pub fn delete(&self) -> Result<(), Error> {
        Ok(self.cgroup.remove()?)
    }
}
