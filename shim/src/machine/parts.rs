//! The steps of the boot recipe: each makes one thing.

use super::child::{Child, SpawnError};
use super::disks::{BootSlot, DiskError};
use super::options::SandboxOptions;
use crate::agent::AgentError;
use crate::cgroup::{CgroupError, CgroupPath, SandboxCgroup};
use crate::io::{VSOCK_SOCKET, socket_in};
use crate::network::{NetworkError, Nic};
use crate::share::{Share, ShareError};
use crate::state::{State, StateError, StateFile};
use crate::vmm::VmmError;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::SandboxId;
use coffer_proto::limits::{GUEST_CID, HOME_PORT, MAX_VCPUS, SHARE_TAG};
use coffer_proto::vmm::{
    DiskConfig, FdIndex, FsConfig, HostPort, NicConfig, VmConfig, VsockConfig, console,
    control_pair,
};
use nix::fcntl::{Flock, FlockArg};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where coffer-fsd's connection begins; the name goes as soon as both ends are there.
const FSD_SOCKET: &str = "fsd.sock";
/// The console ring's file in the sandbox's directory.
const CONSOLE_FILE: &str = "console";
/// Least memory with which the guest kernel and the agent come up.
const MIN_MEMORY_MIB: u32 = 64;

/// Which step of the boot failed.
#[derive(Debug, thiserror::Error)]
pub enum BootCause {
    #[error("{what} is {value}, it must be {range}")]
    Option {
        what: &'static str,
        value: u64,
        range: String,
    },
    #[error("can't open {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("can't create the console ring")]
    Console(#[source] io::Error),
    #[error("all {0} uids for hypervisor processes are taken")]
    NoUid(u32),
    #[error("can't make a socket of the sandbox")]
    Socket(#[source] io::Error),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("the network namespace {netns} has more interfaces than the {room} that a VM takes")]
    TooManyInterfaces { netns: PathBuf, room: usize },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error(transparent)]
    Vmm(VmmError),
    #[error("{0}")]
    Gone(String),
    #[error("the agent in the guest did not come up within {0:?}")]
    AgentSilent(Duration),
    #[error("the agent did not start the sandbox")]
    Agent(#[source] AgentError),
}

/// The files a VM boots from.
#[derive(Debug)]
pub struct BootFiles {
    kernel: OwnedFd,
    initrd: OwnedFd,
    kvm: Option<OwnedFd>,
}

impl BootFiles {
    /// Checks the sizes asked for and opens the files, before anything is made.
    pub fn open(options: &SandboxOptions) -> Result<Self, BootCause> {
        if !(1..=MAX_VCPUS).contains(&options.vcpus) {
            return Err(out_of_range(
                "vcpus",
                options.vcpus,
                format!("1 to {MAX_VCPUS}"),
            ));
        }
        if options.all_vcpus() > MAX_VCPUS {
            return Err(out_of_range(
                "max_vcpus",
                options.max_vcpus,
                format!("at most {MAX_VCPUS}"),
            ));
        }
        if options.memory_mib < MIN_MEMORY_MIB {
            return Err(out_of_range(
                "memory_mib",
                options.memory_mib,
                format!("at least {MIN_MEMORY_MIB}"),
            ));
        }
        let kvm = Path::new("/dev/kvm");
        Ok(Self {
            kernel: open(&options.kernel, OpenOptions::new().read(true))?,
            initrd: open(&options.initrd, OpenOptions::new().read(true))?,
            kvm: options
                .hypervisor
                .uses_kvm()
                .then(|| open(kvm, OpenOptions::new().read(true).write(true)))
                .transpose()?,
        })
    }
}

fn out_of_range(what: &'static str, value: impl Into<u64>, range: String) -> BootCause {
    BootCause::Option {
        what,
        value: value.into(),
        range,
    }
}

fn open(path: &Path, how: &OpenOptions) -> Result<OwnedFd, BootCause> {
    how.open(path)
        .map(Into::into)
        .map_err(|source| BootCause::Open {
            path: path.to_owned(),
            source,
        })
}

/// The console ring, in the sandbox's directory so that it can be read after everybody has died.
pub fn create_console(dir: &Path) -> Result<File, BootCause> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(dir.join(CONSOLE_FILE));
    let file = file.map_err(BootCause::Console)?;
    file.set_len(console::FILE_BYTES as u64)
        .map_err(BootCause::Console)?;
    Ok(file)
}

/// The console ring of a sandbox, for reading.
pub fn open_console(root: &Path, id: &SandboxId) -> io::Result<File> {
    File::open(root.join(id).join(CONSOLE_FILE))
}

/// A uid of the range that no other sandbox of the root has. Taken under a lock on the root, released with the state.
pub fn take_uid(options: &SandboxOptions, state: &StateFile) -> Result<u32, BootCause> {
    let fail = |source| BootCause::Open {
        path: options.root.clone(),
        source,
    };
    let root = File::open(&options.root).map_err(fail)?;
    let _lock =
        Flock::lock(root, FlockArg::LockExclusive).map_err(|(_, error)| fail(error.into()))?;
    let mut taken = Vec::new();
    for entry in fs::read_dir(&options.root).map_err(fail)?.flatten() {
        let id = entry
            .file_name()
            .into_string()
            .ok()
            .and_then(|name| SandboxId::new(name).ok());
        let other = id.and_then(|id| State::load(&options.root, &id).ok().flatten());
        taken.extend(other.and_then(|other| other.uid));
    }
    let count = options.uids.count;
    let mut hasher = DefaultHasher::new();
    options.id.hash(&mut hasher);
    let start = hasher.finish() % u64::from(count.max(1));
    let start = u32::try_from(start).expect("smaller than a u32");
    let free = (0..count)
        .map(|i| options.uids.first + (start + i) % count)
        .find(|uid| !taken.contains(uid));
    let uid = free.ok_or(BootCause::NoUid(count))?;
    state.update(|state| state.uid = Some(uid))?;
    Ok(uid)
}

/// The cgroup of the sandbox's processes: where somebody asked for, or one of our own if this host lets us have it.
pub fn create_cgroup(
    options: &SandboxOptions,
    named: Option<&CgroupPath>,
    state: &StateFile,
) -> Result<Option<SandboxCgroup>, BootCause> {
    let record = |path: CgroupPath| state.update(|state| state.cgroup = Some(path));
    if let Some(path) = named {
        record(path.clone())?;
        let cgroup = SandboxCgroup::create(path)?;
        if options.joins_cgroup {
            cgroup.join()?;
        }
        return Ok(Some(cgroup));
    }
    let path = CgroupPath::own(&options.id);
    record(path.clone())?;
    match SandboxCgroup::create_unconfined(&path) {
        Err(error @ CgroupError::Create { .. }) => {
            tracing::warn!(
                error = chain(&error),
                "the sandbox has no cgroup of its own"
            );
            Ok(None)
        }
        made => Ok(made?),
    }
}

/// Starts coffer-fsd on the share; gives the connected vhost-user socket for the VM.
pub fn start_fsd(options: &SandboxOptions, share: &Share) -> Result<(Child, OwnedFd), BootCause> {
    let dir = options.dir();
    let listener = listen(&dir, FSD_SOCKET)?;
    let opened = File::open(&dir).map_err(BootCause::Socket)?.into();
    let connected =
        UnixStream::connect(socket_in(&opened, FSD_SOCKET)).map_err(BootCause::Socket)?;
    fs::remove_file(dir.join(FSD_SOCKET)).map_err(BootCause::Socket)?;
    let served = share.served();
    let args = [OsStr::new("--share"), served.as_os_str()];
    let child = Child::spawn(&options.libexec.join("coffer-fsd"), &args, listener.as_fd())?;
    Ok((child, connected.into()))
}

/// Starts coffer-vmm or coffer-qemu; gives our end of its control socket.
pub fn start_hypervisor(options: &SandboxOptions) -> Result<(Child, OwnedFd), BootCause> {
    let (ours, theirs) = control_pair().map_err(|error| BootCause::Socket(error.into()))?;
    let child = Child::spawn(
        &options.libexec.join(options.hypervisor.program()),
        &[],
        theirs.as_fd(),
    )?;
    Ok((child, ours))
}

fn listen(dir: &Path, name: &str) -> Result<UnixListener, BootCause> {
    let opened = File::open(dir).map_err(BootCause::Socket)?.into();
    UnixListener::bind(socket_in(&opened, name)).map_err(BootCause::Socket)
}

/// The open ends that go into the VM besides its boot files.
#[derive(Debug)]
pub struct Wires<'a> {
    pub fs_socket: OwnedFd,
    /// For the first network slots.
    pub nics: Vec<Nic>,
    /// Network slots, with those that have no interface yet.
    pub nic_slots: u8,
    pub disks: Vec<BootSlot>,
    pub console: &'a File,
}

