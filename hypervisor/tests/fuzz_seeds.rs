//! The seeds of the fuzz targets as tests. Needs root for the tap.

#[path = "../../fuzz/src/control.rs"]
mod control;
#[path = "../../fuzz/src/guest.rs"]
mod guest;
#[path = "../../fuzz/src/input.rs"]
mod input;
#[path = "../../fuzz/src/seeds.rs"]
mod seeds;
#[path = "../../fuzz/src/targets.rs"]
mod targets;

use seeds::replay;

#[test]
fn block() {
    replay("block", targets::block);
}

#[test]
fn net() {
    replay("net", targets::net);
}

#[test]
fn balloon() {
    replay("balloon", targets::balloon);
}

#[test]
fn mem() {
    replay("mem", targets::mem);
}

#[test]
fn mmio() {
    replay("mmio", targets::mmio);
}

#[test]
fn vsock() {
    replay("vsock", targets::vsock);
}

#[test]
fn control_messages() {
    replay("control", control::control);
}
