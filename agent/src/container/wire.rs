//! The socket between the agent and its stage.
//!
//! A message is a `u32` length (little endian) and that many bytes of JSON; its file descriptors ride on the length.
//! The agent writes one [`Work`] and later one byte, [`GO`]; the stage and the process it clones write [`Report`]s.
#![allow(unsafe_code, reason = "received descriptors are taken into ownership")]

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use coffer_proto::limits::MAX_RPC_MESSAGE;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use oci_spec::runtime::{ExecCPUAffinity, LinuxPersonality, LinuxSeccomp, Process, Spec};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::failure::Failure;

/// A spec came in one RPC message and may grow a little when it is written again.
const MAX_MESSAGE: usize = 2 * MAX_RPC_MESSAGE;
/// Three streams, four namespaces, the cgroup and init, with room to spare.
const MAX_FDS: usize = 16;

/// Lets the waiting process run its program.
pub const GO: u8 = 1;

/// What the stage is to do. The descriptors of the message are named in the order they come.
#[derive(Debug, Serialize, Deserialize)]
pub struct Work {
    pub fds: Vec<FdName>,
    pub id: String,
    pub stdio: Stdio,
    pub task: Task,
}

/// Either of the two things a stage does.
#[derive(Debug, Serialize, Deserialize)]
pub enum Task {
    Create(Box<Spec>),
    Exec(Box<ExecTask>),
}

/// A further process of a container, with what it takes over from the container.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecTask {
    pub process: Process,
    /// `CLONE_NEW*` of the namespaces to join, without PID.
    pub namespaces: i32,
    pub seccomp: Option<LinuxSeccomp>,
    pub personality: Option<LinuxPersonality>,
    pub affinity: Option<ExecCPUAffinity>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum Stdio {
    /// The streams among the descriptors; those missing are /dev/null.
    Streams,
    Terminal {
        rows: u16,
        columns: u16,
    },
}

/// What a descriptor of [`Work`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FdName {
    Stdin,
    Stdout,
    Stderr,
    Cgroup,
    Ipc,
    Uts,
    Net,
    Pid,
    /// pidfd of the container's init.
    Init,
}

pub type Fds = HashMap<FdName, OwnedFd>;

/// What the stage and the new process say, in this order; a failure may come at any time.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// From the stage: the process exists. Its pidfd is attached.
    Cloned {
        pid: i32,
        /// `CLONE_NEW*` that a further process has to join, without PID.
        namespaces: i32,
    },
    /// From the process: it waits for [`GO`]. The master of its terminal is attached if it has one.
    Ready,
    Failed(Failure),
}

/// Sends one message.
pub fn send<T: Serialize>(
    socket: &UnixStream,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len())
        .map_err(io::Error::other)?
        .to_le_bytes();
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() {
        &rights[..0]
    } else {
        &rights[..]
    };
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&length)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    (&*socket).write_all(&length[sent..])?;
    (&*socket).write_all(&body)
}

/// Receives one message; `None` at the end of the stream.
pub fn receive<T: DeserializeOwned>(socket: &UnixStream) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut length = [0; 4];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut parts = [IoSliceMut::new(&mut length)];
    // With a timeout on the socket the kernel never restarts the call, and SIGCHLD is frequent.
    let received = loop {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            received => break received?,
        }
    };
    let mut fds = Vec::new();
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just installed these descriptors for us and nobody else knows them.
            fds.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    let got = received.bytes;
    if got == 0 {
        return Ok(None);
    }
    (&*socket).read_exact(&mut length[got..])?;
    let size = u32::from_le_bytes(length) as usize;
    if size > MAX_MESSAGE {
        return Err(io::Error::other(format!("a message of {size} bytes")));
    }
    let mut body = vec![0; size];
    (&*socket).read_exact(&mut body)?;
    Ok(Some((serde_json::from_slice(&body)?, fds)))
}
