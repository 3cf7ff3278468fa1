//! Pods through containerd's CRI plugin, with Coffer as a runtime handler: what a kubelet would ask, by a CRI client of our own.
//!
//! A node for every test costs much in emulation, so a test checks many things in one pod.

mod lifecycle;
mod many;
mod network;
mod resources;
mod security;
mod volumes;

/// The handler under test.
const COFFER: &str = "coffer";
/// A main process that ends when it is asked to.
const APP: &str = "trap 'exit 0' TERM; while :; do sleep 1; done";
