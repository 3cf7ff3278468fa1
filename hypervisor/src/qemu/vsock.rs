//! Our vsock muxer as a vhost-user backend: QEMU forwards the guest's queues to it and never sees a packet.
//!
//! The backend runs on the thread of vhost-user-backend, which waits for the queues' kicks, for the muxer's sockets and
//! for our own wish to go on after the others had their turn.

use super::Error;
use crate::event_loop::TOLD_FAULTS;
use crate::virtio::vsock::{Muxer, RX_QUEUE, TX_QUEUE, queues};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{
    Error as DaemonError, VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The event queue stays with QEMU.
const QUEUES: usize = 2;
/// QEMU's virtio-mmio offers this many entries for any queue, and Linux takes all.
const MAX_QUEUE_SIZE: usize = 1024;
/// Event numbers: queues first, then one that the crate uses, then ours.
const MUXER: u16 = 3;
const AGAIN: u16 = 4;

type AtomicMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The backend. Lives behind a mutex, shared by its thread and whoever asks for counters.
pub struct Backend {
    guest_cid: u64,
    muxer: Muxer,
    memory: Option<AtomicMemory>,
    /// Written when there is more to do than one pass does.
    again: EventFd,
    /// Gets the number of each port the guest connects to. They are few, and each is open to it once.
    dialled: PipeWriter,
    /// The guest broke a rule of virtqueues: its vsock rests until it resets the device.
    broken: bool,
    /// How often that was logged.
    told: u32,
}

/// The backend's threads, as the main thread knows them.
pub struct Served {
    backend: Arc<Mutex<Backend>>,
    dialled: PipeReader,
}

impl Served {
    /// Counters of the muxer, with the names under which metrics show them.
    pub fn counters(&self) -> [(&'static str, u64); 7] {
        self.backend
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .muxer
            .counters()
            .named()
    }

    /// A port the guest connected to. Waits for one, unless [`Self::as_fd`] is readable.
    pub fn next_dialled(&mut self) -> io::Result<u32> {
        let mut port = [0; 4];
        self.dialled.read_exact(&mut port)?;
        Ok(u32::from_ne_bytes(port))
    }
}

impl AsFd for Served {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dialled.as_fd()
    }
}

/// Starts the backend's threads. Also returns QEMU's end of the vhost-user socket.
pub fn serve(guest_cid: u64, muxer: Muxer) -> Result<(Served, OwnedFd), Error> {
    let again = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(Error::host("make an event descriptor"))?;
    let (dialled, tell_dialled) = io::pipe().map_err(Error::host("make a pipe"))?;
    let muxer_fd = muxer.fd();
    let again_fd = again.as_raw_fd();
    let backend = Backend {
        guest_cid,
        muxer,
        memory: None,
        again,
        dialled: tell_dialled,
        broken: false,
        told: 0,
    };
    let backend = Arc::new(Mutex::new(backend));

    // The crate only serves a connection it accepted, so make one. Abstract names belong to the network namespace,
    // and in ours we are alone.
    let address = SocketAddr::from_abstract_name("vsock")
        .map_err(Error::host("name the vhost-user socket"))?;
    let listener =
        UnixListener::bind_addr(&address).map_err(Error::host("make the vhost-user socket"))?;
    let for_qemu = UnixStream::connect_addr(&address)
        .map_err(Error::host("connect to the vhost-user socket"))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("vsock".into(), Arc::clone(&backend), memory).map_err(not_served)?;
    for handler in daemon.get_epoll_handlers() {
        for (fd, event) in [(muxer_fd, MUXER), (again_fd, AGAIN)] {
            handler
                .register_listener(fd, EventSet::IN, event.into())
                .map_err(Error::host("watch vsock"))?;
        }
    }
    daemon
        .start(&mut Listener::from(listener))
        .map_err(not_served)?;
    std::thread::spawn(move || match daemon.wait() {
        // The end of the connection is the end of QEMU, of which the main thread hears as well.
        Ok(()) | Err(DaemonError::HandleRequest(VhostUserError::Disconnected)) => {}
        Err(error) => eprintln!("coffer-qemu: vsock ended: {error}"),
    });
    Ok((Served { backend, dialled }, for_qemu.into()))
}

#[allow(clippy::needless_pass_by_value)] // so that it is a function for map_err
fn not_served(error: DaemonError) -> Error {
    Error::VhostUser {
        reason: error.to_string(),
    }
}

impl Backend {
    fn exchange(&mut self, vrings: &[VringMutex<AtomicMemory>]) -> io::Result<()> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let memory = memory.memory();
        let (mut rx, mut tx) = (vrings[RX_QUEUE].get_mut(), vrings[TX_QUEUE].get_mut());
        if self.broken || !rx.get_queue().ready() || !tx.get_queue().ready() {
            return Ok(());
        }
        let done = match queues::exchange(
            &mut self.muxer,
            rx.get_queue_mut(),
            tx.get_queue_mut(),
            &memory,
        ) {
            Ok(done) => done,
            Err(error) => {
                if self.told < TOLD_FAULTS {
                    eprintln!("coffer-qemu: vsock stops, the guest broke a rule: {error}");
                }
                (self.told, self.broken) = (self.told.saturating_add(1), true);
                return Ok(());
            }
        };
        for (vring, progress) in [(&mut rx, done.rx), (&mut tx, done.tx)] {
            if progress.used && vring.needs_notification().unwrap_or(true) {
                vring.signal_used_queue()?;
            }
        }
        if done.rx.more || done.tx.more {
            self.again.write(1)?;
        }
        for port in self.muxer.take_dialled() {
            self.dialled.write_all(&port.to_ne_bytes())?;
        }
        Ok(())
    }
}

impl VhostUserBackendMut for Backend {
    type Bitmap = ();
    type Vring = VringMutex<AtomicMemory>;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {
        // The queues know.
    }

    /// `guest_cid`, a little-endian u64 (virtio 1.2, 5.10.4).
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.guest_cid.to_le_bytes();
        config
            .into_iter()
            .skip(offset as usize)
            .take(size as usize)
            .collect()
    }

    fn update_memory(&mut self, memory: AtomicMemory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn reset_device(&mut self) {
        self.muxer.reset();
        self.broken = false;
    }

    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        vrings: &[VringMutex<AtomicMemory>],
        _thread: usize,
    ) -> io::Result<()> {
        match event {
            MUXER => self.muxer.poll().map_err(io::Error::other)?,
            AGAIN => drop(self.again.read()),
            _ => {}
        }
        self.exchange(vrings)
    }
}
