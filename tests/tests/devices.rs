//! What `coffer run` does not use yet: disks, and memory that goes back to the host. The hypervisor process is driven
//! over its control socket, as the shim does it, with a guest that is the product's kernel, busybox and a script.

use coffer_proto::limits::GUEST_CID;
use coffer_proto::vmm::{
    self, CONTROL_FD, ControlError, DiskConfig, Event, Exit, FdIndex, FromVmm, FsConfig, Reply,
    Request, VmConfig, VsockConfig, console,
};
use coffer_tests::{PATIENCE, asset, noise, product};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// Before the script of a test: the share is at /mnt, and errors end in the console's text.
const PREAMBLE: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /mnt /tmp
mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t devtmpfs devtmpfs /dev && mount -t tmpfs tmpfs /tmp
exec > /dev/hvc0 2>&1
mount -t virtiofs coffer /mnt
set -x
";
const EPILOGUE: &str = "\nsync; touch /mnt/done; reboot -f\n";
const UNPRIVILEGED: u32 = 70_123;

/// A hypervisor process and coffer-fsd, with a guest that runs one script.
struct Vm {
    directory: tempfile::TempDir,
    control: OwnedFd,
    console: File,
    vmm: Child,
    fsd: Child,
}

impl Vm {
    fn boot(script: &str, disks: &[(&File, bool)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let share = directory.path().join("share");
        fs::create_dir(&share).unwrap();
        let (fsd, share_socket) = serve(&share, directory.path());
        let initrd = directory.path().join("initrd");
        fs::write(&initrd, archive(&[PREAMBLE, script, EPILOGUE].concat())).unwrap();
        let console = File::from(memfd_create(c"console", MFdFlags::MFD_CLOEXEC).unwrap());
        console.set_len(console::FILE_BYTES as u64).unwrap();

        let mut files: Vec<OwnedFd> = Vec::new();
        let mut give = |file: OwnedFd| {
            files.push(file);
            FdIndex(files.len() as u8 - 1)
        };
        let hypervisor = std::env::var("COFFER_TEST_HYPERVISOR").expect("run `cargo xtask test`");
        let own = hypervisor == "coffer-vmm";
        let kvm = own.then(|| {
            File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .expect("/dev/kvm")
        });
        let config = VmConfig {
            id: "devices".parse().unwrap(),
            vcpus: 1,
            memory_mib: 256,
            max_memory_mib: 0,
            kernel: give(File::open(product("vmlinux")).unwrap().into()),
            initrd: give(File::open(&initrd).unwrap().into()),
            cmdline: if own {
                String::new()
            } else {
                emulation_parameters()
            },
            kvm: kvm.map(|kvm| give(kvm.into())),
            vsock: VsockConfig {
                guest_cid: GUEST_CID,
                listener: give(
                    UnixListener::bind(directory.path().join("vsock"))
                        .unwrap()
                        .into(),
                ),
                ports: Vec::new(),
            },
            console: give(console.try_clone().unwrap().into()),
            fs: Some(FsConfig {
                tag: "coffer".into(),
                socket: give(share_socket.into()),
            }),
            nics: Vec::new(),
            disks: disks
                .iter()
                .enumerate()
                .map(|(n, (file, read_only))| DiskConfig {
                    serial: format!("disk-{n}"),
                    file: Some(give(file.try_clone().unwrap().into())),
                    read_only: *read_only,
                })
                .collect(),
            balloon: true,
            uid: UNPRIVILEGED,
        };
        let (control, theirs) = vmm::control_pair().unwrap();
        setsockopt(&control, sockopt::ReceiveTimeout, &TimeVal::new(0, 100_000)).unwrap();
        let program = product(if own { "coffer-vmm" } else { "coffer-qemu" });
        let vmm = spawn(Command::new(program), &theirs);
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        vmm::send(control.as_fd(), &Request::Boot(Box::new(config)), &borrowed).unwrap();
        Self {
            directory,
            control,
            console,
            vmm,
            fsd,
        }
    }

    fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    /// What a test says when it fails.
    fn log(&self) -> String {
        String::from_utf8_lossy(&console::read(&self.console).unwrap()).into_owned()
    }

    /// Follows the VM until `done`, or until its guest is gone.
    fn until(&self, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + 2 * PATIENCE;
        while !done(self) {
            assert!(
                Instant::now() < deadline,
                "too slow; the console says:\n{}",
                self.log()
            );
            match vmm::receive(self.control.as_fd()) {
                Ok((FromVmm::Event(Event::Exited(exit)), _)) => {
                    assert_eq!(exit, Exit::Reset, "the console says:\n{}", self.log());
                    return;
                }
                Ok((FromVmm::Reply(Reply::Failed { message }), _)) => panic!("{message}"),
                Ok(_) => {}
                Err(ControlError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}; the console says:\n{}", self.log()),
            }
        }
    }

    fn until_done(&self) {
        self.until(|_| false);
        assert!(
            self.share().join("done").exists(),
            "the console says:\n{}",
            self.log()
        );
    }

    /// The script's word in this file of the share, without the newline.
    fn said(&self, name: &str) -> String {
        let word = fs::read_to_string(self.share().join(name));
        word.unwrap_or_else(|error| panic!("{name}: {error}; the console says:\n{}", self.log()))
            .trim_end()
            .into()
    }

    /// Bytes of guest memory that the host has: the resident part of the memory file.
    fn resident(&self) -> u64 {
        let pid = self.vmm.id();
        let children =
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let of = |pid: &str| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("RssShmem:").map(str::to_owned));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
                .unwrap_or(0)
                << 10
        };
        children
            .split_whitespace()
            .map(of)
            .chain([of(&pid.to_string())])
            .max()
            .unwrap_or(0)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        for child in [&mut self.vmm, &mut self.fsd] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What TCG's clock needs; see the shim's own parameters for `coffer-qemu`.
fn emulation_parameters() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = cpuinfo.lines().find_map(|line| {
        line.strip_prefix("cpu MHz")?
            .split(": ")
            .nth(1)?
            .parse::<f64>()
            .ok()
    });
    format!(
        "tsc_early_khz={} reboot=t panic=-1 quiet console=hvc0",
        (mhz.unwrap_or(2000.0) * 1000.0) as u64
    )
}

