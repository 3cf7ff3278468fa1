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

use std::os::fd::OwnedFd;

use coffer_proto::agent::StatContainerResponse;
use coffer_proto::ids::ContainerId;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxResources, Process, Spec};

/// What to do with the standard streams of a process.
#[derive(Debug)]
pub enum ChildStdio {
    /// Inherited as they are; `None` is /dev/null.
    Streams {
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    },
    /// A new pseudo-terminal of the container's own devpts, of this size; its master comes back in [`Started`].
    Terminal { rows: u16, columns: u16 },
}

/// Namespaces that the containers of the pod have in common.
#[derive(Debug, Default)]
pub struct SharedNamespaces {
    /// `None` is the agent's own, here and in the next two.
    pub ipc: Option<OwnedFd>,
    pub uts: Option<OwnedFd>,
    pub net: Option<OwnedFd>,
    /// `None` gives every container a PID namespace of its own.
    pub pid: Option<OwnedFd>,
}

/// Why a container operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the spec that can't be honoured, by its JSON name.
    #[error("{field}: {reason}")]
    Refused { field: String, reason: String },
    /// The program could not be executed; `status` is the exit status a shell would give: 126 or 127.
    #[error("{message}")]
    Exec { status: u8, message: String },
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
}

impl Started {
    /// Lets the process run its program. Blocks until that has happened or failed ([`Error::Exec`]).
    pub fn release(self) -> Result<(), Error> {
        unimplemented!()
    }
}

/// A container, from creation until [`Container::delete`].
#[derive(Debug)]
pub struct Container {}

/// Parses the JSON of an OCI object and refuses fields that this build doesn't know.
pub fn parse<T: serde::de::DeserializeOwned + serde::Serialize>(_json: &[u8]) -> Result<T, Error> {
    unimplemented!()
}

/// Creates a container up to the point before its process runs the user's program.
pub fn create(
    _id: &ContainerId,
    _spec: &Spec,
    _stdio: ChildStdio,
    _pod: &SharedNamespaces,
) -> Result<(Container, Started), Error> {
    unimplemented!()
}

/// What the agent's executable does when its `argv[0]` is [`STAGE_NAME`].
pub fn stage_main() -> ! {
    unimplemented!()
}

/// `argv[0]` of the stage.
pub const STAGE_NAME: &str = "coffer-init-stage";

/// Gives the agent a root that `pivot_root(2)` can leave, which an initramfs is not. The first thing PID 1 does,
/// before it mounts anything; no-op elsewhere.
pub fn leave_initramfs() -> Result<(), Error> {
    unimplemented!()
}

impl Container {
    /// Prepares another process in the container.
    pub fn exec(&self, _process: &Process, _stdio: ChildStdio) -> Result<Started, Error> {
        unimplemented!()
    }

    /// Freezes all processes; returns when they are frozen.
    pub fn pause(&self) -> Result<(), Error> {
        unimplemented!()
    }

    pub fn resume(&self) -> Result<(), Error> {
        unimplemented!()
    }

    /// Applies new limits; fields that are absent stay as they are.
    pub fn update(&self, _resources: &LinuxResources) -> Result<(), Error> {
        unimplemented!()
    }

    pub fn stat(&self) -> Result<StatContainerResponse, Error> {
        unimplemented!()
    }

    /// All processes of the container, in the agent's PID namespace.
    pub fn pids(&self) -> Result<Vec<Pid>, Error> {
        unimplemented!()
    }

    /// SIGKILL to every process, also in a paused container.
    pub fn kill_all(&self) -> Result<(), Error> {
        unimplemented!()
    }

    /// An inotify descriptor, non-blocking, that becomes readable when [`Container::oom_kills`] may have changed.
    pub fn oom_events(&self) -> Result<OwnedFd, Error> {
        unimplemented!()
    }

    /// How many processes the kernel has killed for memory in this container.
    pub fn oom_kills(&self) -> Result<u64, Error> {
        unimplemented!()
    }

    /// Kills what is left and removes the cgroup. Does nothing the second time.
    pub fn delete(&self) -> Result<(), Error> {
        unimplemented!()
    }
}
