//! Replays the seeds of the fuzz targets, and whatever once made one of them fail. Needs root for the tap.

#[path = "../../fuzz/src/guest.rs"]
mod guest;
#[path = "../../fuzz/src/targets.rs"]
mod targets;

use std::path::Path;

fn replay(target: &str, run: impl Fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/seeds")
        .join(target);
    let mut count = 0;
    for seed in std::fs::read_dir(&seeds).expect("the seeds are part of the sources") {
        let path = seed.expect("a seed").path();
        println!("{}", path.display());
        let input = std::fs::read(&path).expect("a seed");
        run(&input);
        // What a torn input leads to.
        run(&input[..input.len() / 2]);
        count += 1;
    }
    assert!(count > 0, "no seeds in {}", seeds.display());
}

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
fn mmio() {
    replay("mmio", targets::mmio);
}

#[test]
fn vsock() {
    replay("vsock", targets::vsock);
}
