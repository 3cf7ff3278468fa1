//! Boots a guest and talks to it over vsock and virtio-fs, by hand and in the place of the shim.
//!
//! ```text
//! talk --vmm target/debug/coffer-qemu --kernel vmlinux --initrd initrd [--share DIR --fsd target/debug/coffer-fsd]
//! ```
//!
//! Prints what the hypervisor process says, what the guest sends home, and the console at the end. A line on stdin is a
//! port of the guest and a text: the text goes there, and what comes back is printed. `stop`, `pause`, `resume` and
//! `metrics` are requests. The end of stdin stops the machine.

use anyhow::Context;
use coffer_proto::limits::{GUEST_CID, HOME_PORT, SHARE_TAG};
use coffer_proto::vmm::{
    self, CONTROL_FD, FdIndex, FromVmm, FsConfig, HostPort, Request, VmConfig, VsockConfig, console,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
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
    let config = VmConfig {
        id: "example".parse()?,
        vcpus: option("--cpus").map_or(Ok(1), |text| text.parse())?,
        memory_mib: option("--memory").map_or(Ok(256), |text| text.parse())?,
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
        nics: Vec::new(),
        disks: Vec::new(),
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
        if let Err(error) = command(&line?, &control, &vsock_path) {
            println!("{error:#}");
        }
    }
    let _ = vmm::send(control.as_fd(), &Request::Stop, &[]);
    listening.join().expect("the thread that prints")
}

fn command(line: &str, control: &OwnedFd, vsock: &Path) -> anyhow::Result<()> {
    let request = match line.trim() {
        "stop" => Request::Stop,
        "pause" => Request::Pause,
        "resume" => Request::Resume,
        "metrics" => Request::Metrics,
        line => {
            let (port, text) = line.split_once(' ').context("PORT TEXT, or a request")?;
            if port == "sleep" {
                std::thread::sleep(std::time::Duration::from_secs_f64(text.parse()?));
                return Ok(());
            }
            return talk(vsock, port, text);
        }
    };
    Ok(vmm::send(control.as_fd(), &request, &[])?)
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
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
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
