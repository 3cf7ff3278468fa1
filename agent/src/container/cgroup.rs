//! A container's cgroup, v2 only: `/sys/fs/cgroup/<container id>`.
//!
//! The guest is ours, so there is no systemd to ask and no other layout to fit in: the agent stays in the root, and
//! every container is a child of it. Files are opened relative to the cgroup's directory descriptor.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coffer_proto::ids::ContainerId;
use nix::fcntl::{OFlag, openat};
use nix::poll::PollFlags;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use super::failure::{Failure, at};
use super::readiness::ready_by;

/// Where cgroup v2 is mounted in the guest.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// The freezer answers within one scheduling round unless a process is stuck in the kernel. Half of what the supervisor waits for an
/// answer, so that it hears the reason.
const FREEZE_DEADLINE: Duration = Duration::from_secs(5);
/// How soon a file is looked at again that reports no change. The kernel holds a second change within 10 ms back, and forgets it when the
/// cgroup is removed in that time (`cgroup_file_notify`): nobody who waits is woken then.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Killed processes go at once unless they are stuck in the kernel, where nothing helps but the end of the VM.
const EMPTY_DEADLINE: Duration = Duration::from_secs(10);
/// A `cgroup.procs` is read whole; this is far above any PID limit of a guest.
const MAX_FILE: u64 = 4 << 20;

