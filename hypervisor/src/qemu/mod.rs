//! The second hypervisor: `qemu-system-x86_64 -M microvm` behind the control protocol of coffer-vmm.
//!
//! `coffer-qemu` takes the same messages on fd 3 ([`coffer_proto::vmm`]), starts QEMU with the devices that coffer-vmm
//! would have, and drives it over QMP. The guest sees no difference: virtio-mmio devices announced on the kernel
//! command line, the same vsock ([`vsock`] serves our muxer to QEMU as a vhost-user backend), the same coffer-fsd.
//!
//! ```text
//!  shim ── fd 3 ──► coffer-qemu ── QMP ──► qemu-system-x86_64 ── vhost-user ──► coffer-fsd
//!                   muxer thread ◄──────── vhost-user ──┘
//! ```
//!
//! Neither process keeps privileges ([`process::lock_up`], [`process::lock_up_further`]); QEMU gets every file open. QEMU dies with us, and we end
//! when the shim's end of fd 3 closes or its process ends.
//!
//! Without a `/dev/kvm` in the configuration the guest runs under software emulation (TCG).

mod arguments;
mod console;
mod machine;
mod process;
mod qmp;
mod vsock;

use coffer_proto::error_chain::chain;
use coffer_proto::vmm::{self, ControlError, Exit, Files, FromVmm, Reply, Request};
use machine::Machine;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// Why the machine can't be made or driven.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("the first request was not Boot")]
    NotBoot,
    #[error("QEMU's microvm has {have} device slots and the configuration needs {want}")]
    TooManyDevices { want: usize, have: usize },
    #[error("qemu-system-x86_64 is not installed; on Debian: apt-get install qemu-system-x86")]
    NoQemu,
    #[error("can't {what}")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("can't set up vsock")]
    Vsock(#[from] crate::virtio::vsock::VsockError),
    #[error("can't serve vsock to QEMU: {reason}")]
    VhostUser { reason: String },
    #[error("QEMU did not start: {message}")]
    Start { message: String },
    #[error(transparent)]
    Qmp(#[from] qmp::QmpError),
    #[error(transparent)]
    Jail(#[from] crate::jail::JailError),
    #[error(transparent)]
    Seccomp(#[from] crate::seccomp::SeccompError),
    #[error("QEMU's microvm has the disks that it boots with, and no others")]
    EmptyDisk,
    #[error("network slot {slot} {reason}")]
    Nic { slot: u8, reason: &'static str },
}

impl Error {
    fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Host {
            what,
            source: source.into(),
        }
    }
}

/// Serves one machine over `control` until it ended or the shim is gone.
pub fn run(control: &OwnedFd) -> Result<(), Error> {
    let started = Instant::now();
    let supervisor = crate::control::supervisor(control.as_fd());
    let (request, files): (Request, Files) = vmm::receive(control.as_fd())?;
    let booted = match request {
        Request::Boot(config) => Machine::boot(&config, files, supervisor, started),
        _ => Err(Error::NotBoot),
    };
    let mut machine = match booted {
        Ok(machine) => machine,
        Err(error) => {
            reply(
                control,
                Reply::Failed {
                    message: chain(&error),
                },
            )?;
            return Err(error);
        }
    };
    reply(control, Reply::Done)?;
    let exit = machine.serve(control)?;
    if let Exit::Failed { message } = &exit {
        eprintln!("coffer-qemu: {message}");
    }
    match vmm::send(
        control.as_fd(),
        &FromVmm::Event(vmm::Event::Exited(exit)),
        &[],
    ) {
        // Nobody is left who wants to know.
        Err(ControlError::Closed) => Ok(()),
        sent => Ok(sent?),
    }
}

fn reply(control: &OwnedFd, reply: Reply) -> Result<(), ControlError> {
    vmm::send(control.as_fd(), &FromVmm::Reply(reply), &[])
}
