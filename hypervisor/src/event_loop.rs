//! The main thread: one epoll set for the control socket, for what vCPUs tell, and for all devices.
//!
//! Each wake-up does a bounded amount of work for each ready file, so no device and no guest can keep the others or the
//! shim waiting. Nothing here waits for a vCPU: a pause is asked for, and answered when the last one stands still.

use crate::clock;
use crate::control::Control;
use crate::machine::Machine;
use crate::metrics::{ProcessMetrics, micros};
use crate::notice::Notice;
use crate::vcpu::Wanted;
use crate::virtio::DeviceError;
use crate::virtio::mmio::{Transport, Work};
use crate::virtio::slot::Slot;
use coffer_proto::error_chain::chain;
use coffer_proto::limits::BOOT_PHASE_AGENT_READY;
use coffer_proto::vmm::{ControlError, Event, Exit, Files, Reply, Request};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// A vCPU that does not stand still by then hangs in KVM; the pause fails.
const PAUSE_DEADLINE: Duration = Duration::from_secs(10);
/// A vCPU thread that has not ended by then ends with the process.
const STOP_DEADLINE: Duration = Duration::from_secs(2);
/// Faults of the guest that are logged; it could reset and break a device for ever.
pub const TOLD_FAULTS: u32 = 16;
/// Ready files taken at one wake-up.
const EVENTS: usize = 32;

/// What a ready file is. Packed into the 64 bits that epoll keeps for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Control,
    /// Notices of vCPUs, and device work they left.
    Wake,
    Queue {
        slot: u16,
        queue: u16,
    },
    Source {
        slot: u16,
        token: u16,
    },
    /// The supervisor's process ended.
    Supervisor,
}

impl Token {
    fn pack(self) -> u64 {
        let (kind, slot, low) = match self {
            Self::Control => (0, 0, 0),
            Self::Wake => (1, 0, 0),
            Self::Queue { slot, queue } => (2, slot, queue),
            Self::Source { slot, token } => (3, slot, token),
            Self::Supervisor => (4, 0, 0),
        };
        kind << 32 | u64::from(slot) << 16 | u64::from(low)
    }

    fn unpack(data: u64) -> Self {
        let (slot, low) = ((data >> 16) as u16, data as u16);
        match data >> 32 {
            0 => Self::Control,
            1 => Self::Wake,
            2 => Self::Queue { slot, queue: low },
            3 => Self::Source { slot, token: low },
            _ => Self::Supervisor,
        }
    }
}

/// A slot whose backing file comes and goes.
#[derive(Debug, Clone, Copy)]
enum Which {
    Network(u8),
    Disk(u8),
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(slot) => write!(f, "network slot {slot}"),
            Self::Disk(slot) => write!(f, "disk slot {slot}"),
        }
    }
}

/// A pause the shim waits for.
#[derive(Debug)]
struct Pausing {
    /// vCPUs that have answered this wish.
    standing: usize,
    deadline: Instant,
}

/// The main thread's state.
#[derive(Debug)]
pub struct EventLoop {
    epoll: Epoll,
    machine: Machine,
    control: Control,
    /// Its pidfd, watched for its end.
    _supervisor: Option<OwnedFd>,
    metrics: ProcessMetrics,
    /// Files watched for each slot while it is active.
    watched: Vec<Vec<RawFd>>,
    pausing: Option<Pausing>,
    /// vCPU threads that have ended.
    finished: usize,
    /// Faults of the guest logged so far.
    told: u32,
}

