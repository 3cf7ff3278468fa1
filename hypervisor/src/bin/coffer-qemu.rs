//! `coffer-qemu`: QEMU's microvm behind the control socket on fd 3. See `coffer_hypervisor::qemu`.

use anyhow::Context;
use coffer_proto::vmm::CONTROL_FD;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coffer-qemu: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[allow(unsafe_code)]
fn run() -> anyhow::Result<()> {
    // SAFETY: only tests whether the descriptor is open.
    let flags = unsafe { libc::fcntl(CONTROL_FD, libc::F_GETFD) };
    nix::errno::Errno::result(flags)
        .context("no control socket was inherited on file descriptor 3")?;
    // SAFETY: it is open, by the contract of this program for us, and nothing else here takes it.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    nix::fcntl::fcntl(
        &control,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .context("can't keep the control socket from QEMU")?;
    Ok(coffer_hypervisor::qemu::run(&control)?)
}