/// The files of the Boot message, in the order of their indices.
#[derive(Debug, Default)]
struct Sent(Vec<OwnedFd>);

impl Sent {
    fn add(&mut self, file: OwnedFd) -> FdIndex {
        self.0.push(file);
        FdIndex(u8::try_from(self.0.len() - 1).expect("a VM has few files"))
    }
}

/// The VM's configuration, its files, and our end of the connection on which the agent will dial home.
pub fn vm_config(
    options: &SandboxOptions,
    uid: u32,
    files: BootFiles,
    wires: Wires<'_>,
) -> Result<(VmConfig, Vec<OwnedFd>, UnixStream), BootCause> {
    let mut sent = Sent::default();
    let (home, far_home) = UnixStream::pair().map_err(BootCause::Socket)?;
    let listener = listen(&options.dir(), VSOCK_SOCKET)?;
    let mut taps = wires.nics.into_iter().map(|nic| sent.add(nic.tap));
    let nics = (0..wires.nic_slots).map(|slot| NicConfig {
        mac: slot_mac(uid, slot),
        tap: taps.next(),
    });
    let nics = nics.collect();
    let disks = wires.disks.into_iter().map(|slot| DiskConfig {
        serial: slot.serial,
        file: slot.file.map(|file| sent.add(file.into())),
        read_only: slot.read_only,
    });
    let disks = disks.collect();
    let config = VmConfig {
        id: options.id.clone(),
        vcpus: options.all_vcpus(),
        memory_mib: options.memory_mib,
        max_memory_mib: options.all_memory_mib(),
        kernel: sent.add(files.kernel),
        initrd: sent.add(files.initrd),
        cmdline: command_line(options),
        kvm: files.kvm.map(|kvm| sent.add(kvm)),
        vsock: VsockConfig {
            guest_cid: GUEST_CID,
            listener: sent.add(listener.into()),
            ports: vec![HostPort {
                port: HOME_PORT,
                socket: sent.add(far_home.into()),
            }],
        },
        console: sent.add(
            wires
                .console
                .try_clone()
                .map_err(BootCause::Console)?
                .into(),
        ),
        fs: Some(FsConfig {
            tag: SHARE_TAG.to_owned(),
            socket: sent.add(wires.fs_socket),
        }),
        nics,
        disks,
        balloon: true,
        uid,
    };
    Ok((config, sent.0, home))
}

