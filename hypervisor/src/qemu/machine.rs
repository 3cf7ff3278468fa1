//! One QEMU machine: how it is made, and how it is driven until its end.

use super::arguments::{CommandLine, Sockets};
use super::console::Console;
use super::process::{Qemu, lock_up, lock_up_further};
use super::qmp::{Qmp, QmpError};
use super::vsock::{self, Served};
use super::{Error, reply};
use crate::ring::ConsoleRing;
use crate::virtio::vsock::Muxer;
use coffer_proto::error_chain::chain;
use coffer_proto::limits::{BOOT_PHASE_AGENT_READY, HOME_PORT};
use coffer_proto::vmm::{
    self, ControlError, Event, Exit, Files, FromVmm, Metrics, NicConfig, Reply, Request, VmConfig,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

/// How a network slot is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// To the tap it had from boot.
    Direct,
    /// To a hub, and over it to a tap.
    Attached,
    /// To a hub with nothing else in it.
    Detached,
    /// It had a tap from boot that was taken away; QEMU can't connect the device again.
    Spent,
}

impl Slot {
    fn at_boot(nic: &NicConfig) -> Self {
        if nic.tap.is_some() {
            Self::Direct
        } else {
            Self::Detached
        }
    }
}

/// A running machine.
pub struct Machine {
    qemu: Qemu,
    qmp: Qmp,
    console: Console,
    vsock: Served,
    /// A copy of the virtio-fs socket, only to see the other end go.
    fs: Option<OwnedFd>,
    /// The supervisor's pidfd, only to see it end.
    supervisor: Option<OwnedFd>,
    slots: Vec<Slot>,
    started: Instant,
    ready_us: Option<u64>,
    /// Why QEMU said that it ends.
    shutdown: Option<String>,
    /// Why we ended it.
    killed: Option<Exit>,
}

impl Machine {
    /// Makes the machine and lets it run.
    pub fn boot(
        config: &VmConfig,
        mut files: Files,
        supervisor: Option<OwnedFd>,
        started: Instant,
    ) -> Result<Self, Error> {
        lock_up(config.uid)?;
        let muxer = muxer(config, &mut files)?;
        let (vsock, qemu_vsock) = vsock::serve(config.vsock.guest_cid, muxer)?;

        let pair = || UnixStream::pair().map_err(Error::host("make a socket pair"));
        let ((qmp, qemu_qmp), (console, qemu_console)) = (pair()?, pair()?);
        let ring = ConsoleRing::new(files.take(config.console)?.into())
            .map_err(Error::host("map the console ring"))?;
        let console =
            Console::new(console, ring).map_err(Error::host("set up the console's socket"))?;
        let qemu_fs = config
            .fs
            .as_ref()
            .map(|fs| files.take(fs.socket))
            .transpose()?;
        let fs = qemu_fs.as_ref().map(OwnedFd::try_clone).transpose();
        let fs = fs.map_err(Error::host("copy a socket"))?;
        let sockets = Sockets {
            qmp: qemu_qmp.into(),
            console: qemu_console.into(),
            vsock: qemu_vsock,
            fs: qemu_fs,
        };
        let line = CommandLine::new(config, &mut files, sockets)?;
        let mut qemu = Qemu::start(&line.arguments, &line.files)?;
        // Only QEMU's copies count from here on: the end of a socket is the end of QEMU.
        drop(line);
        let qmp = Qmp::connect(qmp).map_err(|error| start_error(&mut qemu, error))?;

        let mut machine = Self {
            qemu,
            qmp,
            console,
            vsock,
            fs,
            supervisor,
            slots: config.nics.iter().map(Slot::at_boot).collect(),
            started,
            ready_us: None,
            shutdown: None,
            killed: None,
        };
        for slot in 0..machine.slots.len() {
            if machine.slots[slot] == Slot::Detached {
                machine.set_link(slot, false)?;
            }
        }
        lock_up_further()?;
        machine.qmp.execute("cont", &json!({}))?;
        Ok(machine)
    }

    /// Serves requests and waits for the end of the machine.
    pub fn serve(&mut self, control: &OwnedFd) -> Result<Exit, Error> {
        loop {
            let ready = self.wait(control)?;
            if ready.console {
                self.console
                    .drain()
                    .map_err(Error::host("read the console"))?;
            }
            if ready.stderr {
                self.qemu.read_stderr();
            }
            if ready.dialled {
                self.report_dialled(control)?;
            }
            if ready.fs {
                self.end(Exit::Failed {
                    message: "coffer-fsd went away".into(),
                });
                self.fs = None;
            }
            if ready.supervisor {
                self.end(Exit::Stopped);
                self.supervisor = None;
            }
            if ready.control {
                self.serve_request(control)?;
            }
            if ready.qmp && !self.take_events()? {
                return self.ended();
            }
        }
    }

