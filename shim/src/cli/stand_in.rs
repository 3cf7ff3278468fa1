//! The stand-in: a process of the host that stands for one process of the guest, a container's init or an exec.
//!
//! It is what an engine's monitor reaps, signals and looks at: it has a session of its own, sits in the container's host cgroup and
//! network namespace, passes streams, signals and the terminal's size on, and ends with the exit status of its
//! process after the last byte of output. While it lives it holds a [`Lease`]; if it is killed, so is its process.
//!
//! | Exit status | |
//! |---|---|
//! | 0 to 255    | of the process; 128 + n when signal n ended it |
//! | 125         | the VM or its supervisor failed, and one line on standard error says how |

use super::client::{Process, StdioPaths, Task};
use super::console::Console;
use super::options::StandInOptions;
use super::order::{Answer, Control, Network, Order};
use super::session::{Caller, Session};
use super::stdio::{Copying, Fifos};
use super::terminal::RawMode;
use super::view::{self, View, ViewError};
use super::{Error, FAILED, REFUSED, oom};
use crate::cgroup::{CgroupPath, SandboxCgroup};
use crate::config::Config;
use crate::lease::{Lease, Registration};
use crate::state::State;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::{ContainerId, SandboxId};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

/// Others may hold the streams of an exec that has ended: what it left in the background. Only what is on its way is waited for.
const EXEC_SILENCE: Duration = Duration::from_secs(1);
/// All processes of a container end with its init, so its streams end too, however slow the guest is.
const INIT_SILENCE: Duration = Duration::from_secs(10);

/// A stand-in that is in its place.
#[derive(Debug)]
pub(super) struct Prepared {
    order: Order,
    control: Control,
}

/// Takes the place on the host that the order names. Runs before there are threads, since each has a network namespace of its own.
/// None when that failed, which the caller has been told.
pub(super) fn prepare(options: &StandInOptions) -> Option<Prepared> {
    let mut control = inherit(options.control);
    match take_place(&mut control) {
        Ok(order) => Some(Prepared { order, control }),
        Err(error) => {
            refuse(&mut control, &error);
            None
        }
    }
}

/// Keeps the standard streams and the control socket, and closes all else that was inherited.
#[allow(unsafe_code)]
fn inherit(control: i32) -> Control {
    let number = control.unsigned_abs();
    // SAFETY: this runs first in a process that has opened nothing itself, so no owner of a descriptor is robbed.
    let control = unsafe {
        if number > 3 {
            libc::close_range(3, number - 1, 0);
        }
        libc::close_range(number + 1, libc::c_uint::MAX, 0);
        // The caller left exactly this one open for us.
        OwnedFd::from_raw_fd(control)
    };
    // A hook or any other child must not hold it open.
    let _ = fcntl(control.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
    Control::new(control.into())
}

fn take_place(control: &mut Control) -> Result<Order, Error> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| Error::Io { what, source }
    };
    let order: Order = control.hear().map_err(failed("can't read the order"))?;
    nix::unistd::setsid()
        .map_err(|error| failed("can't leave the caller's session")(error.into()))?;
    if let Some(path) = order.cgroup.as_ref().map(CgroupPath::of_stand_ins) {
        let cgroup = match order.exec {
            None => SandboxCgroup::create(&path)?,
            Some(_) => SandboxCgroup::at(&path),
        };
        cgroup.add(std::process::id().cast_signed())?;
    }
    let network = || match &order.network {
        Network::Callers => Ok(()),
        Network::New => Ok(unshare(CloneFlags::CLONE_NEWNET)?),
        Network::Path(path) => Ok(setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?),
    };
    network().map_err(failed("can't enter the container's network namespace"))?;
    Ok(order)
}

fn refuse(control: &mut Control, error: &Error) {
    let answer = Answer::Failed {
        message: chain(error),
        status: error.exit_status(),
    };
    // Without a caller there is nobody to tell.
    let _ = control.say(&answer);
}

/// A wish for the main thread, and whether it was done.
type Enter = (View, oneshot::Sender<Result<(), ViewError>>);