impl EventLoop {
    /// `supervisor`: a pidfd, where there is one.
    pub fn new(
        machine: Machine,
        control: Control,
        supervisor: Option<OwnedFd>,
        metrics: ProcessMetrics,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let watch = |fd: RawFd, token: Token| {
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN, token.pack()),
            )
        };
        watch(control.as_raw_fd(), Token::Control)?;
        watch(machine.wake.as_raw_fd(), Token::Wake)?;
        if let Some(supervisor) = &supervisor {
            watch(supervisor.as_raw_fd(), Token::Supervisor)?;
        }
        let watched = vec![Vec::new(); machine.slots.len()];
        Ok(Self {
            epoll,
            machine,
            control,
            _supervisor: supervisor,
            metrics,
            watched,
            pausing: None,
            finished: 0,
            told: 0,
        })
    }

    /// Lets the guest run until the VM ends; then no vCPU runs any more, and the shim has been told.
    pub fn run(mut self) -> Exit {
        self.machine.want(Wanted::Run);
        let exit = self.serve();
        self.stop();
        // Where the shim is gone nobody wants to know.
        let _ = self.control.event(Event::Exited(exit.clone()));
        exit
    }

    fn serve(&mut self) -> Exit {
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            let ready = match self.epoll.wait(self.timeout(), &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Exit::Failed {
                        message: format!("epoll failed: {error}"),
                    };
                }
            };
            for event in &events[..ready] {
                let exit = match Token::unpack(event.data()) {
                    Token::Control => self.request(),
                    Token::Wake => self.wake(),
                    Token::Queue { slot, queue } => {
                        self.queue_event(usize::from(slot), usize::from(queue))
                    }
                    Token::Source { slot, token } => {
                        self.source_event(usize::from(slot), token, event.event_set())
                    }
                    Token::Supervisor => Some(Exit::Stopped),
                };
                if let Some(exit) = exit {
                    return exit;
                }
            }
            self.check_pause();
        }
    }

    /// Milliseconds until the next deadline; -1 without one.
    fn timeout(&self) -> i32 {
        self.pausing.as_ref().map_or(-1, |pausing| {
            let left = pausing.deadline.saturating_duration_since(Instant::now());
            i32::try_from(left.as_millis()).map_or(i32::MAX, |millis| millis + 1)
        })
    }

    /// One request of the shim.
    fn request(&mut self) -> Option<Exit> {
        let (request, mut files) = match self.control.receive() {
            Ok(received) => received,
            Err(ControlError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                return None;
            }
            Err(ControlError::Closed) => return Some(Exit::Stopped),
            Err(error) => {
                return Some(Exit::Failed {
                    message: chain(&error),
                });
            }
        };
        let reply = match request {
            Request::Boot(_) => failed("the VM is booted already"),
            Request::AttachTap { slot, tap } => match files.take(tap) {
                Ok(tap) => self.set_backend(Which::Network(slot), Some(tap)),
                Err(error) => failed(&chain(&error)),
            },
            Request::DetachTap { slot } => self.set_backend(Which::Network(slot), None),
            Request::AttachDisk { slot, file } => match files.take(file) {
                Ok(file) => self.set_backend(Which::Disk(slot), Some(file)),
                Err(error) => failed(&chain(&error)),
            },
            Request::DetachDisk { slot } => self.set_backend(Which::Disk(slot), None),
            Request::ResizeMemory { mib } => match self.machine.resize_memory(mib) {
                Ok(()) => Reply::Done,
                Err(error) => failed(&chain(&error)),
            },
            Request::Pause if self.pausing.is_some() => failed("a pause is under way"),
            Request::Pause => {
                self.pausing = Some(Pausing {
                    standing: 0,
                    deadline: Instant::now() + PAUSE_DEADLINE,
                });
                self.machine.want(Wanted::Pause);
                return None; // The reply comes when all stand still.
            }
            Request::Resume if self.pausing.is_some() => failed("a pause is under way"),
            Request::Resume => {
                self.machine.want(Wanted::Run);
                Reply::Done
            }
            Request::Metrics => Reply::Metrics(self.metrics.gather(&self.machine)),
            Request::Stop => {
                let _ = self.control.reply(Reply::Done);
                return Some(Exit::Stopped);
            }
        };
        drop::<Files>(files);
        // A guest may have had what it was asked for before.
        self.reply(reply).or_else(|| self.tell_memory())
    }

    /// Tells the shim when the guest has the memory that it was asked to have.
    fn tell_memory(&self) -> Option<Exit> {
        let mib = self.machine.memory_reached()?;
        let told = self.control.event(Event::Memory { mib });
        told.is_err().then_some(Exit::Stopped)
    }

    fn reply(&self, reply: Reply) -> Option<Exit> {
        match self.control.reply(reply) {
            Ok(()) => None,
            Err(ControlError::Closed) => Some(Exit::Stopped),
            Err(error) => Some(Exit::Failed {
                message: chain(&error),
            }),
        }
    }

    fn set_backend(&mut self, which: Which, file: Option<OwnedFd>) -> Reply {
        let slot = match which {
            Which::Network(nic) => self.machine.nic(nic),
            Which::Disk(disk) => self.machine.disk(disk),
        };
        let Some(slot) = slot else {
            return failed(&format!("there is no {which}"));
        };
        let shared = self.machine.slots[slot].clone();
        let mut transport = shared.lock();
        self.unwatch(slot);
        let result = transport.device().set_backend(file);
        let watched = self.watch(slot, &mut transport);
        match (result, watched) {
            (Ok(()), Ok(())) => Reply::Done,
            (Err(error), _) => failed(&chain(&error)),
            (_, Err(error)) => failed(&format!("{which} can't be watched: {error}")),
        }
    }

    /// vCPUs have told something, or left work for a device.
    fn wake(&mut self) -> Option<Exit> {
        // Several wake-ups may have become one.
        let _ = self.machine.wake.read();
        while let Ok(notice) = self.machine.notices.try_recv() {
            match notice {
                Notice::Paused { wish, .. } => {
                    if let Some(pausing) = &mut self.pausing
                        && wish == self.machine.wish
                    {
                        pausing.standing += 1;
                    }
                }
                Notice::Reset => return Some(Exit::Reset),
                Notice::Phase { phase, since_start } => {
                    let name = if phase == BOOT_PHASE_AGENT_READY {
                        "agent_ready".into()
                    } else {
                        format!("{phase:#x}")
                    };
                    self.metrics.phase(&name, since_start);
                    let event = Event::Phase {
                        phase,
                        since_start_us: micros(since_start),
                    };
                    if self.control.event(event).is_err() {
                        return Some(Exit::Stopped);
                    }
                }
                Notice::Finished { vcpu, exit } => {
                    self.finished += 1;
                    let message = format!("vCPU {vcpu} ended without a reason");
                    return Some(exit.unwrap_or(Exit::Failed { message }));
                }
            }
        }
        (0..self.machine.slots.len()).find_map(|slot| self.device_work(slot))
    }

    /// Activation or reset that a vCPU waits for.
    fn device_work(&mut self, slot: usize) -> Option<Exit> {
        let shared = self.machine.slots[slot].clone();
        let mut transport = shared.lock();
        let result = match transport.take_work()? {
            Work::Reset => {
                self.unwatch(slot);
                transport.reset();
                Ok(())
            }
            Work::Activate => {
                let active = transport.activate();
                active.and_then(|()| self.watch(slot, &mut transport).map_err(DeviceError::fatal))
            }
        };
        let exit = self.outcome(slot, &shared, &mut transport, result);
        drop(transport);
        shared.finished();
        exit
    }

    fn queue_event(&mut self, slot: usize, queue: usize) -> Option<Exit> {
        let shared = self.machine.slots[slot].clone();
        let mut transport = shared.lock();
        // An event of the same wake-up may have reset the device.
        if !transport.is_active() || transport.notify()[queue].read().is_err() {
            return None;
        }
        let result = transport.device().queue_event(queue);
        self.outcome(slot, &shared, &mut transport, result)
            .or_else(|| self.tell_memory())
    }

    fn source_event(&mut self, slot: usize, token: u16, set: EventSet) -> Option<Exit> {
        let shared = self.machine.slots[slot].clone();
        let mut transport = shared.lock();
        if !transport.is_active() {
            return None;
        }
        let result = transport.device().source_event(token, set);
        self.outcome(slot, &shared, &mut transport, result)
    }

    /// What follows from a device's error: the guest's own fault stops the device, ours the VM.
    fn outcome(
        &mut self,
        slot: usize,
        shared: &Slot,
        transport: &mut Transport,
        result: Result<(), DeviceError>,
    ) -> Option<Exit> {
        match result {
            Ok(()) => None,
            Err(error @ DeviceError::Hostile(_)) => {
                if self.told < TOLD_FAULTS {
                    self.told += 1;
                    crate::report(&format!("{}: {}", shared.name, chain(&error)));
                }
                self.unwatch(slot);
                transport.needs_reset();
                None
            }
            Err(error) => Some(Exit::Failed {
                message: format!("{}: {}", shared.name, chain(&error)),
            }),
        }
    }

    /// Watches the kicks and the sources of an active device.
    fn watch(&mut self, slot: usize, transport: &mut Transport) -> io::Result<()> {
        if !transport.is_active() {
            return Ok(());
        }
        let number = slot as u16;
        let mut files: Vec<_> = transport.device().sources();
        let mut tokens: Vec<_> = files
            .iter()
            .map(|(_, _, token)| Token::Source {
                slot: number,
                token: *token,
            })
            .collect();
        if !transport.device().takes_kicks() {
            files.extend(
                transport
                    .notify()
                    .iter()
                    .map(|event| (event.as_raw_fd(), EventSet::IN, 0)),
            );
            tokens.extend(
                (0..)
                    .take(transport.notify().len())
                    .map(|queue| Token::Queue {
                        slot: number,
                        queue,
                    }),
            );
        }
        for ((fd, set, _), token) in files.into_iter().zip(tokens) {
            self.epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(set, token.pack()),
            )?;
            self.watched[slot].push(fd);
        }
        Ok(())
    }

    /// Stops watching all files of a device.
    fn unwatch(&mut self, slot: usize) {
        for fd in self.watched[slot].drain(..) {
            // A file that is closed has left the set by itself.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    fn check_pause(&mut self) {
        let Some(pausing) = &self.pausing else { return };
        let reply = if pausing.standing == self.machine.vcpus.len() {
            Reply::Done
        } else if Instant::now() > pausing.deadline {
            self.machine.want(Wanted::Run);
            failed("a vCPU did not stand still in time")
        } else {
            return;
        };
        self.pausing = None;
        // A closed socket is seen by the next wait.
        let _ = self.control.reply(reply);
    }

    /// Ends all vCPUs. They may be waiting for device work, which now nobody does.
    fn stop(&mut self) {
        self.machine.want(Wanted::Finish);
        for slot in &self.machine.slots {
            slot.abandon();
        }
        let deadline = clock::since_start() + STOP_DEADLINE;
        while self.finished < self.machine.vcpus.len() {
            match self
                .machine
                .notices
                .recv_timeout(deadline.saturating_sub(clock::since_start()))
            {
                Ok(Notice::Finished { .. }) => self.finished += 1,
                Ok(_) => {}
                Err(_) => break,
            }
        }
    }
}

fn failed(message: &str) -> Reply {
    Reply::Failed {
        message: message.to_owned(),
    }
}
