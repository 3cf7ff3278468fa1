//! Boots a guest and talks to it over vsock and virtio-fs, by hand and in the place of the shim.
//!
//! ```text
//! talk --vmm target/debug/coffer-qemu --kernel vmlinux --initrd initrd [--share DIR --fsd target/debug/coffer-fsd]
//! ```
//!
//! `--nic NAME` gives a network slot with a new tap NAME from boot, `--late-nic NAME` one which gets it by `attach`;
//! `--disk FILE` gives a disk, `--max-memory MIB` a machine that `resize MIB` makes larger and smaller.
//!
//! Prints what the hypervisor process says, what the guest sends home, and the console at the end. A line on stdin is a
//! port of the guest and a text: the text goes there, and what comes back is printed. `stop`, `pause`, `resume`,
//! `metrics`, `attach` and `detach` are requests, and `resize MIB` is one. The end of stdin stops the machine.

use anyhow::Context;
use coffer_proto::limits::{GUEST_CID, HOME_PORT, SHARE_TAG};
use coffer_proto::vmm::{
    self, CONTROL_FD, DiskConfig, FdIndex, FromVmm, FsConfig, HostPort, NicConfig, Request,
    VmConfig, VsockConfig, console,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

fn main() -> anyhow::Result<()> {
    let option = |name: &str| {
        let mut arguments = std::env::args().skip_while(|argument| argument != name);
        arguments.nth(1)
    };
    let open = |name: &str| -> anyhow::Result<OwnedFd> {
        let path = option(name).with_context(|| format!("{name} is missing"))?;
        Ok(File::open(&path).context(path)?.into())
    };
    let directory = tempfile::tempdir()?;
    let vsock_path = directory.path().join("vsock");
    let (home, home_of_guest) = UnixStream::pair()?;
    let ring: File = memfd_create(c"console", MFdFlags::MFD_CLOEXEC)?.into();
    ring.set_len(console::FILE_BYTES as u64)?;

    let mut files: Vec<OwnedFd> = Vec::new();
    let mut give = |file: OwnedFd| {
        files.push(file);
        FdIndex(u8::try_from(files.len() - 1).expect("few files"))
    };
    let fs = match option("--share") {
        Some(share) => {
            let fsd = option("--fsd").context("--share needs --fsd")?;
            let socket = start_fsd(&fsd, &share, &directory.path().join("fs"))?;
            Some(FsConfig {
                tag: SHARE_TAG.into(),
                socket: give(socket),
            })
        }
        None => None,
    };
    let mut nics = Vec::new();
    let late_tap = option("--late-nic")
        .map(|name| open_tap(&name))
        .transpose()?;
    if late_tap.is_some() {
        nics.push(NicConfig {
            mac: [2, 0, 0, 0, 0, 1],
            tap: None,
        });
    } else if let Some(name) = option("--nic") {
        nics.push(NicConfig {
            mac: [2, 0, 0, 0, 0, 1],
            tap: Some(give(open_tap(&name)?)),
        });
    }
    let mut disks = Vec::new();
    if let Some(path) = option("--disk") {
        let file = give(File::open(path)?.into());
        disks.push(DiskConfig {
            serial: "first".into(),
            file: Some(file),
            read_only: true,
        });
    }
    let config = VmConfig {
        id: "example".parse()?,
        vcpus: option("--cpus").map_or(Ok(1), |text| text.parse())?,
        memory_mib: option("--memory").map_or(Ok(256), |text| text.parse())?,
        max_memory_mib: option("--max-memory").map_or(Ok(0), |text| text.parse())?,
        kernel: give(open("--kernel")?),
        initrd: give(open("--initrd")?),
        cmdline: option("--append").unwrap_or_default(),
        kvm: option("--kvm")
            .map(|path| {
                anyhow::Ok(give(
                    File::options().read(true).write(true).open(path)?.into(),
                ))
            })
            .transpose()?,
        vsock: VsockConfig {
            guest_cid: GUEST_CID,
            listener: give(UnixListener::bind(&vsock_path)?.into()),
            ports: vec![HostPort {
                port: HOME_PORT,
                socket: give(home_of_guest.into()),
            }],
        },
        console: give(ring.try_clone()?.into()),
        fs,
        nics,
        disks,
        balloon: true,
        uid: 65534,
    };
    let control = start_vmm(&option("--vmm").context("--vmm is missing")?)?;
    let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    vmm::send(control.as_fd(), &Request::Boot(Box::new(config)), &borrowed)?;
    drop(files);

    let events = control.try_clone()?;
    let listening = std::thread::spawn(move || report(&events, &ring));
    std::thread::spawn(move || {
        for line in BufReader::new(home).lines().map_while(Result::ok) {
            println!("home: {line}");
        }
    });
    for line in std::io::stdin().lines() {
        if let Err(error) = command(&line?, &control, &vsock_path, late_tap.as_ref()) {
            println!("{error:#}");
        }
    }
    let _ = vmm::send(control.as_fd(), &Request::Stop, &[]);
    listening.join().expect("the thread that prints")
}

fn command(
    line: &str,
    control: &OwnedFd,
    vsock: &Path,
    tap: Option<&OwnedFd>,
) -> anyhow::Result<()> {
    let mut files = Vec::new();
    let request = match line.trim() {
        "stop" => Request::Stop,
        "pause" => Request::Pause,
        "resume" => Request::Resume,
        "metrics" => Request::Metrics,
        "detach" => Request::DetachTap { slot: 0 },
        "attach" => {
            files.push(tap.context("--late-nic gives the tap")?.as_fd());
            Request::AttachTap {
                slot: 0,
                tap: FdIndex(0),
            }
        }
        line => {
            let (port, text) = line.split_once(' ').context("PORT TEXT, or a request")?;
            if port == "resize" {
                let mib = text.parse()?;
                let request = Request::ResizeMemory { mib };
                return Ok(vmm::send(control.as_fd(), &request, &[])?);
            }
            if port == "sleep" {
                std::thread::sleep(std::time::Duration::from_secs_f64(text.parse()?));
                return Ok(());
            }
            return talk(vsock, port, text);
        }
    };
    Ok(vmm::send(control.as_fd(), &request, &files)?)
}

/// Sends `text` to a port of the guest and prints what comes back. `@N` stands for N MiB.
fn talk(vsock: &Path, port: &str, text: &str) -> anyhow::Result<()> {
    let begin = Instant::now();
    let stream = UnixStream::connect(vsock)?;
    writeln!(&stream, "CONNECT {port}")?;
    let mut answer = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    reader.read_line(&mut answer)?;
    let (text, mib) = text.split_once('@').unwrap_or((text, "0"));
    let (text, mib) = (text.as_bytes().to_vec(), mib.parse::<usize>()?);
    let writer = std::thread::spawn(move || -> std::io::Result<()> {
        (&stream).write_all(&text)?;
        let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
        for _ in 0..mib {
            (&stream).write_all(&block)?;
        }
        stream.shutdown(Shutdown::Write)
    });
    let mut back = Vec::new();
    reader.read_to_end(&mut back)?;
    writer.join().expect("the thread that writes")?;
    let start = String::from_utf8_lossy(&back[..back.len().min(60)]).into_owned();
    println!(
        "{}: {} bytes {start:?} in {:?}",
        answer.trim(),
        back.len(),
        begin.elapsed()
    );
    Ok(())
}

/// A new tap device as the shim opens it.
#[allow(unsafe_code)]
fn open_tap(name: &str) -> anyhow::Result<OwnedFd> {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all zero is a request without name and flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes().take(libc::IFNAMSIZ - 1))
    {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags)?;
    // SAFETY: the request lives until the call returns.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    nix::errno::Errno::result(result).context("can't make the tap")?;
    Ok(tap.into())
}

