//! The memory of a VM, which follows the limits of its containers.

use coffer_tests::{Background, Test, wait_for};

/// The guest's memory, in MiB.
fn total(sandbox: &Background<'_>) -> u64 {
    let line = sandbox.sh("grep MemTotal: /proc/meminfo");
    let kib = line.split_ascii_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() / 1024
}

#[test]
fn memory_comes_and_goes_with_the_limits() {
    let test = Test::new("memory");
    let sandbox = test.background(&["--memory", "64m"], &["sleep", "600"]);
    let boot = total(&sandbox);
    assert!(boot < 192, "{boot} MiB");
    test.ok(&["update", "--memory", "512m", &sandbox.id]);
    if test.hypervisor() == "qemu" {
        assert_eq!(total(&sandbox), boot);
        return;
    }
    // A little of it is the kernel's, which keeps books of each page.
    let grown = total(&sandbox);
    assert!(
        (boot + 440..=boot + 448).contains(&grown),
        "{boot} MiB, then {grown} MiB"
    );
    assert_eq!(
        sandbox.sh("dd if=/dev/zero bs=200M count=1 | wc -c").trim(),
        "209715200"
    );
    test.ok(&["update", "--memory", "64m", &sandbox.id]);
    wait_for("the VM to give its memory back", || {
        total(&sandbox) <= boot + 8
    });
    assert_eq!(sandbox.sh("echo alive").trim(), "alive");
    // And once more, with what is left of the first time.
    test.ok(&["update", "--memory", "256m", &sandbox.id]);
    assert!(total(&sandbox) >= boot + 184);
}
