//! The order that a command gives a stand-in, and the socket between the two.

use super::options::DetachedOptions;
use super::view::View;
use super::{Error, FAILED, supervisor, unicode};
use crate::cgroup::CgroupPath;
use crate::lease::OciRecord;
use coffer_proto::ids::{ContainerId, ExecId, SandboxId};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;

/// What a stand-in is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) sandbox: SandboxId,
    pub(super) container: ContainerId,
    /// None: the container's init.
    pub(super) exec: Option<Exec>,
    pub(super) bundle: PathBuf,
    pub(super) terminal: bool,
    /// Rows and columns at the start.
    pub(super) console_size: Option<(u16, u16)>,
    pub(super) places: Places,
    pub(super) cgroup: Option<CgroupPath>,
    pub(super) network: Network,
    pub(super) record: Option<OciRecord>,
    /// What engines see of the container's files; an exec has no part in that.
    pub(super) view: Option<View>,
}

/// Where the engine wants to find it. A stand-in is not in its caller's directory, so these are absolute.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Places {
    pub(super) console_socket: Option<PathBuf>,
    pub(super) pid_file: Option<PathBuf>,
}

impl Places {
    pub(super) fn absolute(options: &DetachedOptions) -> Result<Self, Error> {
        let absolute = |path: &Option<PathBuf>| {
            let absolute = |path: &Path| std::path::absolute(path).and_then(unicode::path);
            let absolute = path.as_deref().map(absolute).transpose();
            absolute.map_err(|source| Error::Io {
                what: format!("the path {path:?} can't be used"),
                source,
            })
        };
        Ok(Self {
            console_socket: absolute(&options.console_socket)?,
            pid_file: absolute(&options.pid_file)?,
        })
    }
}

/// A process to be made in a container that runs.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Exec {
    pub(super) id: ExecId,
    /// The OCI process block.
    pub(super) process: serde_json::Value,
}

/// The network namespace of a stand-in.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Network {
    /// That of its caller: the spec wants none.
    Callers,
    /// A new one, which the engine finds through the stand-in and wires before start.
    New,
    Path(PathBuf),
}

/// What a stand-in says to the command that started it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// It has its place on the host and is known to the supervisor.
    Ready,
    /// Its process is there.
    Done,
    Failed {
        message: String,
        status: Option<u8>,
    },
}

/// One end of the socket between the two; messages are lines of JSON.
#[derive(Debug)]
pub(super) struct Control {
    lines: BufReader<UnixStream>,
}

impl Control {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            lines: BufReader::new(stream),
        }
    }

    pub(super) fn say(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message).expect("messages have only string keys");
        line.push(b'\n');
        self.lines.get_mut().write_all(&line)
    }

    pub(super) fn hear<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

/// A stand-in that was started. Dropping this neither ends nor reaps it.
#[derive(Debug)]
pub(super) struct StandInProcess {
    child: Child,
    control: Control,
}

/// Starts one with the caller's standard streams and gives it its order.
pub(super) async fn start(root: &Path, order: &Order) -> Result<StandInProcess, Error> {
    let started = || {
        let (ours, theirs) = UnixStream::pair()?;
        fcntl(theirs.as_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
        Ok((ours, theirs))
    };
    let failed = |source| Error::Io {
        what: "can't start the stand-in".into(),
        source,
    };
    let (ours, theirs) = started().map_err(failed)?;
    let mut command = supervisor::this_program(root)?.into_std();
    command
        .arg("stand-in")
        .arg(format!("--control={}", theirs.as_raw_fd()));
    let child = command.spawn().map_err(failed)?;
    drop(theirs);
    let mut process = StandInProcess {
        child,
        control: Control::new(ours),
    };
    process.control.say(order).map_err(failed)?;
    Ok(process)
}

impl StandInProcess {
    /// Its pid on the host, which is the container's for everyone else.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it is in its place.
    pub(super) async fn ready(&mut self) -> Result<(), Error> {
        self.answer().map(drop)
    }

    /// Lets it make its process, and waits until that is there.
    pub(super) async fn go(&mut self) -> Result<(), Error> {
        // If it is gone, its last answer says why.
        let _ = self.control.say(&"go");
        self.answer().map(drop)
    }

    fn answer(&mut self) -> Result<(), Error> {
        // Nothing else happens in this program meanwhile.
        match tokio::task::block_in_place(|| self.control.hear()) {
            Ok(Answer::Ready | Answer::Done) => Ok(()),
            Ok(Answer::Failed { message, status }) => {
                let _ = self.child.wait();
                Err(Error::StandIn { message, status })
            }
            Err(error) => {
                let ended = self.child.wait();
                let how = ended.map_or_else(|_| error.to_string(), |status| status.to_string());
                Err(Error::StandIn {
                    message: format!(
                        "the process that stands for the container ended early: {how}"
                    ),
                    status: None,
                })
            }
        }
    }

    /// Waits for its end, for a command that stays; gives its exit status.
    pub(super) async fn ended(mut self) -> io::Result<u8> {
        use std::os::unix::process::ExitStatusExt;
        let waited = tokio::task::spawn_blocking(move || self.child.wait()).await;
        let status = waited.map_err(io::Error::other)??;
        let signal = status.signal().map(|signal| 128 + signal);
        let code = status.code().or(signal).unwrap_or_default();
        Ok(u8::try_from(code).unwrap_or(FAILED))
    }
}
