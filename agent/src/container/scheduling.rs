//! Resource limits, I/O priority and scheduling policy of a process, set before it waits to be started.
#![allow(unsafe_code, reason = "system calls without wrapper")]

use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use oci_spec::runtime::{
    IOPriorityClass, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType,
    Process, Scheduler,
};

use super::failure::{Failure, at};

/// Sets what the spec says of the calling process.
pub fn apply(process: &Process) -> Result<(), Failure> {
    for limit in process.rlimits().iter().flatten() {
        set_rlimit(limit)?;
    }
    if let Some(priority) = process.io_priority() {
        set_io_priority(priority.class(), priority.priority())?;
    }
    match process.scheduler() {
        Some(scheduler) => set_scheduler(scheduler),
        None => Ok(()),
    }
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}

fn set_rlimit(limit: &PosixRlimit) -> Result<(), Failure> {
    let step = format!("set {} to {}:{}", limit.typ(), limit.soft(), limit.hard());
    setrlimit(resource(limit.typ()), limit.soft(), limit.hard()).map_err(at(step))
}

/// The ranges that the kernel would take silently or refuse without saying why.
pub fn check(process: &Process) -> Result<(), (&'static str, String)> {
    if let Some(priority) = process.io_priority()
        && !(0..=7).contains(&priority.priority())
    {
        return Err((
            "ioPriority.priority",
            format!("{} is not 0 to 7", priority.priority()),
        ));
    }
    let policy = process
        .scheduler()
        .as_ref()
        .map(|scheduler| *scheduler.policy());
    if policy == Some(LinuxSchedulerPolicy::SchedIso) {
        return Err(("scheduler.policy", "SCHED_ISO is not in Linux".into()));
    }
    Ok(())
}

fn set_io_priority(class: IOPriorityClass, priority: i64) -> Result<(), Failure> {
    // linux/ioprio.h
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_SHIFT: u32 = 13;
    let class: i64 = match class {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let value = (class << IOPRIO_CLASS_SHIFT) | priority;
    // SAFETY: three integers; 0 is the calling process.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) })
        .map(|_| ())
        .map_err(at("set process.ioPriority"))
}

fn set_scheduler(scheduler: &Scheduler) -> Result<(), Failure> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther | LinuxSchedulerPolicy::SchedIso => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    let attr = libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).unwrap_or_default(),
        sched_policy: policy.cast_unsigned(),
        sched_flags: flags,
        sched_nice: scheduler.nice().unwrap_or(0),
        sched_priority: scheduler.priority().unwrap_or(0).cast_unsigned(),
        sched_runtime: scheduler.runtime().unwrap_or(0),
        sched_deadline: scheduler.deadline().unwrap_or(0),
        sched_period: scheduler.period().unwrap_or(0),
    };
    // SAFETY: `attr` is a `struct sched_attr` that says its own size; 0 is the calling process.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(&attr), 0)
    })
    .map(|_| ())
    .map_err(at(format!(
        "set process.scheduler to {}",
        scheduler.policy()
    )))
}
