//! A virtual machine, from its configuration to vCPUs that wait for the word to run.
//!
//! [`Machine::build`] is the boot recipe: read it from top to bottom and you know everything the guest finds. The process
//! has entered its jail before, because nothing here opens a path.

use crate::boot::{self, BootError, Loaded};
use crate::bus::{Bus, SerialLine, SerialPort, SharedRing};
use crate::cpuid;
use crate::exits::ExitCounts;
use crate::growth::{self, Growth};
use crate::layout::{
    FIRST_VIRTIO_GSI, KVM_TSS, LAST_GSI, SERIAL_GSI, START_INFO, VIRTIO_MMIO, VIRTIO_MMIO_SIZE,
};
use crate::memory::{self, MemoryError};
use crate::notice::{Notice, Notices};
use crate::ring::ConsoleRing;
use crate::vcpu::{self, RunningVcpu, Vcpu, VcpuContext, VcpuError, Wanted};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::console::Console;
use crate::virtio::fs::Fs;
use crate::virtio::mmio::{QUEUE_NOTIFY, Transport};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::slot::Slot;
use crate::virtio::vsock::{Muxer, Vsock};
use crate::virtio::{Memory, VirtioDevice};
use coffer_proto::limits::{MAX_DISKS, MAX_NICS, MAX_VCPUS};
use coffer_proto::vmm::{ControlError, Exit, Files, VmConfig, VsockConfig};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use vm_superio::Serial;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a VM can't be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("the VM configuration asks for {what} {value}, outside {low} to {high}")]
    OutOfRange {
        what: &'static str,
        value: u64,
        low: u64,
        high: u64,
    },
    #[error("a file of the VM configuration is missing")]
    Files(#[from] ControlError),
    #[error("this KVM lacks {0}")]
    Capability(&'static str),
    #[error("KVM refuses the {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("the {0} can't be made")]
    Device(
        &'static str,
        #[source] Box<dyn std::error::Error + Send + Sync>,
    ),
    #[error("vCPU {0} did not get ready: {1:?}")]
    NotReady(u8, Option<Exit>),
    #[error("{0} virtio devices need more interrupt lines than there are")]
    Interrupts(usize),
}

/// A VM with all its parts.
#[derive(Debug)]
pub struct Machine {
    pub vcpus: Vec<RunningVcpu>,
    pub slots: Vec<Arc<Slot>>,
    pub bus: Arc<Bus>,
    pub exits: Arc<ExitCounts>,
    pub notices: Receiver<Notice>,
    /// Wakes the event loop for notices and for device work.
    pub wake: Arc<EventFd>,
    /// Index in `slots` of the first network slot.
    first_nic: usize,
    nics: usize,
    /// The same of disks.
    first_disk: usize,
    disks: usize,
    /// Number of the latest wish of [`Machine::want`].
    pub wish: u64,
    /// Size that a file may get: of the largest disk the guest may write to, or of memory that is plugged later.
    pub largest_file: u64,
    /// Where the VM may grow.
    growth: Option<Growth>,
    vm: VmFd,
    /// Keeps guest memory for as long as vCPUs may run.
    _memory: Memory,
}

/// Limits that the machine itself has. The shim checked them too, but this is where they hold.
pub fn check(config: &VmConfig) -> Result<(), MachineError> {
    // 16 MiB: the kernel alone does not fit into less. 1 TiB: beyond what any host address width is asked for here.
    let ranges = [
        ("vCPUs", u64::from(config.vcpus), 1, u64::from(MAX_VCPUS)),
        ("MiB of memory", u64::from(config.memory_mib), 16, 1 << 20),
        (
            "MiB of memory at most",
            u64::from(config.max_memory_mib),
            0,
            1 << 20,
        ),
        (
            "network interfaces",
            config.nics.len() as u64,
            0,
            MAX_NICS as u64,
        ),
        ("disks", config.disks.len() as u64, 0, MAX_DISKS as u64),
    ];
    match ranges
        .into_iter()
        .find(|(_, value, low, high)| value < low || value > high)
    {
        Some((what, value, low, high)) => Err(MachineError::OutOfRange {
            what,
            value,
            low,
            high,
        }),
        None => Ok(()),
    }
}

/// Makes an empty VM from an open `/dev/kvm`.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    if let Some(missing) = vcpu::missing_capability(kvm) {
        return Err(MachineError::Capability(missing));
    }
    loop {
        match kvm.create_vm() {
            // KVM waits for a kernel thread here and can be interrupted.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(|error| MachineError::Kvm("virtual machine", error)),
        }
    }
}