/// Starts a program with `socket` as its fd 3.
fn spawn(mut command: Command, socket: &impl AsFd) -> Child {
    let high: RawFd = fcntl(socket, FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
    #[allow(unsafe_code)]
    // SAFETY: dup2 is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            nix::errno::Errno::result(libc::dup2(high, CONTROL_FD))
                .map(drop)
                .map_err(Into::into)
        });
    }
    let child = command.stdin(Stdio::null()).spawn().unwrap();
    nix::unistd::close(high).unwrap();
    child
}

/// Starts coffer-fsd on a directory; the connection waits on its socket already.
fn serve(share: &Path, scratch: &Path) -> (Child, UnixStream) {
    let socket = scratch.join("fs.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let connection = UnixStream::connect(&socket).unwrap();
    let mut command = Command::new(product("coffer-fsd"));
    command.arg("--share").arg(share);
    (spawn(command, &listener), connection)
}

/// An initrd (cpio, "newc") with busybox and this `/init`.
fn archive(init: &str) -> Vec<u8> {
    const DIRECTORY: u32 = 0o040_755;
    const PROGRAM: u32 = 0o100_755;
    let busybox = fs::read(asset("busybox").join("bin/busybox")).unwrap();
    let entries: [(&str, u32, &[u8]); 4] = [
        ("bin", DIRECTORY, &[]),
        ("bin/busybox", PROGRAM, &busybox),
        ("init", PROGRAM, init.as_bytes()),
        ("TRAILER!!!", 0, &[]),
    ];
    let mut archive = Vec::new();
    for (inode, (name, mode, content)) in entries.into_iter().enumerate() {
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let numbers = [
            inode,
            mode as usize,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        archive.extend_from_slice(b"070701");
        for number in numbers {
            archive.extend_from_slice(format!("{number:08x}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// The same file, opened again for reading only, as the shim gives it where the disk is read-only.
fn reader(file: &File) -> File {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

fn disk(mib: u64, content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(mib << 20).unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

#[test]
fn disks_keep_what_is_written_and_read_only_ones_never_change() {
    let content = noise(4 << 20, 11);
    let (writable, read_only) = (disk(32, &[]), disk(4, &content));
    let vm = Vm::boot(
        "cat /sys/block/vda/size > /mnt/size
cat /sys/block/vda/serial /sys/block/vdb/serial > /mnt/serials
cat /sys/block/vda/ro /sys/block/vdb/ro > /mnt/ro
dd if=/dev/vdb of=/dev/vda bs=64k conv=fsync
cmp -n 4194304 /dev/vda /dev/vdb && echo equal > /mnt/copy
dd if=/dev/vda of=/dev/vda bs=4k count=64 seek=2048 conv=notrunc,fsync
dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync || echo refused > /mnt/write
blkdiscard -o 1048576 -l 1048576 /dev/vda && echo discarded > /mnt/discard",
        &[(&writable, false), (&reader(&read_only), true)],
    );
    vm.until_done();
    assert_eq!(vm.said("size"), (32 * 2048).to_string());
    assert_eq!(vm.said("serials"), "disk-0disk-1");
    assert_eq!(vm.said("ro"), "0\n1");
    assert_eq!(
        (vm.said("copy"), vm.said("write"), vm.said("discard")),
        ("equal".into(), "refused".into(), "discarded".into())
    );
    let read = |file: &File, offset: u64, length: usize| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    assert!(
        read(&read_only, 0, content.len()) == content,
        "the read-only disk changed"
    );
    assert!(read(&writable, 0, 1 << 20) == content[..1 << 20]);
    assert!(
        read(&writable, 1 << 20, 1 << 20) == vec![0; 1 << 20],
        "the discarded range reads as zeroes"
    );
    assert!(read(&writable, 2 << 20, 2 << 20) == content[2 << 20..]);
    assert!(read(&writable, 8 << 20, 256 << 10) == content[..256 << 10]);
    assert_eq!(writable.metadata().unwrap().size(), 32 << 20);
}

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    const USED: u64 = 80 << 20;
    let vm = Vm::boot(
        "dd if=/dev/zero of=/tmp/fill bs=1M count=80
touch /mnt/full
while [ ! -e /mnt/seen ]; do sleep 1; done
rm /tmp/fill
while [ ! -e /mnt/enough ]; do sleep 1; done",
        &[],
    );
    let share = vm.share();
    vm.until(|_| share.join("full").exists());
    let full = vm.resident();
    assert!(full >= USED, "{full} bytes are resident");
    fs::write(share.join("seen"), "").unwrap();
    let deadline = Instant::now() + PATIENCE;
    vm.until(|vm| vm.resident() + USED * 3 / 4 < full || Instant::now() > deadline);
    let left = vm.resident();
    assert!(
        left + USED * 3 / 4 < full,
        "{left} of {full} bytes are still resident"
    );
    fs::write(share.join("enough"), "").unwrap();
    vm.until_done();
}
