//! The seccomp filter of a container, compiled by libseccomp as in other runtimes, so profiles mean the same here.

#![allow(unsafe_code, reason = "seccomp(2) has no wrapper")]

use std::fs::File;
use std::io::{self, Read, Seek};

use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::failure::{Failure, at};

/// The errno of SCMP_ACT_ERRNO where the profile names none.
const DEFAULT_ERRNO: u32 = libc::EPERM.cast_unsigned();

/// A compiled profile.
#[derive(Debug)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    /// `SECCOMP_FILTER_FLAG_*`
    flags: libc::c_ulong,
}

/// Compiles the profile. Names that libseccomp doesn't know belong to other architectures or to newer kernels.
pub fn compile(profile: &LinuxSeccomp) -> Result<Filter, Failure> {
    let step = "compile linux.seccomp";
    let context = build(profile).map_err(|error| Failure::new(step, error.to_string()))?;
    let mut program = match action(profile.default_action(), None) {
        ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_) => Vec::new(),
        _ => unknown_calls(),
    };
    program.extend(export(&context).map_err(at(step))?);
    let flags = profile
        .flags()
        .iter()
        .flatten()
        .map(flag)
        .fold(0, |all, flag| all | flag);
    Ok(Filter { program, flags })
}

impl Filter {
    /// Loads the filter into the calling process.
    pub fn load(&self) -> Result<(), Failure> {
        let step = "load linux.seccomp";
        let length = u16::try_from(self.program.len());
        let program = libc::sock_fprog {
            len: length.map_err(|_| Failure::new(step, "it is too long"))?,
            filter: self.program.as_ptr().cast_mut(),
        };
        let operation = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: the program is of the length given and alive during the call; the kernel copies it.
        let result =
            unsafe { libc::syscall(libc::SYS_seccomp, operation, self.flags, &raw const program) };
        Errno::result(result).map(|_| ()).map_err(at(step))
    }
}

fn flag(flag: &LinuxSeccompFilterFlag) -> libc::c_ulong {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        // About waiting for a listener's answer, and listeners are refused.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    }
}

/// The filter's program, which libseccomp writes to a file only.
fn export(context: &ScmpFilterContext) -> io::Result<Vec<libc::sock_filter>> {
    let mut file = File::from(memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC)?);
    context.export_bpf(&file).map_err(io::Error::other)?;
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let instruction = |b: &[u8]| libc::sock_filter {
        code: u16::from_ne_bytes([b[0], b[1]]),
        jt: b[2],
        jf: b[3],
        k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
    };
    Ok(bytes.chunks_exact(8).map(instruction).collect())
}

/// A beginning that answers ENOSYS to system calls newer than this libseccomp. No profile can allow those, and programs
/// try newer calls first and fall back on ENOSYS, but not on the EPERM of a profile.
fn unknown_calls() -> Vec<libc::sock_filter> {
    /// linux/audit.h
    const ARCHITECTURES: [(ScmpArch, u32); 2] =
        [(ScmpArch::X8664, 0xc000_003e), (ScmpArch::X86, 0x4000_0003)];
    /// Calls of the x32 ABI have this bit in their number and are libseccomp's to judge.
    const X32_BIT: u32 = 0x4000_0000;
    /// Above what any kernel has, below what makes the search long.
    const SEARCH_FROM: i32 = 1023;
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    // Offsets into `struct seccomp_data`.
    let (number, architecture) = (0, 4);
    let is_known = |arch: ScmpArch, call: &i32| {
        ScmpSyscall::from_raw_syscall(*call)
            .get_name_by_arch(arch)
            .is_ok()
    };
    let mut code = Vec::new();
    for (arch, audit) in ARCHITECTURES {
        let Some(newest) = (0..SEARCH_FROM).rev().find(|call| is_known(arch, call)) else {
            continue;
        };
        code.extend([
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, architecture),
            jump(libc::BPF_JEQ, audit, 0, 4),
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, number),
            jump(libc::BPF_JGE, X32_BIT, 2, 0),
            jump(libc::BPF_JGT, newest.cast_unsigned(), 0, 1),
            statement(libc::BPF_RET | libc::BPF_K, enosys),
        ]);
    }
    code
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

fn jump(condition: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter {
        jt,
        jf,
        ..statement(libc::BPF_JMP | condition | libc::BPF_K, k)
    }
}

fn build(profile: &LinuxSeccomp) -> Result<ScmpFilterContext, SeccompError> {
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut filter = ScmpFilterContext::new(default)?;
    for arch in profile
        .architectures()
        .iter()
        .flatten()
        .map(|arch| architecture(*arch))
    {
        if !filter.is_arch_present(arch)? {
            filter.add_arch(arch)?;
        }
    }
    for rule in profile.syscalls().iter().flatten() {
        add_rule(&mut filter, rule, default)?;
    }
    Ok(filter)
}

fn add_rule(
    filter: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), SeccompError> {
    let action = action(rule.action(), rule.errno_ret());
    // libseccomp refuses a rule that does what happens anyway.
    if action == default {
        return Ok(());
    }
    let args = rule.args().as_deref().unwrap_or_default();
    let mut indices: Vec<usize> = args.iter().map(LinuxSeccompArg::index).collect();
    indices.sort_unstable();
    let repeated = indices.windows(2).any(|pair| pair[0] == pair[1]);
    for name in rule.names() {
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            continue;
        };
        if args.is_empty() {
            filter.add_rule(action, syscall)?;
        } else if repeated {
            // One rule can compare an argument only once; several comparisons of one are alternatives, as in runc.
            for arg in args {
                filter.add_rule_conditional(action, syscall, &[comparison(arg)])?;
            }
        } else {
            let all: Vec<ScmpArgCompare> = args.iter().map(comparison).collect();
            filter.add_rule_conditional(action, syscall, &all)?;
        }
    }
    Ok(())
}

fn action(action: LinuxSeccompAction, value: Option<u32>) -> ScmpAction {
    let value = value.unwrap_or(DEFAULT_ERRNO);
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(value.cast_signed()),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(value).unwrap_or(u16::MAX))
        }
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        // Validation has refused it.
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
    }
}

fn comparison(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let second = arg.value_two().unwrap_or(0);
    let (op, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // `value` is the mask, `valueTwo` what has to be left.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(arg.value()), second),
    };
    let index = u32::try_from(arg.index()).unwrap_or(u32::MAX);
    ScmpArgCompare::new(index, op, value)
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}
