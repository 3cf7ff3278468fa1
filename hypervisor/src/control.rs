//! The VMM's end of the control socket ([`coffer_proto::vmm`]).

use coffer_proto::vmm::{
    self, CONTROL_FD, ControlError, Event, Exit, Files, FromVmm, Reply, Request,
};
use nix::sys::socket::{getsockopt, sockopt};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The socket. The event loop reads it; replies and events may block while the shim doesn't read, which is its choice.
#[derive(Debug)]
pub struct Control(OwnedFd);

impl Control {
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Takes over the inherited descriptor [`CONTROL_FD`]. Only once, at the start of the process.
    #[allow(unsafe_code)]
    pub fn inherited() -> std::io::Result<Self> {
        nix::fcntl::fcntl(inherited_fd(), nix::fcntl::FcntlArg::F_GETFD)?;
        // SAFETY: the descriptor is open, as just seen, and by contract with the shim it is ours.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }))
    }

    /// Takes the next request. Blocks; the event loop calls it when there is one.
    pub fn receive(&self) -> Result<(Request, Files), ControlError> {
        vmm::receive(self.0.as_fd())
    }

    pub fn reply(&self, reply: Reply) -> Result<(), ControlError> {
        vmm::send(self.0.as_fd(), &FromVmm::Reply(reply), &[])
    }

    pub fn event(&self, event: Event) -> Result<(), ControlError> {
        vmm::send(self.0.as_fd(), &FromVmm::Event(event), &[])
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Control {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A pidfd of the supervisor: of the process that made the control socket. It tells the supervisor's end even where somebody
/// else still holds its end of the socket. None where the kernel can't tell, for example across PID namespaces.
#[allow(unsafe_code)]
pub fn supervisor(control: BorrowedFd<'_>) -> Option<OwnedFd> {
    let pid = getsockopt(&control, sockopt::PeerCredentials).ok()?.pid();
    // SAFETY: plain system call; what it returns belongs to nobody else.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel just opened it for us.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[allow(unsafe_code)]
fn inherited_fd() -> BorrowedFd<'static> {
    // SAFETY: used for one fcntl or send, each of which fails where the descriptor is not open.
    unsafe { BorrowedFd::borrow_raw(CONTROL_FD) }
}

/// Makes a panic of any thread end the process, after the log and the shim were told.
pub fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        let message = format!("the VMM panicked: {info}");
        crate::report(&message);
        let event = FromVmm::Event(Event::Exited(Exit::Failed { message }));
        // The shim may be gone as well; the process ends either way.
        let _ = vmm::send(inherited_fd(), &event, &[]);
        std::process::abort();
    }));
}
