//! A terminal for a process that stays behind: a pty of the host whose master the engine gets.
//!
//! The terminal with echo, line editing and signals is the one in the guest. The one here only carries bytes and the window's
//! size, so it is raw. Its slave is the stand-in's controlling terminal: the kernel sends SIGWINCH when the engine sets
//! another size on the master, and SIGHUP when the engine closes it.

use nix::pty::{OpenptyResult, openpty};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);

/// What goes along with the master; engines want at least one byte, and runc sends a name here.
const GREETING: &[u8] = b"coffer-console";

/// Why there is no terminal.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    #[error("can't make a pseudo terminal")]
    Open(#[source] io::Error),
    #[error("can't send the terminal to the console socket {path:?}")]
    Send { path: PathBuf, source: io::Error },
    #[error("can't use the pseudo terminal")]
    Use(#[source] io::Error),
}

/// Both ends, before the engine has the master.
#[derive(Debug)]
pub(super) struct Console {
    pty: OpenptyResult,
}

impl Console {
    /// Opens one of this size, raw. The caller must have a session of its own.
    pub(super) fn open(rows: u16, columns: u16) -> Result<Self, ConsoleError> {
        let open = || {
            let size = nix::pty::Winsize {
                ws_row: rows,
                ws_col: columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            let pty = openpty(Some(&size), None)?;
            let mut raw = tcgetattr(&pty.slave)?;
            cfmakeraw(&mut raw);
            // Before the engine has the master, so that what it changes stays.
            tcsetattr(&pty.slave, SetArg::TCSANOW, &raw)?;
            Ok(pty)
        };
        open()
            .map(|pty| Self { pty })
            .map_err(|error: nix::Error| ConsoleError::Open(error.into()))
    }

    /// Sends the master away and makes the slave this process's terminal and standard streams.
    pub(super) fn hand_over(self, socket: &Path) -> Result<(), ConsoleError> {
        let send = || {
            let connection = UnixStream::connect(socket)?;
            let master = [self.pty.master.as_raw_fd()];
            sendmsg::<()>(
                connection.as_raw_fd(),
                &[IoSlice::new(GREETING)],
                &[ControlMessage::ScmRights(&master)],
                MsgFlags::MSG_NOSIGNAL,
                None,
            )?;
            Ok(())
        };
        send().map_err(|source| ConsoleError::Send {
            path: socket.into(),
            source,
        })?;
        adopt(&self.pty.slave).map_err(ConsoleError::Use)
    }
}

#[allow(unsafe_code)]
fn adopt(slave: &OwnedFd) -> io::Result<()> {
    // SAFETY: the request takes an integer, and the descriptor is open.
    unsafe { set_controlling_terminal(slave.as_raw_fd(), 0) }?;
    dup2_stdin(slave)?;
    dup2_stdout(slave)?;
    dup2_stderr(slave)?;
    Ok(())
}
