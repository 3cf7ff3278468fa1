//! virtiofsd's file system and vhost-user backend, configured for a pod's share.

#![allow(unsafe_code)]

use anyhow::{Context, bail};
use nix::fcntl::FcntlArg;
use nix::sys::socket::{getsockopt, sockopt};
use std::fs::File;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, PassthroughFs};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The listening socket.
const LISTENER_FD: i32 = 3;
/// Descriptors that are not for files of the guest: up to 509 memory regions, rings, and some for single requests.
const OWN_DESCRIPTORS: u64 = 640;
/// How long the guest may believe names and attributes without asking again (cache policy "auto").
const CACHE_TIME: Duration = Duration::from_secs(1);

/// Takes the socket that the shim handed over.
pub fn inherited_listener() -> anyhow::Result<Listener> {
    // SAFETY: only tests whether the descriptor is open, and does not outlive this line.
    let inherited = nix::fcntl::fcntl(
        unsafe { BorrowedFd::borrow_raw(LISTENER_FD) },
        FcntlArg::F_GETFD,
    );
    inherited.context("no file descriptor 3 was inherited")?;
    // SAFETY: it is open, by the contract of this program for us, and this is the only place that takes it.
    let listener = unsafe { OwnedFd::from_raw_fd(LISTENER_FD) };
    let listening =
        getsockopt(&listener, sockopt::AcceptConn).context("file descriptor 3 is not a socket")?;
    if !listening {
        bail!("the socket on file descriptor 3 does not listen");
    }
    let listener = UnixListener::from(listener);
    listener
        .set_nonblocking(false)
        .context("can't make the socket blocking")?;
    Ok(Listener::from(listener))
}

/// The file system below the root directory. Inodes are O_PATH descriptors, never file handles: see
/// [`crate::jail`] for why.
pub fn open(proc_self_fd: File, descriptors: u64) -> anyhow::Result<PassthroughFs> {
    let Some(guest_fd_limit) = descriptors.checked_sub(OWN_DESCRIPTORS) else {
        bail!(
            "a limit of {descriptors} open files is too low: {OWN_DESCRIPTORS} are needed before any for the guest"
        );
    };
    let config = Config {
        entry_timeout: CACHE_TIME,
        attr_timeout: CACHE_TIME,
        cache_policy: CachePolicy::Auto,
        xattr: true,
        proc_sfd_rawfd: Some(proc_self_fd),
        // Container roots and volumes are mounts below the share: their inode numbers may collide.
        announce_submounts: true,
        inode_file_handles: InodeFileHandlesMode::Never,
        guest_fd_limit,
        ..Config::default()
    };
    PassthroughFs::new(config).context("can't open the share")
}

/// Serves one connection until the VMM closes it.
pub fn serve(files: PassthroughFs, mut listener: Listener) -> anyhow::Result<()> {
    // No thread pool: requests are answered in order by the thread of the rings.
    let backend = VhostUserFsBackendBuilder::default()
        .build(files)
        .context("can't make the vhost-user backend")?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("vhost-user".into(), Arc::new(backend), memory).map_err(in_words)?;
    daemon
        .start(&mut listener)
        .map_err(in_words)
        .context("can't accept the connection of the VMM")?;
    let outcome = daemon.wait();
    // A ring's thread may be waiting for a slow disk; the end of the VM must not wait for it.
    match outcome {
        Ok(())
        | Err(DaemonError::HandleRequest(
            VhostUserError::Disconnected | VhostUserError::PartialMessage,
        )) => std::process::exit(0),
        Err(error) => {
            eprintln!("coffer-fsd: the vhost-user connection failed: {error}");
            std::process::exit(1)
        }
    }
}

/// The daemon's error type has no `std::error::Error`.
#[allow(clippy::needless_pass_by_value)] // so that it is a function for map_err
fn in_words(error: DaemonError) -> anyhow::Error {
    anyhow::anyhow!("{error}")
}
