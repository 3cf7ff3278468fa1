//! Control messages between the shim and a hypervisor process (`coffer-vmm` or `coffer-qemu`).
//!
//! The channel is an inherited `SOCK_SEQPACKET` socketpair on fd [`CONTROL_FD`]: one packet is one JSON message, and
//! files travel beside it as SCM_RIGHTS. A message refers to its files by index ([`FdIndex`]), so the hypervisor
//! process never needs a path. The shim sends a [`Request`] and gets exactly one [`Reply`]; an [`Event`] may come at
//! any time. End of file on the socket, seen from either side, means that the other process is gone.
//!
//! ```text
//! shim ── Boot{config} + fds ──►  vmm
//!      ◄── Reply::Done ─────────       VM exists, vCPUs run
//!      ◄── Event::Phase ────────       boot timer register written
//!      ── AttachTap{slot} + fd ─►
//!      ◄── Reply::Done ─────────
//!      ── ResizeMemory{mib} ───►
//!      ◄── Reply::Done ─────────
//!      ◄── Event::Memory ───────       the guest has plugged what was asked for
//!      ◄── Event::Exited ───────       the guest is gone; the process ends next
//! ```

use crate::ids::SandboxId;
use crate::limits::{MAX_CONTROL_FDS, MAX_CONTROL_MESSAGE};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The inherited end of the control socket in the hypervisor process.
pub const CONTROL_FD: RawFd = 3;

/// Files that the kernel lets one message carry.
const SCM_MAX_FD: usize = 253;

/// Index into the files that came with the same message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u8);

/// What the shim asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Create the VM and run it. The first request, sent once.
    Boot(Box<VmConfig>),
    /// Give the network slot its tap device; the guest sees the link come up. Carries one file.
    AttachTap { slot: u8, tap: FdIndex },
    /// Take the tap away; the guest sees the link go down.
    DetachTap { slot: u8 },
    /// Ask the guest to have this much memory: at least what it booted with, at most [`VmConfig::max_memory_mib`]. Done means that it
    /// was asked; `Event::Memory` tells when it has.
    ResizeMemory { mib: u32 },
    /// Give the empty disk slot its content, which is read-only where the file was opened so. The guest finds the disk when it
    /// looks at the slot again. Carries one file.
    AttachDisk { slot: u8, file: FdIndex },
    /// Take the disk away; the slot is empty again.
    DetachDisk { slot: u8 },
    /// Stop all vCPUs between two instructions.
    Pause,
    /// Let them go on.
    Resume,
    /// Counters of the VM so far.
    Metrics,
    /// End the VM now, whatever the guest does. `Event::Exited` follows.
    Stop,
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    Done,
    Metrics(Metrics),
    /// The whole chain of causes in one line. After a failed `Boot` the process ends.
    Failed {
        message: String,
    },
}

/// What the hypervisor process tells unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The boot timer's register was written with `phase`.
    Phase { phase: u32, since_start_us: u64 },
    /// The guest has this much memory now, at least as much as the last [`Request::ResizeMemory`] asked for. Once for each.
    Memory { mib: u32 },
    /// No vCPU runs any more, and none will.
    Exited(Exit),
}

/// Anything the hypervisor process sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromVmm {
    Reply(Reply),
    Event(Event),
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Exit {
    /// The guest asked for a reset (`reboot=k`: i8042 pulse). The agent's orderly end looks like this too, and a
    /// kernel panic with `panic=-1` as well: the shim tells them apart by whether it had asked for the end.
    Reset,
    /// A triple fault: the guest kernel crashed before it could panic.
    TripleFault,
    /// `Request::Stop`, or the shim's end of the socket closed.
    Stopped,
    /// The VM could not go on: KVM refused to run, a device was driven against the rules, coffer-fsd went away.
    Failed { message: String },
}

/// All that defines a VM. Everything arrives as an open file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    pub id: SandboxId,
    pub vcpus: u8,
    pub memory_mib: u32,
    /// Memory up to which the VM can grow while it runs; it can't where this is not more than `memory_mib`.
    pub max_memory_mib: u32,
    /// `vmlinux` with a PVH note.
    pub kernel: FdIndex,
    pub initrd: FdIndex,
    /// Appended to the hypervisor's own kernel parameters. No `--`.
    pub cmdline: String,
    /// `/dev/kvm`, opened by the shim. None for software emulation (`coffer-qemu` only).
    pub kvm: Option<FdIndex>,
    pub vsock: VsockConfig,
    /// A memory file of [`crate::limits::CONSOLE_RING_BYTES`] + 8; see [`crate::vmm::console`].
    pub console: FdIndex,
    pub fs: Option<FsConfig>,
    /// Network slots, present from boot, in order.
    pub nics: Vec<NicConfig>,
    /// Disk slots, in order.
    pub disks: Vec<DiskConfig>,
    /// Free-page reporting and a balloon that gives memory back.
    pub balloon: bool,
    /// Uid and gid that the process takes when it locks itself up.
    pub uid: u32,
}

