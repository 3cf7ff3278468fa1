//! The real `coffer-qemu` with a real QEMU under software emulation, and kernels of a few instructions. Needs root, and
//! no KVM.

#[allow(dead_code)] // Some of it only the tests of coffer-vmm use.
mod shim;

use coffer_proto::vmm::{Exit, FromVmm, Reply, Request};
use shim::code::elf;
use shim::{Setup, Vmm};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// `jmp $`
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `lidt [0x900000]`, where RAM is zero, then `ud2`: a triple fault, which is how a guest under QEMU resets.
const RESET: [u8; 9] = [0x0f, 0x01, 0x1d, 0, 0, 0x90, 0, 0x0f, 0x0b];

fn start(kernel: &[u8]) -> Vmm {
    Vmm::start(kernel, &|setup: &mut Setup| {
        setup.program = env!("CARGO_BIN_EXE_coffer-qemu");
        setup.config.kvm = None;
    })
}

fn boot(code: &[u8]) -> Vmm {
    let mut vmm = start(&elf(code));
    let reply = vmm.message();
    assert_eq!(reply, FromVmm::Reply(Reply::Done), "{}", vmm.log());
    vmm
}

/// The directory in /proc of the QEMU that this process started.
fn qemu_of(vmm: &Vmm) -> PathBuf {
    let pid = vmm.pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    PathBuf::from("/proc").join(children.trim())
}

fn wait_for_end_of(process: &std::path::Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while process.exists() {
        assert!(Instant::now() < deadline, "QEMU outlived coffer-qemu");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_guest_pauses_resumes_and_stops() {
    let mut vmm = boot(&SPIN);
    vmm.ask(&Request::Pause);
    vmm.ask(&Request::Resume);
    let metrics = vmm.metrics();
    assert!(metrics.private_rss > 0 && metrics.devices["vsock.connections"] == 0);
    vmm.ask(&Request::Stop);
    assert_eq!(vmm.until_exit().1, Exit::Stopped);
    assert!(vmm.wait().success());
}

#[test]
fn a_reset_of_the_guest_ends_the_vm() {
    let mut vmm = boot(&RESET);
    assert_eq!(vmm.until_exit().1, Exit::Reset);
    assert!(vmm.wait().success());
}

#[test]
fn the_end_of_the_shim_ends_both_processes() {
    let mut vmm = boot(&SPIN);
    let qemu = qemu_of(&vmm);
    vmm.hang_up();
    assert!(vmm.wait().success());
    wait_for_end_of(&qemu);
}

#[test]
fn a_qemu_that_dies_is_reported() {
    let mut vmm = boot(&SPIN);
    let pid = qemu_of(&vmm)
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let exit = vmm.until_exit().1;
    assert!(
        matches!(&exit, Exit::Failed { message } if message.contains("SIGKILL")),
        "{exit:?}"
    );
}

#[test]
fn neither_process_has_privileges() {
    let vmm = boot(&SPIN);
    let qemu = qemu_of(&vmm);
    for process in [PathBuf::from(format!("/proc/{}", vmm.pid())), qemu] {
        let status = std::fs::read_to_string(process.join("status")).unwrap();
        let field = |name: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap();
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(field("Uid:"), "64000 64000 64000 64000");
        assert_eq!(field("Gid:"), "64000 64000 64000 64000");
        assert_eq!(field("Groups:"), "");
        assert_eq!(
            (field("CapEff:"), field("CapPrm:")),
            ("0000000000000000".into(), "0000000000000000".into())
        );
        assert_eq!(
            (field("NoNewPrivs:"), field("Seccomp:")),
            ("1".into(), "2".into())
        );
        for namespace in ["net", "ipc", "uts"] {
            let theirs = std::fs::read_link(process.join("ns").join(namespace)).unwrap();
            let ours = std::fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
            assert_ne!(theirs, ours, "{namespace}");
        }
    }
}

#[test]
fn what_is_no_kernel_is_refused_in_qemus_words() {
    let mut vmm = start(&[0x55; 4096]);
    let reply = vmm.message();
    let FromVmm::Reply(Reply::Failed { message }) = &reply else {
        panic!("{reply:?}")
    };
    assert!(message.starts_with("QEMU did not start: "), "{message}");
    assert!(!vmm.wait().success());
}
