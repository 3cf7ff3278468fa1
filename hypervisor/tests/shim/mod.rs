//! The shim's side of one VM, and kernels made of a few bytes.

#[allow(dead_code)] // Each program of tests runs some of them.
pub mod code;

use coffer_proto::limits::GUEST_CID;
use coffer_proto::vmm::{
    self, CONTROL_FD, Event, Exit, FdIndex, FromVmm, Metrics, Reply, Request, VmConfig,
    VsockConfig, console,
};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Long enough for a busy machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a test may change before the VM starts.
pub struct Setup {
    pub config: VmConfig,
    pub initrd: Vec<u8>,
    /// Makes the control socket: our end and the hypervisor's.
    pub control: Box<dyn Fn() -> (OwnedFd, OwnedFd)>,
    /// Which hypervisor process.
    pub program: &'static str,
}

/// A `coffer-vmm` process, or a `coffer-qemu`.
pub struct Vmm {
    child: Child,
    control: Option<OwnedFd>,
    console: File,
    directory: tempfile::TempDir,
}

impl Vmm {
    /// A VM that has booted this kernel.
    pub fn boot(kernel: &[u8]) -> Self {
        Self::boot_with(kernel, |_| {})
    }

    pub fn boot_with(kernel: &[u8], change: impl Fn(&mut VmConfig)) -> Self {
        let mut vmm = Self::start(kernel, &|setup: &mut Setup| change(&mut setup.config));
        let reply = vmm.message();
        assert_eq!(reply, FromVmm::Reply(Reply::Done), "{}", vmm.log());
        vmm
    }

    /// A process that was asked to boot.
    pub fn start(kernel: &[u8], change: &dyn Fn(&mut Setup)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let log = File::create(directory.path().join("log")).unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let console_file = tempfile::tempfile().unwrap();
        console_file.set_len(console::FILE_BYTES as u64).unwrap();
        let mut setup = Setup {
            config: config(),
            initrd: b"initrd".to_vec(),
            control: Box::new(|| vmm::control_pair().unwrap()),
            program: env!("CARGO_BIN_EXE_coffer-vmm"),
        };
        change(&mut setup);
        let accelerator = if setup.config.kvm.is_some() {
            "/dev/kvm"
        } else {
            "/dev/null"
        };
        let kvm = File::options()
            .read(true)
            .write(true)
            .open(accelerator)
            .expect("these tests need /dev/kvm");
        let (kernel, initrd) = (file(kernel), file(&setup.initrd));
        let (control, theirs) = (setup.control)();
        setsockopt(
            &control,
            sockopt::ReceiveTimeout,
            &TimeVal::new(PATIENCE.as_secs() as i64, 0),
        )
        .unwrap();
        let child = spawn(setup.program, &theirs, log);
        let files = [
            kernel.as_fd(),
            initrd.as_fd(),
            kvm.as_fd(),
            listener.as_fd(),
            console_file.as_fd(),
        ];
        vmm::send(
            control.as_fd(),
            &Request::Boot(Box::new(setup.config)),
            &files,
        )
        .unwrap();
        Self {
            child,
            control: Some(control),
            console: console_file,
            directory,
        }
    }

    pub fn message(&mut self) -> FromVmm {
        let control = self.control.as_ref().unwrap();
        match vmm::receive(control.as_fd()) {
            Ok((message, _)) => message,
            Err(error) => panic!("{error}; the log says: {}", self.log()),
        }
    }

    pub fn event(&mut self) -> Event {
        match self.message() {
            FromVmm::Event(event) => event,
            other => panic!("{other:?}"),
        }
    }

    /// A request whose answer is Done.
    pub fn ask(&mut self, request: &Request) {
        let reply = self.ask_with(request, &[]);
        assert_eq!(reply, FromVmm::Reply(Reply::Done), "{request:?}");
    }