impl Machine {
    /// Builds the whole machine. Its vCPUs have their threads and wait, paused.
    pub fn build(
        kvm: &Kvm,
        vm: VmFd,
        config: &VmConfig,
        files: &mut Files,
    ) -> Result<Self, MachineError> {
        // Guest RAM, known to KVM.
        let ram = memory::create(u64::from(config.memory_mib) << 20)?;
        memory::register(&ram, &vm)?;

        // Interrupt controllers, inside KVM. No PIT: Linux has kvm-clock and the TSC deadline timer, and a PIT would
        // let a guest keep a host kernel thread busy outside its cgroup.
        let refused = |what| move |error| MachineError::Kvm(what, error);
        vm.set_tss_address(KVM_TSS).map_err(refused("TSS pages"))?;
        vm.create_irq_chip()
            .map_err(refused("interrupt controllers"))?;

        // Devices, in the order the guest finds them.
        let (queue, notices) = mpsc::channel();
        let wake = Arc::new(event().map_err(device("event loop"))?);
        let ring =
            ConsoleRing::new(files.take(config.console)?.into()).map_err(device("console ring"))?;
        let ring = SharedRing(Arc::new(Mutex::new(ring)));
        let Devices {
            list,
            largest_file,
            growth,
            memory,
        } = devices(config, files, &ring, &ram)?;
        let first = |kind: &str| list.iter().position(|(name, _)| name.starts_with(kind));
        let (first_nic, first_disk) = (first("net"), first("disk"));
        let slots = attach(&vm, &memory, list, &wake)?;

        // Kernel, initrd, command line, MP table.
        let mut parameters: Vec<String> = (0..slots.len()).map(command_line_entry).collect();
        if growth.is_some() {
            parameters.push(growth::KERNEL_PARAMETERS.to_owned());
        }
        let command_line = boot::command_line(&parameters, &config.cmdline)?;
        let kernel = files.take(config.kernel)?.into();
        let initrd = files.take(config.initrd)?.into();
        let loaded = boot::load(&ram, kernel, initrd, &command_line, config.vcpus)?;

        // What vCPUs reach outside RAM. The serial port only where the command line wants it.
        let notice_sender = Notices::new(queue, wake.clone());
        let debug = command_line.contains("ttyS0") || command_line.contains("earlyprintk=serial");
        let serial = if debug {
            Some(serial_port(&vm, &ring)?)
        } else {
            None
        };
        let bus = Arc::new(Bus::new(slots.clone(), serial, notice_sender.clone()));

        // vCPUs and their threads, the first one at the kernel's entry; the others wait for the guest to start them.
        let exits = Arc::new(ExitCounts::default());
        let context = VcpuContext {
            bus: bus.clone(),
            notices: notice_sender,
            exits: exits.clone(),
        };
        let vcpus = start_vcpus(kvm, &vm, config.vcpus, &loaded, &context)?;

        Ok(Self {
            vcpus,
            slots,
            bus,
            exits,
            notices,
            wake,
            first_nic: first_nic.unwrap_or_default(),
            nics: config.nics.len(),
            first_disk: first_disk.unwrap_or_default(),
            disks: config.disks.len(),
            wish: 0,
            largest_file,
            growth,
            vm,
            _memory: memory,
        })
    }

