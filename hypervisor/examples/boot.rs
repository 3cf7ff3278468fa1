//! Plays the shim for one VM, for development and for the bench: opens all files, starts `coffer-vmm`, prints what it
//! tells, and the console when the guest did not get ready.
//!
//! `boot KERNEL INITRD [--memory MIB] [--vcpus N] [--vmm PROGRAM] [--append PARAMETERS] [--until-ready] [--balloon] [--wait S]`

use anyhow::{Context, bail};
use coffer_proto::limits::{BOOT_PHASE_AGENT_READY, GUEST_CID, HOME_PORT};
use coffer_proto::vmm::{
    self, CONTROL_FD, Event, Exit, FdIndex, FromVmm, HostPort, Reply, Request, VmConfig,
    VsockConfig, console,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

struct Options {
    kernel: String,
    initrd: String,
    memory_mib: u32,
    vcpus: u8,
    vmm: String,
    append: String,
    until_ready: bool,
    balloon: bool,
    wait: Duration,
}

fn options() -> anyhow::Result<Options> {
    let mut words = std::env::args().skip(1);
    let mut next = |what: &str| words.next().with_context(|| format!("{what} is missing"));
    let beside = std::env::current_exe()?.with_file_name("coffer-vmm");
    let mut options = Options {
        kernel: next("KERNEL")?,
        initrd: next("INITRD")?,
        memory_mib: 256,
        vcpus: 1,
        vmm: beside.to_string_lossy().into_owned(),
        append: String::new(),
        until_ready: false,
        balloon: false,
        wait: Duration::from_secs(60),
    };
    while let Ok(word) = next("") {
        match word.as_str() {
            "--memory" => options.memory_mib = next("MIB")?.parse()?,
            "--vcpus" => options.vcpus = next("N")?.parse()?,
            "--vmm" => options.vmm = next("PROGRAM")?,
            "--append" => options.append = next("PARAMETERS")?,
            "--until-ready" => options.until_ready = true,
            "--balloon" => options.balloon = true,
            "--wait" => options.wait = Duration::from_secs(next("S")?.parse()?),
            other => bail!("unknown option {other}"),
        }
    }
    Ok(options)
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let directory = tempfile::tempdir()?;
    let listener = UnixListener::bind(directory.path().join("vsock"))?;
    let (home, _agent) = UnixStream::pair()?;
    let console_file = File::from(memfd_create(c"console", MFdFlags::MFD_CLOEXEC)?);
    console_file.set_len(console::FILE_BYTES as u64)?;
    let open = |path: &str| File::open(path).with_context(|| format!("can't open {path}"));
    let (kernel, initrd) = (open(&options.kernel)?, open(&options.initrd)?);
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("can't open /dev/kvm")?;

    let files = [
        kernel.as_fd(),
        initrd.as_fd(),
        kvm.as_fd(),
        listener.as_fd(),
        home.as_fd(),
        console_file.as_fd(),
    ];
    let config = VmConfig {
        id: "boot".parse()?,
        vcpus: options.vcpus,
        memory_mib: options.memory_mib,
        kernel: FdIndex(0),
        initrd: FdIndex(1),
        cmdline: options.append.clone(),
        kvm: Some(FdIndex(2)),
        vsock: VsockConfig {
            guest_cid: GUEST_CID,
            listener: FdIndex(3),
            ports: vec![HostPort {
                port: HOME_PORT,
                socket: FdIndex(4),
            }],
        },
        console: FdIndex(5),
        fs: None,
        nics: Vec::new(),
        disks: Vec::new(),
        balloon: options.balloon,
        uid: 64_000,
    };
    let begun = Instant::now();
    let (mut child, control) = start(&options.vmm)?;
    let ready = follow(control.as_fd(), config, &files, &options, begun);
    // Its own end, unless it hangs; then ours.
    drop(control);
    let status = child.wait()?;
    println!(
        "{} µs: the VMM ended, {status}",
        begun.elapsed().as_micros()
    );
    if !matches!(ready, Ok(true)) {
        println!(
            "--- console\n{}",
            String::from_utf8_lossy(&console::read(&console_file)?)
        );
    }
    anyhow::ensure!(ready?, "the guest did not get ready");
    Ok(())
}

#[allow(unsafe_code)]
fn start(program: &str) -> anyhow::Result<(Child, OwnedFd)> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let fd = theirs.as_raw_fd();
    let mut command = Command::new(program);
    // SAFETY: the child makes two system calls, which are allowed between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if fd == CONTROL_FD {
                return nix::Error::result(libc::fcntl(fd, libc::F_SETFD, 0))
                    .map(drop)
                    .map_err(Into::into);
            }
            nix::Error::result(libc::dup2(fd, CONTROL_FD))
                .map(drop)
                .map_err(Into::into)
        });
    }
    let child = command
        .spawn()
        .with_context(|| format!("can't start {program}"))?;
    Ok((child, ours))
}

/// Boots and prints until the guest is ready or gone. True: it got ready, or ended by itself in order.
fn follow(
    control: BorrowedFd<'_>,
    config: VmConfig,
    files: &[BorrowedFd<'_>],
    options: &Options,
    begun: Instant,
) -> anyhow::Result<bool> {
    nix::sys::socket::setsockopt(
        &control,
        nix::sys::socket::sockopt::ReceiveTimeout,
        &nix::sys::time::TimeVal::new(options.wait.as_secs().try_into()?, 0),
    )?;
    vmm::send(control, &Request::Boot(Box::new(config)), files)?;
    let mut ready = false;
    loop {
        let (message, _): (FromVmm, _) = vmm::receive(control)?;
        let at = begun.elapsed().as_micros();
        match message {
            FromVmm::Reply(Reply::Metrics(metrics)) => {
                println!("{}", serde_json::to_string_pretty(&metrics)?);
                if options.until_ready {
                    vmm::send(control, &Request::Stop, &[])?;
                }
            }
            FromVmm::Reply(Reply::Failed { message }) => bail!("{message}"),
            FromVmm::Reply(Reply::Done) => println!("{at} µs: done"),
            FromVmm::Event(Event::Phase {
                phase,
                since_start_us,
            }) => {
                println!(
                    "{at} µs: phase {phase:#x}, {since_start_us} µs after the start of the VMM"
                );
                if phase == BOOT_PHASE_AGENT_READY {
                    ready = true;
                    vmm::send(control, &Request::Metrics, &[])?;
                }
            }
            FromVmm::Event(Event::Exited(exit)) => {
                println!("{at} µs: {exit:?}");
                return Ok(ready || exit == Exit::Reset);
            }
        }
    }
}
