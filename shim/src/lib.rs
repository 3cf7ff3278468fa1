//! The supervisor of one sandbox, and what its command lines share.
//!
//! ```text
//! Task RPC ─► task ─► sandbox ─► vmm   ══ socketpair ══► coffer-vmm | coffer-qemu
//!                        │  └──► agent ══ vsock ═══════► coffer-agent
//!                        └─────► io    ══ vsock ═══════► one connection per stdio stream
//! ```
//!
//! - [`machine`]: what a sandbox is asked to be, and the recipe that boots it.

pub mod machine;