    /// A request with files; gives what comes next.
    pub fn ask_with(&mut self, request: &Request, files: &[BorrowedFd<'_>]) -> FromVmm {
        vmm::send(self.control.as_ref().unwrap().as_fd(), request, files).unwrap();
        self.message()
    }

    pub fn metrics(&mut self) -> Metrics {
        vmm::send(
            self.control.as_ref().unwrap().as_fd(),
            &Request::Metrics,
            &[],
        )
        .unwrap();
        match self.message() {
            FromVmm::Reply(Reply::Metrics(metrics)) => metrics,
            other => panic!("{other:?}"),
        }
    }

    pub fn until_exit(&mut self) -> (Vec<Event>, Exit) {
        let mut events = Vec::new();
        loop {
            match self.event() {
                Event::Exited(exit) => return (events, exit),
                event => events.push(event),
            }
        }
    }

    pub fn hang_up(&mut self) {
        self.control = None;
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the VMM does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap()
    }

    /// What the guest wrote so far.
    pub fn console(&self) -> String {
        String::from_utf8(console::read(&self.console).unwrap()).unwrap()
    }

    pub fn log_path(&self) -> PathBuf {
        log_path(self.directory.path())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that made a control socket, gave it away, and does nothing any more.
pub struct Supervisor {
    pid: nix::unistd::Pid,
    control: OwnedFd,
    theirs: OwnedFd,
}

impl Supervisor {
    #[allow(unsafe_code)]
    pub fn new() -> Self {
        let (near, far) = vmm::control_pair().unwrap();
        // SAFETY: the child makes system calls only; what it allocates it takes from its own copy of the heap.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let (control, theirs) = vmm::control_pair().unwrap();
                vmm::send(
                    far.as_fd(),
                    &Request::Stop,
                    &[control.as_fd(), theirs.as_fd()],
                )
                .unwrap();
                loop {
                    nix::unistd::pause();
                }
            }
            nix::unistd::ForkResult::Parent { child } => {
                let (_, mut files): (Request, _) = vmm::receive(near.as_fd()).unwrap();
                let (control, theirs) = (files.take(FdIndex(0)), files.take(FdIndex(1)));
                Self {
                    pid: child,
                    control: control.unwrap(),
                    theirs: theirs.unwrap(),
                }
            }
        }
    }

    pub fn control(&self) -> (OwnedFd, OwnedFd) {
        let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
        (copy(&self.control), copy(&self.theirs))
    }

    pub fn die(&self) {
        nix::sys::signal::kill(self.pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        nix::sys::wait::waitpid(self.pid, None).unwrap();
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // Fails where it is dead already.
        let _ = nix::sys::signal::kill(self.pid, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(self.pid, None);
    }
}

fn log_path(directory: &Path) -> PathBuf {
    directory.join("log")
}

#[allow(unsafe_code)]
fn spawn(program: &str, control: &OwnedFd, log: File) -> Child {
    let fd = control.as_raw_fd();
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: two system calls, which are allowed between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let done = if fd == CONTROL_FD {
                libc::fcntl(fd, libc::F_SETFD, 0)
            } else {
                libc::dup2(fd, CONTROL_FD)
            };
            nix::Error::result(done).map(drop).map_err(Into::into)
        });
    }
    command.spawn().unwrap()
}

fn config() -> VmConfig {
    VmConfig {
        id: "test".parse().unwrap(),
        vcpus: 1,
        memory_mib: 32,
        max_memory_mib: 0,
        kernel: FdIndex(0),
        initrd: FdIndex(1),
        cmdline: String::new(),
        kvm: Some(FdIndex(2)),
        vsock: VsockConfig {
            guest_cid: GUEST_CID,
            listener: FdIndex(3),
            ports: Vec::new(),
        },
        console: FdIndex(4),
        fs: None,
        nics: Vec::new(),
        disks: Vec::new(),
        balloon: true,
        uid: 64_000,
    }
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}
