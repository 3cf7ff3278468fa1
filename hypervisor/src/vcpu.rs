//! A vCPU and its thread.
//!
//! ```text
//!            ┌──── Pause ◄───┐
//!            ▼               │
//!  start → Paused ─ Run ─► Running ─ guest ended, KVM failed ─► Finished
//!            │               │                                    ▲
//!            └── Finish ─────┴────────────────────────────────────┘
//! ```
//!
//! Others only store what they want ([`Wanted`]) and kick the thread: a real-time signal, whose handler sets
//! `immediate_exit` of this thread's `kvm_run`. A signal that comes before KVM_RUN so makes it return at once, and one
//! that comes inside interrupts it; the wish is stored before the signal is sent, so no kick is ever lost.
//! What a vCPU has to tell goes to the main loop as a [`Notice`].

use crate::bus::Bus;
use crate::cpuid;
use crate::exits::{ExitCounts, ExitKind, is_interruption};
use crate::notice::{Notice, Notices};
use crate::seccomp::{self, ThreadClass};
use coffer_proto::error_chain::chain;
use coffer_proto::vmm::Exit;
use kvm_bindings::{CpuId, KVMIO, Msrs, kvm_msr_entry, kvm_pre_fault_memory, kvm_segment};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use std::cell::Cell;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use vm_memory::GuestAddress;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Why a vCPU can't be made.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("KVM can't make vCPU {0}")]
    Create(u8, #[source] kvm_ioctls::Error),
    #[error("KVM refuses the {1} of vCPU {0}")]
    Setup(u8, &'static str, #[source] kvm_ioctls::Error),
    #[error("the thread of vCPU {0} can't be started")]
    Thread(u8, #[source] io::Error),
    #[error("the signal that interrupts vCPUs can't be set up")]
    Signal(#[source] vmm_sys_util::errno::Error),
}

/// What the main loop wants of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Run,
    Pause,
    Finish,
}

/// What a vCPU's thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the guest, or handling an exit.
    Running,
    /// Waits for another wish.
    Paused,
    /// The thread ends.
    Finished,
}

/// The latest wish and its number, so that an answer to an older one is not taken for one to it.
#[derive(Debug)]
struct Wish {
    latest: Mutex<(Wanted, u64)>,
    changed: Condvar,
}

impl Wish {
    fn lock(&self) -> MutexGuard<'_, (Wanted, u64)> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A vCPU that has no thread yet.
#[derive(Debug)]
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
}

/// What all vCPU threads of a VM share.
#[derive(Debug, Clone)]
pub struct VcpuContext {
    pub bus: Arc<Bus>,
    pub notices: Notices,
    pub exits: Arc<ExitCounts>,
}

/// A vCPU with its thread, as the main loop holds it.
#[derive(Debug)]
pub struct RunningVcpu {
    wish: Arc<Wish>,
    thread: JoinHandle<()>,
}

/// Guest pages, as KVM maps them at least.
const PAGE: u64 = 4096;

nix::ioctl_readwrite!(pre_fault_memory, KVMIO, 0xd5, kvm_pre_fault_memory);

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, for the signal handler.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

#[allow(unsafe_code)]
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: the pointer is this thread's own and is cleared before its VcpuFd, which maps it, is dropped.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

/// Installs the handler of the kick signal, once for the process.
pub fn install_kick_handler() -> Result<(), VcpuError> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(VcpuError::Signal)
}

impl Vcpu {
    /// Makes the vCPU in KVM with its CPUID and MSRs. The VM has its interrupt controllers already.
    pub fn new(vm: &VmFd, id: u8, count: u8, supported: &CpuId) -> Result<Self, VcpuError> {
        let fd = vm
            .create_vcpu(u64::from(id))
            .map_err(|error| VcpuError::Create(id, error))?;
        let refused = |what| move |error| VcpuError::Setup(id, what, error);
        // Before any MSR: KVM hides those whose feature CPUID does not list.
        fd.set_cpuid2(&cpuid::for_vcpu(supported, id, count))
            .map_err(refused("CPUID"))?;
        fd.set_msrs(&boot_msrs()).map_err(refused("MSRs"))?;
        Ok(Self { id, fd })
    }

