//! The agent's ends of a process's standard streams: pipes, or the master of its terminal.

use crate::container::ChildStdio;
use crate::streams::StreamEnd;
use coffer_proto::agent;
use coffer_proto::stream::Stream;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use tokio::net::unix::pipe;
use tokio::sync::watch;

/// Why something could not be done with the streams of a process.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    #[error("there is no {0:?}")]
    NoStream(Stream),
    #[error("{0:?} is attached already")]
    Attached(Stream),
    #[error("there is no terminal")]
    NoTerminal,
    #[error("a terminal can't have {rows} rows and {columns} columns")]
    TerminalSize { rows: u32, columns: u32 },
    #[error("the kernel refused")]
    Kernel(#[from] io::Error),
}

impl From<nix::Error> for StdioError {
    fn from(error: nix::Error) -> Self {
        Self::Kernel(error.into())
    }
}

/// The agent's side of the standard streams of one process.
#[derive(Debug)]
pub struct Stdio {
    /// The streams the process has; None where one is attached to a connection.
    ends: Mutex<HashMap<Stream, Option<StreamEnd>>>,
    /// True when the host has no more input than what is under way.
    close_stdin: watch::Sender<bool>,
    terminal: Option<OwnedFd>,
}

/// The streams of a process that is not there yet, so its terminal is not either.
#[derive(Debug)]
pub struct Planned {
    wire: agent::Stdio,
    ends: HashMap<Stream, StreamEnd>,
    close_stdin: watch::Sender<bool>,
}

/// Room of a stdio pipe: the writer and the agent take turns less often than with the kernel's 64 KiB.
const PIPE_BYTES: i32 = 256 << 10;

impl Planned {
    /// Makes the pipes that `wire` asks for; the second value is for the process. Inside a tokio runtime.
    pub fn new(wire: agent::Stdio) -> Result<(Self, ChildStdio), StdioError> {
        let mut planned = Self {
            wire,
            ends: HashMap::new(),
            close_stdin: watch::Sender::new(false),
        };
        let wire = &planned.wire;
        if wire.terminal {
            let (rows, columns) = terminal_size(wire.rows, wire.columns)?;
            return Ok((planned, ChildStdio::Terminal { rows, columns }));
        }
        let (stdin, stdout, stderr) = (wire.stdin, wire.stdout, wire.stderr);
        let child = ChildStdio::Streams {
            stdin: stdin.then(|| planned.pipe(Stream::Stdin)).transpose()?,
            stdout: stdout.then(|| planned.pipe(Stream::Stdout)).transpose()?,
            stderr: stderr.then(|| planned.pipe(Stream::Stderr)).transpose()?,
        };
        Ok((planned, child))
    }

    /// Makes one pipe and returns the process's end.
    fn pipe(&mut self, stream: Stream) -> Result<OwnedFd, StdioError> {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let (ours, theirs) = if stream == Stream::Stdin {
            (write, read)
        } else {
            (read, write)
        };
        // Only our end must never block, and each end of a pipe has its own flags. Root may enlarge pipes; a smaller one
        // works as well.
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let _ = fcntl(&ours, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        let end = match stream {
            Stream::Stdin => self.input(pipe::Sender::from_owned_fd(ours)?),
            Stream::Stdout | Stream::Stderr => {
                StreamEnd::Output(pipe::Receiver::from_owned_fd(ours)?)
            }
        };
        self.ends.insert(stream, end);
        Ok(theirs)
    }

    fn input(&self, to: pipe::Sender) -> StreamEnd {
        StreamEnd::Input {
            to,
            closing: self.close_stdin.subscribe(),
        }
    }

    /// The process is there, with the master of its terminal if it has one.
    pub fn complete(mut self, terminal: Option<OwnedFd>) -> Result<Stdio, StdioError> {
        if let Some(master) = &terminal {
            fcntl(master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
            // Not a pipe, but read, written and polled like one, in both directions.
            if self.wire.stdin {
                let to = pipe::Sender::from_owned_fd_unchecked(master.try_clone()?)?;
                self.ends.insert(Stream::Stdin, self.input(to));
            }
            if self.wire.stdout {
                let from = pipe::Receiver::from_owned_fd_unchecked(master.try_clone()?)?;
                self.ends.insert(Stream::Stdout, StreamEnd::Output(from));
            }
        }
        let ends = self
            .ends
            .into_iter()
            .map(|(stream, end)| (stream, Some(end)));
        Ok(Stdio {
            ends: Mutex::new(ends.collect()),
            close_stdin: self.close_stdin,
            terminal,
        })
    }
}

impl Stdio {
    /// Hands out one stream, once.
    pub fn attach(&self, stream: Stream) -> Result<StreamEnd, StdioError> {
        match self
            .ends
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_mut(&stream)
        {
            Some(end) => end.take().ok_or(StdioError::Attached(stream)),
            None => Err(StdioError::NoStream(stream)),
        }
    }

    /// Ends the stdin after what was sent. A terminal has no end of input of its own: there this does nothing.
    pub fn close_stdin(&self) -> Result<(), StdioError> {
        if self.terminal.is_some() {
            return Ok(());
        }
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let end = ends
            .get_mut(&Stream::Stdin)
            .ok_or(StdioError::NoStream(Stream::Stdin))?;
        // One that is not attached has nothing to wait for.
        drop(end.take());
        self.close_stdin.send_replace(true);
        Ok(())
    }

    /// Sets the size of the terminal; the kernel sends SIGWINCH.
    #[allow(unsafe_code)]
    pub fn resize(&self, rows: u32, columns: u32) -> Result<(), StdioError> {
        let (rows, columns) = terminal_size(rows, columns)?;
        let master = self.terminal.as_ref().ok_or(StdioError::NoTerminal)?;
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
        match unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().into()),
        }
    }
}