    /// Waits until every vCPU thread stands ready, under its system call filter.
    pub fn wait_until_ready(&self) -> Result<(), MachineError> {
        let mut ready = 0;
        while ready < self.vcpus.len() {
            match self.notices.recv() {
                Ok(Notice::Finished { vcpu, exit }) => {
                    return Err(MachineError::NotReady(vcpu, exit));
                }
                Ok(_) => ready += 1,
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Tells all vCPUs what to do.
    pub fn want(&mut self, wanted: Wanted) {
        self.wish += 1;
        for vcpu in &self.vcpus {
            vcpu.want(wanted, self.wish);
        }
    }

    /// Asks the guest to have this much memory.
    pub fn resize_memory(&mut self, mib: u32) -> Result<(), MemoryError> {
        let bytes = u64::from(mib) << 20;
        match &mut self.growth {
            Some(growth) => growth.resize(&self.vm, bytes),
            None => Err(MemoryError::Fixed),
        }
    }

    /// The memory that the guest has now, in MiB, when it is at least what was asked for; told once.
    pub fn memory_reached(&self) -> Option<u32> {
        let bytes = self.growth.as_ref()?.reached()?;
        u32::try_from(bytes >> 20).ok()
    }

    /// The device of network slot `nic`.
    pub fn nic(&self, nic: u8) -> Option<usize> {
        (usize::from(nic) < self.nics).then(|| self.first_nic + usize::from(nic))
    }

    /// The device of disk slot `disk`.
    pub fn disk(&self, disk: u8) -> Option<usize> {
        (usize::from(disk) < self.disks).then(|| self.first_disk + usize::from(disk))
    }
}

fn device<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: &'static str,
) -> impl Fn(E) -> MachineError {
    move |error| MachineError::Device(what, error.into())
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

type NamedDevice = (String, Box<dyn VirtioDevice>);

/// What the guest will find.
struct Devices {
    list: Vec<NamedDevice>,
    /// Size that a file of theirs may get.
    largest_file: u64,
    growth: Option<Growth>,
    /// RAM, and the room for more.
    memory: Memory,
}

/// All virtio devices of the configuration, with the names that logs and counters use.
fn devices(
    config: &VmConfig,
    files: &mut Files,
    ring: &SharedRing,
    ram: &Memory,
) -> Result<Devices, MachineError> {
    let mut list: Vec<NamedDevice> = vec![
        ("console".into(), Box::new(Console::new(ring.clone()))),
        ("rng".into(), Box::new(Rng::default())),
    ];
    list.push(("vsock".into(), Box::new(vsock(&config.vsock, files)?)));
    if let Some(fs) = &config.fs {
        let fs = Fs::new(&fs.tag, files.take(fs.socket)?).map_err(device("file share"))?;
        list.push(("fs".into(), Box::new(fs)));
    }
    for (n, nic) in config.nics.iter().enumerate() {
        let tap = nic.tap.map(|tap| files.take(tap)).transpose()?;
        list.push((
            format!("net{n}"),
            Box::new(Net::new(nic.mac, tap).map_err(device("network interface"))?),
        ));
    }
    let mut largest_file = 0;
    for (n, disk) in config.disks.iter().enumerate() {
        let file = disk.file.map(|file| files.take(file)).transpose()?;
        let file = file.map(File::from);
        if let Some(file) = file.as_ref().filter(|_| !disk.read_only) {
            largest_file = largest_file.max(file.metadata().map_err(device("disk"))?.len());
        }
        let file = file.map(OwnedFd::from);
        let disk = Block::new(&disk.serial, file, disk.read_only).map_err(device("disk"))?;
        list.push((format!("disk{n}"), Box::new(disk)));
    }
    if config.balloon {
        list.push(("balloon".into(), Box::new(Balloon::new())));
    }
    let (growth, memory) = match Growth::reserve(ram, u64::from(config.max_memory_mib) << 20)? {
        Some((growth, memory, mem)) => {
            list.push(("mem".into(), Box::new(mem)));
            largest_file = largest_file.max(growth.size());
            (Some(growth), memory)
        }
        None => (None, ram.clone()),
    };
    Ok(Devices {
        list,
        largest_file,
        growth,
        memory,
    })
}

fn vsock(config: &VsockConfig, files: &mut Files) -> Result<Vsock, MachineError> {
    let listener = UnixListener::from(files.take(config.listener)?);
    let mut ports = Vec::with_capacity(config.ports.len());
    for port in &config.ports {
        ports.push((port.port, UnixStream::from(files.take(port.socket)?)));
    }
    let muxer = Muxer::new(config.guest_cid, listener, ports).map_err(device("vsock"))?;
    Ok(Vsock::new(config.guest_cid, muxer))
}

/// Gives each device its registers, its interrupt line, and an ioeventfd for each queue.
fn attach(
    vm: &VmFd,
    memory: &Memory,
    devices: Vec<NamedDevice>,
    wake: &Arc<EventFd>,
) -> Result<Vec<Arc<Slot>>, MachineError> {
    let count = devices.len();
    if count > (LAST_GSI - FIRST_VIRTIO_GSI + 1) as usize {
        return Err(MachineError::Interrupts(count));
    }
    let mut slots = Vec::with_capacity(count);
    for (n, (name, device_)) in devices.into_iter().enumerate() {
        let transport =
            Transport::new(device_, memory.clone()).map_err(device("device registers"))?;
        let refused = |what| move |error| MachineError::Kvm(what, error);
        vm.register_irqfd(transport.interrupt().line(), gsi(n))
            .map_err(refused("interrupt line"))?;
        let notify = IoEventAddress::Mmio(address(n) + QUEUE_NOTIFY);
        for (queue, event) in (0u32..).zip(transport.notify()) {
            vm.register_ioevent(event, &notify, queue)
                .map_err(refused("queue notification"))?;
        }
        slots.push(Arc::new(Slot::new(name, transport, wake.clone())));
    }
    Ok(slots)
}

/// Makes the vCPUs and their threads. The kernel that the first one will run is mapped into its page tables.
fn start_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    loaded: &Loaded,
    context: &VcpuContext,
) -> Result<Vec<RunningVcpu>, MachineError> {
    let supported = cpuid::supported(kvm);
    let supported = supported.map_err(|error| MachineError::Kvm("CPUID query", error))?;
    let made = (0..count).map(|id| Vcpu::new(vm, id, count, &supported));
    let mut vcpus = made.collect::<Result<Vec<_>, _>>()?;
    vcpus[0].enter_at(loaded.entry, START_INFO)?;
    for (start, size) in [loaded.kernel, loaded.initrd] {
        vcpus[0].map_ahead(start, size);
    }
    vcpu::install_kick_handler()?;
    let started = vcpus.into_iter().map(|vcpu| vcpu.start(context.clone()));
    Ok(started.collect::<Result<_, _>>()?)
}

fn address(device: usize) -> u64 {
    VIRTIO_MMIO.0 + device as u64 * VIRTIO_MMIO_SIZE
}

fn gsi(device: usize) -> u32 {
    FIRST_VIRTIO_GSI + device as u32
}

/// How the kernel learns of a device: size, address and interrupt line of its registers.
fn command_line_entry(device: usize) -> String {
    format!(
        "virtio_mmio.device=4K@{:#x}:{}",
        address(device),
        gsi(device)
    )
}

fn serial_port(vm: &VmFd, ring: &SharedRing) -> Result<SerialPort, MachineError> {
    let line = event().map_err(device("serial port"))?;
    vm.register_irqfd(&line, SERIAL_GSI)
        .map_err(|error| MachineError::Kvm("serial interrupt line", error))?;
    Ok(Serial::new(SerialLine(line), ring.clone()))
}