/// The cgroup of one container.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the cgroup, with every controller of the guest available to it.
    pub fn create(id: &ContainerId) -> Result<Self, Failure> {
        let root = Path::new(CGROUP_ROOT);
        enable_controllers(root)?;
        let path = root.join(id);
        fs::create_dir(&path).map_err(at(format!("create cgroup {}", path.display())))?;
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = nix::fcntl::open(&path, flags, Mode::empty())
            .map_err(at(format!("open cgroup {}", path.display())))?;
        Ok(Self { path, directory })
    }

    /// For `CLONE_INTO_CGROUP` and for attaching programs.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    pub fn has(&self, file: &str) -> bool {
        nix::sys::stat::fstatat(&self.directory, file, nix::fcntl::AtFlags::empty()).is_ok()
    }

    pub fn write(&self, file: &str, value: &str) -> Result<(), Failure> {
        openat(
            &self.directory,
            file,
            OFlag::O_WRONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(io::Error::from)
        .and_then(|fd| File::from(fd).write_all(value.as_bytes()))
        .map_err(at(format!(
            "write {value:?} to {file} of cgroup {}",
            self.path.display()
        )))
    }

    /// The file's text; `None` where the kernel has no such file.
    pub fn read(&self, file: &str) -> Result<Option<String>, Failure> {
        let open = openat(
            &self.directory,
            file,
            OFlag::O_RDONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        );
        let mut text = String::new();
        match open
            .map_err(io::Error::from)
            .and_then(|fd| File::from(fd).take(MAX_FILE).read_to_string(&mut text))
        {
            Ok(_) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(format!("read {file} of cgroup {}", self.path.display()))(error)),
        }
    }

    /// Freezes or thaws, and waits until it is so.
    pub fn freeze(&self, frozen: bool) -> Result<(), Failure> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        if self.wait_for_event("frozen", value, FREEZE_DEADLINE)? {
            return Ok(());
        }
        if frozen {
            self.write("cgroup.freeze", "0")?;
        }
        Err(Failure::new(
            format!("freeze cgroup {}", self.path.display()),
            format!("not done within {} s", FREEZE_DEADLINE.as_secs()),
        ))
    }

    /// Whether a freeze was asked for.
    pub fn is_frozen(&self) -> Result<bool, Failure> {
        Ok(self
            .read("cgroup.freeze")?
            .is_some_and(|text| text.trim() == "1"))
    }

    /// SIGKILL to all processes below, frozen ones too.
    pub fn kill(&self) -> Result<(), Failure> {
        self.write("cgroup.kill", "1")
    }

    /// All processes of this cgroup and of those which the container made below it.
    pub fn pids(&self) -> Result<Vec<Pid>, Failure> {
        let mut pids = Vec::new();
        for path in self.tree()? {
            // A cgroup that vanishes meanwhile has no processes, nor has one in threaded mode of its own (EOPNOTSUPP).
            let Ok(text) = fs::read_to_string(path.join("cgroup.procs")) else {
                continue;
            };
            pids.extend(
                text.lines()
                    .filter_map(|line| line.parse().ok())
                    .map(Pid::from_raw),
            );
        }
        Ok(pids)
    }

    /// An inotify that becomes readable when `memory.events` changes.
    pub fn watch_memory_events(&self) -> Result<OwnedFd, Failure> {
        let file = self.path.join("memory.events");
        let step = format!("watch {}", file.display());
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .map_err(at(step.as_str()))?;
        inotify
            .add_watch(&file, AddWatchFlags::IN_MODIFY)
            .map_err(at(step.as_str()))?;
        Ok(inotify.into())
    }

    /// One value of a `name value` file such as memory.events; 0 where there is none.
    pub fn value(&self, file: &str, name: &str) -> Result<u64, Failure> {
        let text = self.read(file)?.unwrap_or_default();
        Ok(flat_keyed(&text)
            .find(|(key, _)| *key == name)
            .map_or(0, |(_, value)| value))
    }

    /// Kills what is left and removes the cgroup with all below it. Fine if it is gone already.
    pub fn remove(&self) -> Result<(), Failure> {
        if !self.path.exists() {
            return Ok(());
        }
        let killed = self
            .kill()
            .and_then(|()| self.wait_for_event("populated", "0", EMPTY_DEADLINE));
        match killed {
            // Another call has removed it meanwhile.
            Err(failure) if [Some(libc::ENOENT), Some(libc::ENODEV)].contains(&failure.errno) => {}
            killed => _ = killed?,
        }
        for path in self.tree()?.iter().rev() {
            match fs::remove_dir(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(at(format!("remove cgroup {}", path.display()))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// This cgroup and all below it, parents first.
    fn tree(&self) -> Result<Vec<PathBuf>, Failure> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while let Some(path) = found.get(next) {
            let listing = match fs::read_dir(path) {
                Ok(listing) => listing,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    next += 1;
                    continue;
                }
                Err(error) => return Err(at(format!("list cgroup {}", path.display()))(error)),
            };
            let children: Vec<PathBuf> = listing
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path())
                .collect();
            found.extend(children);
            next += 1;
        }
        Ok(found)
    }

    /// Waits until `name` of cgroup.events has this value; false after the deadline.
    fn wait_for_event(&self, name: &str, value: &str, deadline: Duration) -> Result<bool, Failure> {
        let file = self.path.join("cgroup.events");
        let step = format!("wait for {name} {value} in {}", file.display());
        let until = Instant::now() + deadline;
        loop {
            // Each look opens the file anew: POLLPRI reports changes since this descriptor was last read.
            let mut events = File::open(&file).map_err(at(step.as_str()))?;
            let mut text = String::new();
            events
                .read_to_string(&mut text)
                .map_err(at(step.as_str()))?;
            if text
                .lines()
                .any(|line| line.split_once(' ') == Some((name, value)))
            {
                return Ok(true);
            }
            let now = Instant::now();
            if now >= until {
                return Ok(false);
            }
            ready_by(
                events.as_fd(),
                PollFlags::POLLPRI,
                until.min(now + LOOK_AGAIN),
            )
            .map_err(at(step.as_str()))?;
        }
    }
}

/// The lines of a "flat keyed" cgroup file.
pub fn flat_keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// Makes every controller of the guest available to the containers.
fn enable_controllers(root: &Path) -> Result<(), Failure> {
    let step = format!("enable the cgroup controllers of {}", root.display());
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).map_err(at(&*step))?;
    let control = root.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&control).map_err(at(&*step))?;
    for controller in controllers.split_whitespace() {
        if !enabled.split_whitespace().any(|name| name == controller) {
            fs::write(&control, format!("+{controller}"))
                .map_err(at(format!("enable the cgroup controller {controller}")))?;
        }
    }
    Ok(())
}