/// The address with which a network slot boots: locally administered, and unique among this root's sandboxes as the uid is.
pub fn slot_mac(uid: u32, slot: u8) -> [u8; 6] {
    let [a, b, c, d] = uid.to_be_bytes();
    [0x02, 0xc0 + slot, a, b, c, d]
}

fn command_line(options: &SandboxOptions) -> String {
    let mut words = options.kernel_params.clone();
    if options.all_vcpus() > options.vcpus {
        // The others can be brought online later.
        words.push(format!("maxcpus={}", options.vcpus));
    }
    if options.debug {
        words.push("ignore_loglevel".to_owned());
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::child::ProcessId;
    use crate::state::tests::options;

    #[test]
    fn two_sandboxes_never_have_the_same_uid() {
        let root = tempfile::tempdir().unwrap();
        let mut uids = Vec::new();
        for name in ["a", "b", "c"] {
            let mut options = options(root.path(), name);
            options.uids.count = 3;
            fs::create_dir(options.dir()).unwrap();
            let state =
                StateFile::create(State::new(options.clone(), ProcessId::current().unwrap()))
                    .unwrap();
            uids.push(take_uid(&options, &state).unwrap());
        }
        uids.sort_unstable();
        let first = options(root.path(), "a").uids.first;
        assert_eq!(uids, [first, first + 1, first + 2]);
        let mut full = options(root.path(), "d");
        full.uids.count = 3;
        fs::create_dir(full.dir()).unwrap();
        let state =
            StateFile::create(State::new(full.clone(), ProcessId::current().unwrap())).unwrap();
        assert!(matches!(take_uid(&full, &state), Err(BootCause::NoUid(3))));
    }

    #[test]
    fn sizes_that_no_vm_has_are_refused_by_name() {
        let mut bad = options(Path::new("/"), "s");
        bad.vcpus = 0;
        assert_eq!(
            BootFiles::open(&bad).unwrap_err().to_string(),
            "vcpus is 0, it must be 1 to 64"
        );
        let missing = options(Path::new("/"), "s");
        assert_eq!(
            BootFiles::open(&missing).unwrap_err().to_string(),
            "can't open /nonexistent/vmlinux"
        );
    }
}