    fn wait(&self, control: &OwnedFd) -> Result<Ready, Error> {
        let readable = PollFlags::POLLIN;
        let mut fds = vec![
            PollFd::new(control.as_fd(), readable),
            PollFd::new(self.qmp.as_fd(), readable),
            PollFd::new(self.console.as_fd(), readable),
            PollFd::new(self.qemu.stderr(), readable),
            PollFd::new(self.vsock.as_fd(), readable),
        ];
        let fs = self.fs.as_ref().map(|fs| {
            // Its messages are QEMU's. Only the hang-up is reported, which needs no asking.
            fds.push(PollFd::new(fs.as_fd(), PollFlags::empty()));
            fds.len() - 1
        });
        let supervisor = self.supervisor.as_ref().map(|supervisor| {
            fds.push(PollFd::new(supervisor.as_fd(), readable));
            fds.len() - 1
        });
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(Error::host("wait for events")(error)),
        }
        let is = |index: usize| fds[index].any().unwrap_or(false);
        Ok(Ready {
            control: is(0),
            qmp: is(1),
            console: is(2),
            stderr: is(3),
            dialled: is(4),
            fs: fs.is_some_and(is),
            supervisor: supervisor.is_some_and(is),
        })
    }

    fn serve_request(&mut self, control: &OwnedFd) -> Result<(), Error> {
        let (request, files) = match vmm::receive::<Request>(control.as_fd()) {
            Ok(message) => message,
            Err(ControlError::Closed) => {
                self.end(Exit::Stopped);
                return Ok(());
            }
            Err(error @ ControlError::Malformed(_)) => {
                reply(
                    control,
                    Reply::Failed {
                        message: chain(&Error::from(error)),
                    },
                )?;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let answer = match self.carry_out(&request, files) {
            Ok(answer) => answer,
            Err(error) => Reply::Failed {
                message: chain(&error),
            },
        };
        match reply(control, answer) {
            Err(ControlError::Closed) => self.end(Exit::Stopped),
            sent => sent?,
        }
        Ok(())
    }

    fn carry_out(&mut self, request: &Request, mut files: Files) -> Result<Reply, Error> {
        match request {
            Request::Boot(_) => {
                return Ok(Reply::Failed {
                    message: "the machine is booted already".into(),
                });
            }
            Request::AttachTap { slot, tap } => {
                self.attach_tap(*slot, files.take(*tap)?.as_fd())?;
            }
            Request::DetachTap { slot } => self.detach_tap(*slot)?,
            Request::ResizeMemory { .. } => {
                return Ok(Reply::Failed {
                    message: "QEMU's microvm keeps the memory that it booted with".into(),
                });
            }
            Request::AttachDisk { .. } | Request::DetachDisk { .. } => {
                return Err(Error::EmptyDisk);
            }
            Request::Pause => drop(self.qmp.execute("stop", &json!({}))?),
            Request::Resume => drop(self.qmp.execute("cont", &json!({}))?),
            Request::Metrics => return Ok(Reply::Metrics(self.metrics())),
            Request::Stop => self.end(Exit::Stopped),
        }
        Ok(Reply::Done)
    }

    /// Adds the tap to the slot's hub.
    fn attach_tap(&mut self, slot: u8, tap: BorrowedFd<'_>) -> Result<(), Error> {
        self.check_slot(slot, Slot::Detached)?;
        let name = format!("tap{slot}");
        self.qmp.give_file(&name, tap)?;
        let tap = json!({"type": "tap", "id": name, "fd": name, "vhost": false});
        self.qmp.execute("netdev_add", &tap)?;
        let port =
            json!({"type": "hubport", "id": format!("port{slot}"), "hubid": slot, "netdev": name});
        self.qmp.execute("netdev_add", &port)?;
        self.set_link(slot.into(), true)?;
        self.slots[usize::from(slot)] = Slot::Attached;
        Ok(())
    }

    fn detach_tap(&mut self, slot: u8) -> Result<(), Error> {
        let current = self.slots.get(usize::from(slot)).copied();
        let (netdevs, next) = match current {
            Some(Slot::Attached) => (
                vec![format!("port{slot}"), format!("tap{slot}")],
                Slot::Detached,
            ),
            Some(Slot::Direct) => (vec![format!("net{slot}")], Slot::Spent),
            _ => return self.check_slot(slot, Slot::Attached),
        };
        self.set_link(slot.into(), false)?;
        for id in netdevs {
            self.qmp.execute("netdev_del", &json!({"id": id}))?;
        }
        self.slots[usize::from(slot)] = next;
        Ok(())
    }

    fn check_slot(&self, slot: u8, wanted: Slot) -> Result<(), Error> {
        let reason = match self.slots.get(usize::from(slot)) {
            None => "does not exist",
            Some(current) if *current == wanted => return Ok(()),
            Some(Slot::Direct | Slot::Attached) => "has a tap already",
            Some(Slot::Detached) => "has no tap",
            Some(Slot::Spent) => "lost the tap it had from boot, and QEMU can't give it another",
        };
        Err(Error::Nic { slot, reason })
    }

    fn set_link(&mut self, slot: usize, up: bool) -> Result<(), Error> {
        self.qmp
            .execute("set_link", &json!({"name": format!("nic{slot}"), "up": up}))?;
        Ok(())
    }

    fn metrics(&self) -> Metrics {
        let counters = self.vsock.counters().into_iter();
        let devices = counters
            .map(|(name, count)| (format!("vsock.{name}"), count))
            .collect();
        let phases = self
            .ready_us
            .map(|us| ("agent_ready".to_owned(), us))
            .into_iter()
            .collect();
        let private_rss = anonymous_memory(self.qemu.pid()) + anonymous_memory(std::process::id());
        Metrics {
            devices,
            phases,
            private_rss,
            ..Metrics::default()
        }
    }

    /// The guest connected to one of its host ports: the agent is ready when it calls home.
    fn report_dialled(&mut self, control: &OwnedFd) -> Result<(), Error> {
        let port = self
            .vsock
            .next_dialled()
            .map_err(Error::host("hear of a connection of the guest"))?;
        // A guest may give up and dial again; it became ready once.
        if port != HOME_PORT || self.ready_us.is_some() {
            return Ok(());
        }
        let since_start_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.ready_us = Some(since_start_us);
        let event = Event::Phase {
            phase: BOOT_PHASE_AGENT_READY,
            since_start_us,
        };
        match vmm::send(control.as_fd(), &FromVmm::Event(event), &[]) {
            // Its next read tells.
            Err(ControlError::Closed) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// False: QEMU is gone.
    fn take_events(&mut self) -> Result<bool, Error> {
        match self.qmp.take_events() {
            Ok(events) => {
                for event in events {
                    if event.name == "SHUTDOWN" {
                        self.shutdown = Some(event.reason);
                    }
                }
                Ok(true)
            }
            Err(QmpError::Closed) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends the machine for this reason, unless it ends for another already.
    fn end(&mut self, reason: Exit) {
        self.killed.get_or_insert(reason);
        self.qemu.kill();
    }

    fn ended(&mut self) -> Result<Exit, Error> {
        // QEMU closes QMP at its end only; what it is still doing then is of no use.
        if self.shutdown.is_none() {
            self.qemu.kill();
        }
        let last_words = self.qemu.wait();
        while self
            .console
            .drain()
            .map_err(Error::host("read the console"))?
        {}
        if let Some(reason) = self.killed.take() {
            return Ok(reason);
        }
        Ok(match self.shutdown.take() {
            Some(reason) if reason.starts_with("guest-") => Exit::Reset,
            Some(reason) => Exit::Failed {
                message: format!("QEMU was told to end: {reason}"),
            },
            None => Exit::Failed {
                message: format!("QEMU died: {last_words}"),
            },
        })
    }
}

fn muxer(config: &VmConfig, files: &mut Files) -> Result<Muxer, Error> {
    let listener = UnixListener::from(files.take(config.vsock.listener)?);
    let mut ports = Vec::with_capacity(config.vsock.ports.len());
    for port in &config.vsock.ports {
        ports.push((port.port, UnixStream::from(files.take(port.socket)?)));
    }
    Ok(Muxer::new(config.vsock.guest_cid, listener, ports)?)
}

/// What [`Machine::wait`] found.
struct Ready {
    control: bool,
    qmp: bool,
    console: bool,
    stderr: bool,
    dialled: bool,
    fs: bool,
    supervisor: bool,
}

/// QEMU's own words say why it did not start, where there are any.
fn start_error(qemu: &mut Qemu, error: QmpError) -> Error {
    match error {
        QmpError::Closed => Error::Start {
            message: qemu.wait(),
        },
        other => other.into(),
    }
}

/// Bytes of a process's memory that are neither a file's nor the guest's. Zero where it can't be read.
fn anonymous_memory(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss_Anon:"));
    let kib: u64 = line
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap_or(0);
    kib << 10
}