fn terminal_size(rows: u32, columns: u32) -> Result<(u16, u16), StdioError> {
    match (rows.try_into(), columns.try_into()) {
        (Ok(rows), Ok(columns)) => Ok((rows, columns)),
        _ => Err(StdioError::TerminalSize { rows, columns }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    fn complete(wire: agent::Stdio) -> (Stdio, ChildStdio) {
        let (planned, child) = Planned::new(wire).unwrap();
        (planned.complete(None).unwrap(), child)
    }

    #[tokio::test]
    async fn a_stream_is_attached_once_and_only_if_it_was_asked_for() {
        let wire = agent::Stdio {
            stdin: true,
            stderr: true,
            ..Default::default()
        };
        let (stdio, child) = complete(wire);
        assert!(matches!(
            child,
            ChildStdio::Streams {
                stdin: Some(_),
                stdout: None,
                stderr: Some(_)
            }
        ));
        assert!(matches!(
            stdio.attach(Stream::Stderr),
            Ok(StreamEnd::Output(_))
        ));
        assert!(matches!(
            stdio.attach(Stream::Stderr),
            Err(StdioError::Attached(Stream::Stderr))
        ));
        assert!(matches!(
            stdio.attach(Stream::Stdout),
            Err(StdioError::NoStream(Stream::Stdout))
        ));
    }

    #[tokio::test]
    async fn closing_a_stdin_that_nobody_attached_ends_it() {
        let (stdio, child) = complete(agent::Stdio {
            stdin: true,
            ..Default::default()
        });
        let ChildStdio::Streams {
            stdin: Some(stdin), ..
        } = child
        else {
            panic!("{child:?}")
        };
        stdio.close_stdin().unwrap();
        assert_eq!(std::fs::File::from(stdin).read(&mut [0]).unwrap(), 0);
        let (stdio, _) = complete(agent::Stdio::default());
        assert!(matches!(
            stdio.close_stdin(),
            Err(StdioError::NoStream(Stream::Stdin))
        ));
    }

    #[tokio::test]
    async fn a_terminal_is_resized_and_carries_both_ways() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let wire = agent::Stdio {
            terminal: true,
            stdin: true,
            stdout: true,
            ..Default::default()
        };
        let (planned, _) = Planned::new(wire).unwrap();
        let stdio = planned.complete(Some(pty.master)).unwrap();
        assert!(stdio.attach(Stream::Stdin).is_ok() && stdio.attach(Stream::Stdout).is_ok());
        stdio.resize(7, 99).unwrap();
        let size = std::process::Command::new("stty")
            .arg("size")
            .stdin(pty.slave)
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&size.stdout), "7 99\n");
        let error = stdio.resize(70_000, 1).unwrap_err();
        assert!(error.to_string().contains("70000"), "{error}");
    }
}