/// The whole life of a stand-in that has its place; gives the exit status. The calling thread must be the main one: it
/// does nothing but be seen, and all work is done by the runtime's.
pub(super) fn run(runtime: &Runtime, config: Config, prepared: Prepared) -> Result<u8, Error> {
    let (show, wishes) = mpsc::channel();
    let standing = runtime.spawn(async move { stand(&config, prepared, show).await });
    // Ends when the other side is dropped, with the process at the latest.
    for (view, done) in wishes {
        let _ = done.send(view::enter(&view));
    }
    let ended = runtime.block_on(standing);
    ended.unwrap_or_else(|panic| Err(Error::Usage(panic.to_string())))
}

/// Makes the process in the guest and stays until its end.
async fn stand(
    config: &Config,
    prepared: Prepared,
    show: mpsc::Sender<Enter>,
) -> Result<u8, Error> {
    let Prepared { order, mut control } = prepared;
    let mut standing = match Standing::begin(config, order, &mut control, show).await {
        Ok(standing) => standing,
        Err(error) => {
            refuse(&mut control, &error);
            return Ok(REFUSED);
        }
    };
    if control.say(&Answer::Done).is_err() {
        // Killed while it waited: nobody knows of the process.
        standing.undo().await;
        return Ok(REFUSED);
    }
    drop(control);
    Ok(standing.stay(config).await)
}

/// A process of the guest and its stand-in.
struct Standing {
    order: Order,
    session: Session,
    copying: Copying,
    caller: Caller,
    /// The caller's terminal, if that is the process's.
    _raw: Option<RawMode>,
    _lease: Lease,
}

impl Standing {
    async fn begin(
        config: &Config,
        mut order: Order,
        control: &mut Control,
        show: mpsc::Sender<Enter>,
    ) -> Result<Self, Error> {
        let broken = |source| Error::Io {
            what: "the command that started the stand-in is gone".into(),
            source,
        };
        let caller = Caller::listen(&relayed())?;
        let registration = Registration {
            container: order.container.clone(),
            exec: order.exec.as_ref().map(|exec| exec.id.clone()),
            own_network: matches!(order.network, Network::New),
            record: order.record.clone(),
        };
        let lease = Lease::take(&config.root, &order.sandbox, &registration).await?;
        control.say(&Answer::Ready).map_err(broken)?;
        let _: String = control.hear().map_err(broken)?;

        let task = Task::connect(&config.root, &order.sandbox).await?;
        let exec = order.exec.as_ref().map(|exec| exec.id.to_string());
        let process = Process {
            container: order.container.to_string(),
            exec: exec.unwrap_or_default(),
        };
        let name = order.exec.as_ref().map_or_else(
            || format!("io-{}", order.container),
            |exec| exec.id.to_string(),
        );
        let directory = config.root.join(&order.sandbox).join(name);
        let interactive = order.terminal || !is_null(io::stdin().as_fd());
        let fifos = Fifos::make(directory, interactive, order.terminal)?;
        make(&task, &process, &order, &fifos.paths()).await?;
        let session = Session {
            task,
            process,
            terminal: order.terminal,
        };
        let view = order.view.take();
        let begun = async {
            if let Some(view) = view {
                enter(view, show).await?;
            }
            go_on(&session, &order, fifos).await
        };
        match begun.await {
            Ok((copying, raw)) => Ok(Self {
                _raw: raw,
                order,
                session,
                copying,
                caller,
                _lease: lease,
            }),
            Err(error) => {
                undo(&session, &order.sandbox).await;
                Err(error)
            }
        }
    }

    async fn undo(&mut self) {
        undo(&self.session, &self.order.sandbox).await;
    }

    /// Stays until the process has ended and all it wrote is passed on.
    async fn stay(&mut self, config: &Config) -> u8 {
        let status = self.session.attend(&self.copying, &mut self.caller).await;
        let is_exec = self.order.exec.is_some();
        self.copying
            .drained(if is_exec { EXEC_SILENCE } else { INIT_SILENCE })
            .await;
        let state = State::load(&config.root, &self.order.sandbox)
            .ok()
            .flatten();
        let (status, message) = self.outcome(status, state.as_ref());
        if let Some(message) = message {
            eprintln!("coffer: container {}: {message}", self.order.container);
        }
        if is_exec {
            // The container may have ended under it; its status is known.
            let _ = self.session.task.delete(&self.session.process).await;
        } else if ran_out_of_memory(&self.session.task, &self.order.container, state.as_ref()).await
        {
            let cgroup = self.order.cgroup.as_ref().map(CgroupPath::of_stand_ins);
            oom::report(&self.order.bundle, cgroup.as_ref());
        }
        status
    }

