//! Hostile guests, as many as there are inputs. The same code replays the seeds as ordinary tests
//! (`hypervisor/tests/fuzz_seeds.rs`, `shim/tests/fuzz_seeds.rs`), so it uses only what a user of the crates can use.

mod agent;
mod control;
mod guest;
mod input;
mod targets;

pub use agent::agent;
pub use control::control;
pub use targets::{balloon, block, mem, mmio, net, vsock};
