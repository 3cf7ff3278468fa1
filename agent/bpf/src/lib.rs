//! Short eBPF programs, put together at run time, and the calls of bpf(2) that load and attach them.
//!
//! The agent decides about a container's devices with one, the shim about connections to loopback in a pod's network
//! namespace. Both are some dozen instructions that depend on what was asked for, so there is neither a compiler nor an object file:
//! [`Instruction`]s go into [`Program::load`], and the kernel's verifier has the last word.

mod instruction;
mod syscall;

pub use instruction::{Helper, Instruction, Register, slots};
pub use syscall::{Kind, Link, Program, SocketMap};
