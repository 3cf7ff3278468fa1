//! Many lives, nothing left: the harness compares processes, mounts, cgroups, links, sockets and files.

use coffer_tests::{Test, asset, finish};

fn cycle(count: usize, name: &str) {
    let test = Test::new(name);
    let rootfs = asset("busybox");
    for i in 0..count {
        let text = i.to_string();
        let done =
            finish(test.run_command(&["--rootfs", rootfs.to_str().unwrap(), "--", "echo", &text]));
        assert_eq!(
            (done.code, done.text()),
            (0, text.as_str()),
            "cycle {i}: {}",
            done.stderr
        );
    }
    test.check_leaks().unwrap();
}

#[test]
fn five_cycles_leave_nothing() {
    cycle(5, "five");
}

/// The promise's number; runs with `cargo xtask test --heavy`.
#[test]
fn heavy_two_hundred_cycles_leave_nothing() {
    cycle(200, "cycles");
}