/// vsock, with its host side on unix sockets and no path anywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    pub guest_cid: u64,
    /// A listening `SOCK_STREAM` unix socket. A client writes `CONNECT <port>\n`, reads `OK <host port>\n`, and is
    /// then connected to that port of the guest; a refusal closes the connection.
    pub listener: FdIndex,
    /// Host ports the guest may connect to, each once, and the connected unix socket which that connection then is.
    /// Any other port, and a second connection to one of these, is reset.
    pub ports: Vec<HostPort>,
}

/// One host port open to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPort {
    pub port: u32,
    pub socket: FdIndex,
}

/// A virtio-fs device served by coffer-fsd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    pub tag: String,
    /// The connected vhost-user socket; coffer-fsd holds the other end.
    pub socket: FdIndex,
}

/// A network slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    pub mac: [u8; 6],
    /// Opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR in the pod's network namespace; None until `AttachTap`.
    pub tap: Option<FdIndex>,
}

/// A raw block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// At most 20 bytes, as the guest reads it with VIRTIO_BLK_T_GET_ID.
    pub serial: String,
    /// None until `AttachDisk`: the guest sees that the place is taken, and no device (`coffer-vmm` only).
    pub file: Option<FdIndex>,
    pub read_only: bool,
}

/// Counters since the VM was created.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// vCPU exits to user space by kind ("io", "mmio", "hlt", …).
    pub exits: std::collections::BTreeMap<String, u64>,
    /// CPU time of the process until KVM_CREATE_VM returned, microseconds.
    pub vm_created_cpu_us: u64,
    /// Wall time from process start to each boot phase, microseconds.
    pub phases: std::collections::BTreeMap<String, u64>,
    /// Private resident memory of the process outside guest memory, bytes.
    pub private_rss: u64,
    /// Device counters ("vsock.rx_bytes", "net0.dropped", …).
    pub devices: std::collections::BTreeMap<String, u64>,
}

/// Why a control message could not be sent or taken.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("the other end of the control socket is gone")]
    Closed,
    #[error("a control message of {0} bytes is longer than {MAX_CONTROL_MESSAGE}")]
    TooLong(usize),
    #[error("a control message carries more than {MAX_CONTROL_FDS} files")]
    TooManyFiles,
    #[error("a control message can't be parsed")]
    Malformed(#[source] serde_json::Error),
    #[error("the control message names file {0}, which did not come with it")]
    NoSuchFile(u8),
    #[error("the control socket failed")]
    Io(#[source] std::io::Error),
}

/// A control socket: the shim's end, and the one that the hypervisor process inherits.
pub fn control_pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    let kind = SockType::SeqPacket;
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
}

/// Sends one message with its files. Blocks where the socket does.
pub fn send<M: Serialize>(
    socket: BorrowedFd<'_>,
    message: &M,
    files: &[BorrowedFd<'_>],
) -> Result<(), ControlError> {
    let json = serde_json::to_vec(message).map_err(ControlError::Malformed)?;
    if json.len() > MAX_CONTROL_MESSAGE {
        return Err(ControlError::TooLong(json.len()));
    }
    if files.len() > MAX_CONTROL_FDS {
        return Err(ControlError::TooManyFiles);
    }
    let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    match sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&json)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    ) {
        Ok(_) => Ok(()),
        Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => Err(ControlError::Closed),
        Err(error) => Err(ControlError::Io(error.into())),
    }
}

/// Takes one message and its files. Blocks where the socket does (`ControlError::Io` of kind `WouldBlock` where not).
pub fn receive<M: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<(M, Files), ControlError> {
    let mut buffer = vec![0; MAX_CONTROL_MESSAGE];
    // Room for all that can come: files that don't fit would be open in this process and known to nobody.
    let mut space = nix::cmsg_space!([RawFd; SCM_MAX_FD]);
    let (length, files, truncated) = {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let message = match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(message) => message,
            Err(nix::Error::ECONNRESET) => return Err(ControlError::Closed),
            Err(error) => return Err(ControlError::Io(error.into())),
        };
        let mut files = Vec::new();
        for control in message.cmsgs().map_err(|_| ControlError::TooManyFiles)? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                files.extend(fds.into_iter().map(own));
            }
        }
        (
            message.bytes,
            files,
            message.flags.contains(MsgFlags::MSG_TRUNC),
        )
    };
    if length == 0 {
        return Err(ControlError::Closed);
    }
    if truncated {
        return Err(ControlError::TooLong(length));
    }
    if files.len() > MAX_CONTROL_FDS {
        return Err(ControlError::TooManyFiles);
    }
    let message = serde_json::from_slice(&buffer[..length]).map_err(ControlError::Malformed)?;
    Ok((message, Files(files.into_iter().map(Some).collect())))
}

#[allow(unsafe_code)]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel made this descriptor for us when it delivered SCM_RIGHTS; nothing else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The files of one message; each can be taken once.
#[derive(Debug, Default)]
pub struct Files(Vec<Option<OwnedFd>>);

impl Files {
    /// Takes the file with this index.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, ControlError> {
        self.0
            .get_mut(usize::from(index.0))
            .and_then(Option::take)
            .ok_or(ControlError::NoSuchFile(index.0))
    }
}

