//! A guest without a guest: it speaks vhost-user and FUSE to coffer-fsd over a ring in a memory file, and can so say
//! what no kernel would.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use vhost_frontend::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_frontend::vhost_user::{Frontend, VhostUserFrontend};
use vhost_frontend::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// virtio-fs has the high-priority queue first; requests go into the second.
const REQUEST_QUEUE: usize = 1;
const QUEUE_SIZE: u16 = 16;
const MEMORY: u64 = 1 << 20;
/// Where the backend is told that the memory lies in the frontend; only differences to it matter.
const USER_BASE: u64 = 0x4000_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x1_0000;
const RESPONSE: u64 = 0x4_0000;
const RESPONSE_SIZE: u32 = 0x2_0000;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// Inode number of the share's root.
pub const ROOT: u64 = 1;

/// FUSE operations (`enum fuse_opcode`).
#[derive(Debug, Clone, Copy)]
pub enum Op {
    Lookup = 1,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Rename = 12,
    Link = 13,
    Open = 14,
    Init = 26,
    Create = 35,
}

pub struct Driver {
    memory: File,
    kick: EventFd,
    call: EventFd,
    sent: u16,
    _frontend: Frontend,
}

impl Driver {
    /// Sets up the device over a connected vhost-user socket and says FUSE_INIT.
    pub fn new(socket: UnixStream) -> Self {
        let name = c"guest memory";
        let memory: File =
            nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
                .unwrap()
                .into();
        memory.set_len(MEMORY).unwrap();
        let mut frontend = Frontend::from_stream(socket, 2);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(
            offered & (VIRTIO_F_VERSION_1 | protocol),
            VIRTIO_F_VERSION_1 | protocol
        );
        let protocol_offered = frontend.get_protocol_features().unwrap();
        frontend
            .set_protocol_features(protocol_offered & VhostUserProtocolFeatures::MQ)
            .unwrap();
        frontend
            .set_features(VIRTIO_F_VERSION_1 | protocol)
            .unwrap();
        frontend
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: 0,
                memory_size: MEMORY,
                userspace_addr: USER_BASE,
                mmap_offset: 0,
                mmap_handle: memory.as_raw_fd(),
            }])
            .unwrap();
        let kick = EventFd::new(0).unwrap();
        let call = EventFd::new(0).unwrap();
        frontend.set_vring_num(REQUEST_QUEUE, QUEUE_SIZE).unwrap();
        let rings = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: USER_BASE + DESCRIPTORS,
            used_ring_addr: USER_BASE + USED,
            avail_ring_addr: USER_BASE + AVAILABLE,
            log_addr: None,
        };
        frontend.set_vring_addr(REQUEST_QUEUE, &rings).unwrap();
        frontend.set_vring_base(REQUEST_QUEUE, 0).unwrap();
        frontend.set_vring_call(REQUEST_QUEUE, &call).unwrap();
        frontend.set_vring_kick(REQUEST_QUEUE, &kick).unwrap();
        frontend.set_vring_enable(REQUEST_QUEUE, true).unwrap();
        let mut driver = Self {
            memory,
            kick,
            call,
            sent: 0,
            _frontend: frontend,
        };
        driver.init();
        driver
    }

    fn init(&mut self) {
        const VERSION: [u32; 2] = [7, 38];
        const FUSE_SUBMOUNTS: u32 = 1 << 27;
        /// There are more flags: Linux 6.3 and later has that for the groups of who makes a file.
        const FUSE_INIT_EXT: u32 = 1 << 30;
        const CREATE_SUPP_GROUP: u32 = 1 << (34 - 32);
        let mut body = [0u8; 64];
        body[..4].copy_from_slice(&VERSION[0].to_le_bytes());
        body[4..8].copy_from_slice(&VERSION[1].to_le_bytes());
        body[12..16].copy_from_slice(&(FUSE_SUBMOUNTS | FUSE_INIT_EXT).to_le_bytes());
        body[16..20].copy_from_slice(&CREATE_SUPP_GROUP.to_le_bytes());
        self.request(Op::Init, 0, &body).expect("FUSE_INIT");
    }

    /// One FUSE request as guest root: the reply's body, or the errno.
    pub fn request(&mut self, op: Op, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.request_as(0, op, node, body)
    }

    /// The same as a user and the group of the same number.
    pub fn request_as(
        &mut self,
        user: u32,
        op: Op,
        node: u64,
        body: &[u8],
    ) -> Result<Vec<u8>, i32> {
        const HEADER: usize = 40;
        let length = u32::try_from(HEADER + body.len()).unwrap();
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(length.to_le_bytes());
        message.extend((op as u32).to_le_bytes());
        message.extend(u64::from(self.sent + 1).to_le_bytes());
        message.extend(node.to_le_bytes());
        message.extend([user, user].map(u32::to_le_bytes).concat());
        message.resize(HEADER, 0);
        message.extend(body);
        self.send(&message);
        self.reply()
    }

    /// Any bytes as a request.
    pub fn send(&mut self, message: &[u8]) {
        self.memory.write_all_at(message, REQUEST).unwrap();
        self.descriptor(
            0,
            REQUEST,
            u32::try_from(message.len()).unwrap(),
            DESC_NEXT,
            1,
        );
        self.descriptor(1, RESPONSE, RESPONSE_SIZE, DESC_WRITE, 0);
        self.publish();
    }

    fn descriptor(&self, index: u64, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory
            .write_all_at(&bytes, DESCRIPTORS + 16 * index)
            .unwrap();
    }

    fn publish(&mut self) {
        let slot = u64::from(self.sent % QUEUE_SIZE);
        self.memory
            .write_all_at(&0u16.to_le_bytes(), AVAILABLE + 4 + 2 * slot)
            .unwrap();
        self.sent = self.sent.wrapping_add(1);
        self.memory
            .write_all_at(&self.sent.to_le_bytes(), AVAILABLE + 2)
            .unwrap();
        self.kick.write(1).unwrap();
    }

    fn reply(&self) -> Result<Vec<u8>, i32> {
        let mut fds = [PollFd::new(self.call_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(10_000u16)).unwrap();
        assert_eq!(ready, 1, "coffer-fsd did not answer within 10 s");
        self.call.read().unwrap();
        let mut used = [0; 2];
        self.memory.read_exact_at(&mut used, USED + 2).unwrap();
        assert_eq!(u16::from_le_bytes(used), self.sent);
        let mut header = [0; 16];
        self.memory.read_exact_at(&mut header, RESPONSE).unwrap();
        let length = u32::from_le_bytes(header[..4].try_into().unwrap());
        let error = i32::from_le_bytes(header[4..8].try_into().unwrap());
        if error != 0 {
            return Err(-error);
        }
        let mut body = vec![0; usize::try_from(length).unwrap() - header.len()];
        self.memory.read_exact_at(&mut body, RESPONSE + 16).unwrap();
        Ok(body)
    }

    #[allow(unsafe_code)]
    fn call_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the event descriptor lives as long as self.
        unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) }
    }

    /// The inode number of `name` in `parent`.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let entry = self.request(Op::Lookup, parent, &text(&[name]))?;
        Ok(u64::from_le_bytes(entry[..8].try_into().unwrap()))
    }

    /// The handle of an inode opened with these flags.
    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let body = [flags.cast_unsigned().to_le_bytes(), [0; 4]].concat();
        let reply = self.request(Op::Open, node, &body)?;
        Ok(u64::from_le_bytes(reply[..8].try_into().unwrap()))
    }
}

/// Strings as FUSE has them: each ended by zero.
pub fn text(parts: &[&str]) -> Vec<u8> {
    parts
        .iter()
        .flat_map(|part| part.bytes().chain([0]))
        .collect()
}