fn report(control: &OwnedFd, ring: &File) -> anyhow::Result<()> {
    while let Ok((message, _)) = vmm::receive::<FromVmm>(control.as_fd()) {
        println!("{message:?}");
        if matches!(message, FromVmm::Event(vmm::Event::Exited(_))) {
            break;
        }
    }
    println!(
        "--- console\n{}",
        String::from_utf8_lossy(&console::read(ring)?)
    );
    Ok(())
}

fn start_vmm(path: &str) -> anyhow::Result<OwnedFd> {
    let (ours, theirs) = vmm::control_pair()?;
    spawn(Command::new(path), &theirs)?;
    Ok(ours)
}

fn start_fsd(path: &str, share: &str, socket: &Path) -> anyhow::Result<OwnedFd> {
    let listener: OwnedFd = UnixListener::bind(socket)?.into();
    let connection = UnixStream::connect(socket)?;
    let mut command = Command::new(path);
    command.args(["--share", share]);
    spawn(command, &listener)?;
    Ok(connection.into())
}

/// Starts a program with `file` as its descriptor 3.
fn spawn(mut command: Command, file: &OwnedFd) -> anyhow::Result<()> {
    let high = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100))?;
    #[allow(unsafe_code)]
    // SAFETY: dup2 is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            nix::errno::Errno::result(libc::dup2(high, CONTROL_FD))
                .map(drop)
                .map_err(Into::into)
        });
    }
    command
        .spawn()
        .with_context(|| format!("{:?}", command.get_program()))?;
    nix::unistd::close(high)?;
    Ok(())
}