    /// The exit status, and what is to be said beside it.
    fn outcome(&self, status: Result<u8, Error>, state: Option<&State>) -> (u8, Option<String>) {
        let stopped = state.and_then(State::stopped);
        let status = match status {
            Ok(status) => status,
            Err(error) => {
                let reason = stopped.map_or_else(|| chain(&error), str::to_owned);
                return (FAILED, Some(reason));
            }
        };
        let reason = state.and_then(|state| match self.order.exec {
            Some(_) => state.vm_died_under(status.into()),
            None => {
                let record = state.containers.get(&self.order.container)?;
                record.exit.as_ref()?.reason.as_deref()
            }
        });
        let failed = reason.is_some() && stopped.is_some();
        let status = if failed { FAILED } else { status };
        (status, reason.map(str::to_owned))
    }
}

/// Whether the kernel killed for want of memory, maybe not init.
async fn ran_out_of_memory(task: &Task, container: &ContainerId, state: Option<&State>) -> bool {
    let record = state.and_then(|state| state.containers.get(container));
    let exit = record.and_then(|record| record.exit.as_ref());
    if exit.is_some_and(|exit| exit.oom_killed) {
        return true;
    }
    let stats = task.stats(container.as_str()).await;
    stats.is_ok_and(|stats| stats.memory_events.oom_kill > 0)
}

async fn enter(view: View, show: mpsc::Sender<Enter>) -> Result<(), Error> {
    let (done, entered) = oneshot::channel();
    // The main thread waits for nothing else.
    let _ = show.send((view, done));
    Ok(entered.await.unwrap_or(Ok(()))?)
}

async fn make(
    task: &Task,
    process: &Process,
    order: &Order,
    stdio: &StdioPaths,
) -> Result<(), Error> {
    let made = match &order.exec {
        None => task.create(&process.container, &order.bundle, stdio).await,
        Some(exec) => {
            let block =
                serde_json::to_vec(&exec.process).expect("JSON values can always be written");
            task.exec(process, block, stdio).await
        }
    };
    Ok(made?)
}

/// From a process that is made to one that the engine knows.
async fn go_on(
    session: &Session,
    order: &Order,
    fifos: Fifos,
) -> Result<(Copying, Option<RawMode>), Error> {
    let raw = match &order.places.console_socket {
        Some(socket) => {
            let (rows, columns) = order.console_size.unwrap_or_default();
            Console::open(rows, columns)?.hand_over(socket)?;
            None
        }
        None if order.terminal => RawMode::enter().map_err(super::terminal::unusable)?,
        None => None,
    };
    let copying = fifos.connect();
    session.resize().await;
    if order.exec.is_some() {
        session.start().await?;
    }
    if let Some(path) = &order.places.pid_file {
        write_pid(path)?;
    }
    Ok((copying, raw))
}

/// Takes the process away again, and the sandbox if nothing else is in it.
async fn undo(session: &Session, sandbox: &SandboxId) {
    let (task, process) = (&session.task, &session.process);
    let _ = task.kill(process, libc::SIGKILL.unsigned_abs(), true).await;
    let _ = tokio::time::timeout(super::KILL_TAKES, task.wait(process)).await;
    let _ = task.delete(process).await;
    let _ = task.shutdown(sandbox).await;
}

/// Whole or not at all: whoever sees the file reads the number.
pub(super) fn write_pid(path: &Path) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let written = fs::write(&new, std::process::id().to_string());
    written
        .and_then(|()| fs::rename(&new, path))
        .map_err(|source| Error::Io {
            what: format!("can't write the pid file {path:?}"),
            source,
        })
}

/// Whether nothing will ever come from there.
fn is_null(fd: impl AsFd) -> bool {
    let stat = nix::sys::stat::fstat(fd);
    let null = fs::metadata("/dev/null");
    matches!((stat, null), (Ok(fd), Ok(null)) if fd.st_rdev == null.rdev() && fd.st_rdev != 0)
}

/// Every signal that can be caught and means something to the program, also the real-time ones. Those that a fault of this
/// process raises are its own, and SIGWINCH has a message of its own. The C library keeps 32 and 33 for itself.
pub(super) fn relayed() -> Vec<i32> {
    let own = [
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGCHLD,
        libc::SIGPIPE,
        libc::SIGWINCH,
        32,
        33,
    ];
    (1..=64).filter(|signal| !own.contains(signal)).collect()
}
