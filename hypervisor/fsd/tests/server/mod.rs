//! coffer-fsd as the shim starts it: a share, and a listening socket as file descriptor 3.

use nix::fcntl::{FcntlArg, fcntl};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts it on a directory, with our connection already waiting on its socket.
pub fn serve(share: &Path) -> (Child, UnixStream) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("fs.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let connection = UnixStream::connect(&path).unwrap();
    (spawn(share, &listener.into()), connection)
}

/// Starts it with any file in the place of its socket. Its standard error is a pipe.
pub fn spawn(share: &Path, listener: &OwnedFd) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coffer-fsd"));
    command
        .arg("--share")
        .arg(share)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    // Well above 3, and without the close-on-exec flag on the copy.
    let high = fcntl(listener, FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
    #[allow(unsafe_code)]
    // SAFETY: dup2 is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            nix::errno::Errno::result(libc::dup2(high, 3))
                .map(drop)
                .map_err(Into::into)
        });
    }
    let child = command.spawn().unwrap();
    nix::unistd::close(high).unwrap();
    child
}