    /// Sets the registers of the boot CPU for PVH: flat 32-bit protected mode, EBX = start info.
    pub fn enter_at(
        &mut self,
        entry: GuestAddress,
        start_info: GuestAddress,
    ) -> Result<(), VcpuError> {
        let refused = |what| move |error| VcpuError::Setup(0, what, error);
        let mut sregs = self.fd.get_sregs().map_err(refused("segments"))?;
        let flat = kvm_segment {
            limit: u32::MAX,
            present: 1,
            s: 1,
            g: 1,
            db: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            type_: 3,
            selector: 0x10,
            ..flat
        };
        sregs.cs = kvm_segment {
            type_: 11,
            selector: 0x8,
            ..flat
        };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        // A busy 32-bit TSS, which VM entry wants.
        sregs.tr = kvm_segment {
            type_: 11,
            limit: 0x67,
            present: 1,
            selector: 0x18,
            ..Default::default()
        };
        sregs.cr0 = 1;
        sregs.cr4 = 0;
        self.fd.set_sregs(&sregs).map_err(refused("segments"))?;
        let mut regs = self.fd.get_regs().map_err(refused("registers"))?;
        (regs.rip, regs.rbx, regs.rflags) = (entry.0, start_info.0, 2);
        self.fd.set_regs(&regs).map_err(refused("registers"))
    }

    /// Maps guest memory that is loaded already into the guest's page tables, so that it isn't faulted in page by page,
    /// each with an exit, which is dear where this host is itself a VM. A KVM without KVM_PRE_FAULT_MEMORY (Linux 6.11)
    /// or without two-dimensional paging does without.
    #[allow(unsafe_code)]
    pub fn map_ahead(&self, start: GuestAddress, size: u64) {
        let mut range = kvm_pre_fault_memory {
            gpa: start.0 / PAGE * PAGE,
            size: (start.0 % PAGE + size).next_multiple_of(PAGE),
            ..Default::default()
        };
        while range.size > 0 {
            // SAFETY: the descriptor is a vCPU, and the structure is the one this ioctl reads and writes.
            if unsafe { pre_fault_memory(self.fd.as_raw_fd(), &raw mut range) }.is_err() {
                return;
            }
        }
    }