/// The console ring: a shared memory file which the hypervisor process writes and the shim reads, also after a crash.
///
/// Layout: a little-endian u64 count of all bytes ever written, then [`crate::limits::CONSOLE_RING_BYTES`] of ring.
/// Byte `n` of the console is at ring offset `n % CONSOLE_RING_BYTES`. The writer stores bytes first, count last.
pub mod console {
    use crate::limits::CONSOLE_RING_BYTES;

    /// Bytes before the ring.
    pub const HEADER_BYTES: usize = 8;
    /// Size of the whole memory file.
    pub const FILE_BYTES: usize = HEADER_BYTES + CONSOLE_RING_BYTES;

    /// What a memory file of [`FILE_BYTES`] holds now, oldest byte first. The file's content is the guest's.
    pub fn read(file: &std::fs::File) -> std::io::Result<Vec<u8>> {
        use std::os::unix::fs::FileExt;
        let mut all = vec![0; FILE_BYTES];
        file.read_exact_at(&mut all, 0)?;
        let (header, ring) = all.split_at(HEADER_BYTES);
        let written = u64::from_le_bytes(header.try_into().expect("eight bytes"));
        let end =
            usize::try_from(written % CONSOLE_RING_BYTES as u64).expect("smaller than the ring");
        if written <= CONSOLE_RING_BYTES as u64 && end == 0 && written == 0 {
            return Ok(Vec::new());
        }
        if written < CONSOLE_RING_BYTES as u64 {
            return Ok(ring[..end].to_vec());
        }
        Ok([&ring[end..], &ring[..end]].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_message_carries_its_files() {
        let (a, b) = control_pair().unwrap();
        let mut file = tempfile();
        file.write_all(b"tap").unwrap();
        send(
            a.as_fd(),
            &Request::AttachTap {
                slot: 1,
                tap: FdIndex(0),
            },
            &[file.as_fd()],
        )
        .unwrap();
        let (request, mut files): (Request, _) = receive(b.as_fd()).unwrap();
        let Request::AttachTap { slot: 1, tap } = request else {
            panic!("{request:?}")
        };
        let mut got = std::fs::File::from(files.take(tap).unwrap());
        got.rewind().unwrap();
        let mut text = String::new();
        got.read_to_string(&mut text).unwrap();
        assert_eq!(text, "tap");
        assert!(matches!(files.take(tap), Err(ControlError::NoSuchFile(0))));
    }

    #[test]
    fn the_end_of_the_peer_is_told() {
        let (a, b) = control_pair().unwrap();
        drop(a);
        assert!(matches!(
            receive::<Request>(b.as_fd()),
            Err(ControlError::Closed)
        ));
        assert!(matches!(
            send(b.as_fd(), &Request::Stop, &[]),
            Err(ControlError::Closed)
        ));
    }

    #[test]
    fn garbage_and_unknown_requests_are_refused() {
        let (a, b) = control_pair().unwrap();
        for bad in [
            &b"{"[..],
            b"\"fly\"",
            b"{\"attach_tap\":{\"slot\":300,\"tap\":0}}",
        ] {
            nix::unistd::write(&a, bad).unwrap();
            assert!(matches!(
                receive::<Request>(b.as_fd()),
                Err(ControlError::Malformed(_))
            ));
        }
    }

    #[test]
    fn files_beyond_the_limit_are_refused_and_closed() {
        for count in [MAX_CONTROL_FDS + 1, SCM_MAX_FD] {
            let (a, b) = control_pair().unwrap();
            let (mut reader, writer) = std::io::pipe().unwrap();
            let message = serde_json::to_vec(&Request::Stop).unwrap();
            let files = vec![writer.as_raw_fd(); count];
            sendmsg::<()>(
                a.as_raw_fd(),
                &[IoSlice::new(&message)],
                &[ControlMessage::ScmRights(&files)],
                MsgFlags::empty(),
                None,
            )
            .unwrap();
            drop(writer);
            assert!(matches!(
                receive::<Request>(b.as_fd()),
                Err(ControlError::TooManyFiles)
            ));
            // End of file: no copy of the writing end is left.
            assert_eq!(reader.read(&mut [0]).unwrap(), 0, "{count}");
        }
    }

    #[test]
    fn the_console_ring_reads_oldest_first() {
        use crate::limits::CONSOLE_RING_BYTES as RING;
        use std::os::unix::fs::FileExt;
        let file = tempfile();
        file.set_len(console::FILE_BYTES as u64).unwrap();
        assert!(console::read(&file).unwrap().is_empty());
        file.write_all_at(b"abc", 8).unwrap();
        file.write_all_at(&3u64.to_le_bytes(), 0).unwrap();
        assert_eq!(console::read(&file).unwrap(), b"abc");
        file.write_all_at(&(RING as u64 + 1).to_le_bytes(), 0)
            .unwrap();
        let all = console::read(&file).unwrap();
        assert_eq!((all.len(), all[0], all[RING - 1]), (RING, b'b', b'a'));
    }

    fn tempfile() -> std::fs::File {
        let name = std::ffi::CString::new("test").unwrap();
        nix::sys::memfd::memfd_create(name.as_c_str(), nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .unwrap()
            .into()
    }
}