    /// Starts the thread, paused. It installs its seccomp filter before it first enters the guest.
    pub fn start(self, context: VcpuContext) -> Result<RunningVcpu, VcpuError> {
        let wish = Arc::new(Wish {
            latest: Mutex::new((Wanted::Pause, 0)),
            changed: Condvar::new(),
        });
        let (id, shared) = (self.id, wish.clone());
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || self.thread(&context, &shared))
            .map_err(|error| VcpuError::Thread(id, error))?;
        Ok(RunningVcpu { wish, thread })
    }

    fn thread(mut self, context: &VcpuContext, wish: &Wish) {
        let filtered = seccomp::enter(ThreadClass::Vcpu).map_err(|error| chain(&error));
        let exit = match filtered.and_then(|()| self.first_entry()) {
            Ok(()) => self.live(context, wish),
            Err(message) => Some(Exit::Failed { message }),
        };
        let vcpu = self.id;
        context.notices.send(Notice::Finished { vcpu, exit });
    }

    /// From the first pause to the end; gives how the guest ended, if it was this vCPU that ended it.
    fn live(&mut self, context: &VcpuContext, wish: &Wish) -> Option<Exit> {
        let mut exit = None;
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        let mut state = State::Paused;
        while state != State::Finished {
            state = match state {
                State::Running => self.run(context, wish, &mut exit),
                State::Paused => self.wait(context, wish),
                State::Finished => State::Finished,
            };
        }
        IMMEDIATE_EXIT.set(ptr::null_mut());
        exit
    }

    /// Enters KVM, but not yet the guest: the first KVM_RUN of a VM starts a kernel thread on our account, which the
    /// process limit of the jail would refuse afterwards.
    fn first_entry(&mut self) -> Result<(), String> {
        if self.id != 0 {
            return Ok(());
        }
        self.fd.set_kvm_immediate_exit(1);
        let entered = match self.fd.run() {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            other => Err(format!("the first KVM_RUN gave {other:?}")),
        };
        self.fd.set_kvm_immediate_exit(0);
        entered
    }

    fn wait(&self, context: &VcpuContext, wish: &Wish) -> State {
        let mut latest = wish.lock();
        let mut told = None;
        loop {
            match *latest {
                (Wanted::Run, _) => break,
                (Wanted::Finish, _) => return State::Finished,
                (Wanted::Pause, wish) if told != Some(wish) => {
                    told = Some(wish);
                    context.notices.send(Notice::Paused {
                        vcpu: self.id,
                        wish,
                    });
                }
                (Wanted::Pause, _) => {
                    latest = wish
                        .changed
                        .wait(latest)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
        drop(latest);
        // The guest's soft-lockup detector must not count the time. Refused before the guest uses kvm-clock.
        let _ = self.fd.kvmclock_ctrl();
        State::Running
    }

    /// Enters the guest once and handles its exit.
    fn run(&mut self, context: &VcpuContext, wish: &Wish, exit: &mut Option<Exit>) -> State {
        let (id, bus) = (self.id, &context.bus);
        let failed = |message: String| Some(Exit::Failed { message });
        let left = self.fd.run();
        context.exits.count(ExitKind::of(&left));
        match left {
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => bus.port_write(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            // With the local APIC in the kernel, HLT stays there; without one nothing could ever wake the vCPU.
            Ok(VcpuExit::Hlt) => *exit = failed(format!("vCPU {id} halted for good")),
            Ok(VcpuExit::Shutdown) => {
                crate::report(&format!("vCPU {id}: triple fault, {}", self.registers()));
                *exit = Some(Exit::TripleFault);
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let why = format!("KVM could not enter vCPU {id} on CPU {cpu}: {reason:#x}");
                *exit = failed(why);
            }
            Ok(VcpuExit::InternalError) => {
                let why = self.internal_error();
                *exit = failed(format!("KVM gave up on vCPU {id}: {why}"));
            }
            Ok(other) => {
                let why = format!("vCPU {id} ended in an exit this VMM does not know: {other:?}");
                *exit = failed(why);
            }
            Err(error) if is_interruption(error) => self.fd.set_kvm_immediate_exit(0),
            Err(error) => *exit = failed(format!("KVM_RUN of vCPU {id} failed: {error}")),
        }
        if exit.is_some() {
            return State::Finished;
        }
        match wish.lock().0 {
            Wanted::Run => State::Running,
            Wanted::Pause => State::Paused,
            Wanted::Finish => State::Finished,
        }
    }

    /// Where the guest was, for the log of a crash.
    fn registers(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => format!(
                "rip={:#x} rsp={:#x} rflags={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} rdi={:#x} cr0={:#x} \
                 cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x} cs={:#x} idt={:#x}+{:#x}",
                r.rip,
                r.rsp,
                r.rflags,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer,
                s.cs.selector,
                s.idt.base,
                s.idt.limit
            ),
            _ => "its registers can't be read".to_owned(),
        }
    }

    #[allow(unsafe_code)]
    fn internal_error(&mut self) -> String {
        // SAFETY: KVM filled this member of the union, because the exit reason is KVM_EXIT_INTERNAL_ERROR; plain integers.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let count = (error.ndata as usize).min(error.data.len());
        format!(
            "suberror {}, data {:x?}, {}",
            error.suberror,
            &error.data[..count],
            self.registers()
        )
    }
}

impl RunningVcpu {
    /// Tells the thread what to do from now on; `wish` numbers it. [`Notice::Paused`] and [`Notice::Finished`] say when
    /// it does.
    pub fn want(&self, wanted: Wanted, wish: u64) {
        *self.wish.lock() = (wanted, wish);
        self.wish.changed.notify_all();
        if wanted != Wanted::Run && !self.thread.is_finished() {
            // Fails only if the thread is gone, and then it runs no more, which is what a kick is for.
            let _ = self.thread.kill(SIGRTMIN());
        }
    }
}

/// MSRs that firmware would have set: fast string instructions on, memory type write-back by default.
fn boot_msrs() -> Msrs {
    const MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRING: u64 = 1;
    const MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[
        entry(MISC_ENABLE, FAST_STRING),
        entry(MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ])
    .expect("two entries of at most 512")
}

/// Whether this KVM has what the vCPU loop builds on.
pub fn missing_capability(kvm: &Kvm) -> Option<&'static str> {
    [
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    ]
    .into_iter()
    .find_map(|(cap, name)| (!kvm.check_extension(cap)).then_some(name))
}
