//! The real `coffer-vmm`, jail and all, with kernels of a few instructions: a PVH vmlinux can be that small, and a KVM
//! that can't run Linux still runs these.

mod shim;

use coffer_proto::limits::{MAX_BOOT_PHASES, MAX_DISKS};
use coffer_proto::vmm::{DiskConfig, Event, Exit, FdIndex, FromVmm, Reply, Request};
use shim::code::{
    HALT, KNOCK, RESET, SPIN, again, bring_up, load, out_eax, phase, program, registers, store,
};
use shim::{Setup, Supervisor, Vmm};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

fn phases(events: &[Event]) -> Vec<u32> {
    events
        .iter()
        .filter_map(|event| {
            if let Event::Phase { phase, .. } = event {
                Some(*phase)
            } else {
                None
            }
        })
        .collect()
}

#[test]
fn the_boot_timer_is_told_and_the_reset_pulse_ends_the_vm() {
    let mut vmm = Vmm::boot(&program(&[&phase(1), &phase(77), &RESET, &SPIN]));
    let (events, exit) = vmm.until_exit();
    assert_eq!((phases(&events), exit), (vec![1, 77], Exit::Reset));
    assert!(vmm.wait().success());
}

#[test]
fn device_registers_answer_and_empty_addresses_read_as_ones() {
    // `in al, 0x99; movzx eax, al`
    let port = [0xe4, 0x99, 0x0f, 0xb6, 0xc0];
    let (magic, kind) = (load(0xc000_0000), load(0xc000_0008));
    let reads =
        [&magic[..], &kind, &load(0xd000_0000), &port].map(|read| [read, &out_eax()].concat());
    let mut vmm = Vmm::boot(&program(&[&reads.concat(), &RESET, &SPIN]));
    let (events, exit) = vmm.until_exit();
    // "virt"; the first device is a console.
    assert_eq!(phases(&events), [0x7472_6976, 3, 0xffff_ffff, 0xff]);
    assert_eq!(exit, Exit::Reset);
}

#[test]
fn a_driver_can_bring_a_device_up_and_reset_it() {
    let status = 0xc000_0070;
    let up = [
        store(status, 1),
        store(status, 3),
        store(0xc000_0024, 1),
        store(0xc000_0020, 1),
    ];
    // DRIVER_OK without a queue is legal.
    let ok = [
        store(status, 11),
        store(status, 15),
        load(status),
        out_eax(),
    ];
    let down = [store(status, 0), load(status), out_eax()];
    let mut vmm = Vmm::boot(&program(&[
        &up.concat(),
        &ok.concat(),
        &down.concat(),
        &RESET,
        &SPIN,
    ]));
    let (events, _) = vmm.until_exit();
    assert_eq!(
        phases(&events),
        [15, 0],
        "the main thread did the work before the vCPU went on"
    );
}

#[test]
fn an_empty_disk_slot_is_no_device_until_it_is_filled_and_after_it_is_emptied() {
    // Console, rng and vsock come before.
    let kind = load(registers(3) + 8);
    // `test eax, eax`, then `jz` or `jnz` back to the load.
    let until_there = [&kind[..], &[0x85, 0xc0, 0x74, 0xf7]].concat();
    let until_gone = [&kind[..], &[0x85, 0xc0, 0x75, 0xf7]].concat();
    let seen = [&until_there[..], &out_eax()].concat();
    let code = program(&[&phase(9), &seen, &until_gone, &phase(7), &RESET, &SPIN]);
    let mut vmm = Vmm::boot_with(&code, |config| {
        let slot = |n| DiskConfig {
            serial: format!("slot-{n}"),
            file: None,
            read_only: false,
        };
        config.disks = (0..MAX_DISKS).map(slot).collect();
    });
    assert_eq!(phases(&[vmm.event()]), [9]);
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(1 << 20).unwrap();
    let attach = |slot| Request::AttachDisk {
        slot,
        file: FdIndex(0),
    };
    let done = FromVmm::Reply(Reply::Done);
    assert_eq!(vmm.ask_with(&attach(0), &[disk.as_fd()]), done);
    assert_eq!(phases(&[vmm.event()]), [2], "a block device");
    for wrong in [0, MAX_DISKS as u8] {
        let refused = vmm.ask_with(&attach(wrong), &[disk.as_fd()]);
        assert!(matches!(refused, FromVmm::Reply(Reply::Failed { .. })));
    }
    vmm.ask(&Request::DetachDisk { slot: 0 });
    assert_eq!(phases(&[vmm.event()]), [7]);
    assert_eq!(vmm.until_exit().1, Exit::Reset);
}

#[test]
fn only_so_many_phases_are_told() {
    let many: Vec<u8> = (0..MAX_BOOT_PHASES as u32 + 5).flat_map(phase).collect();
    let mut vmm = Vmm::boot(&program(&[&many, &RESET, &SPIN]));
    let (events, _) = vmm.until_exit();
    assert_eq!(phases(&events).len(), MAX_BOOT_PHASES);
}

#[test]
fn a_triple_fault_is_told_apart_from_a_reset() {
    // `lidt [0x900000]`, where RAM is zero, then an exception: `ud2`.
    let mut vmm = Vmm::boot(&program(&[
        &[0x0f, 0x01, 0x1d, 0, 0, 0x90, 0],
        &[0x0f, 0x0b],
        &SPIN,
    ]));
    let (_, exit) = vmm.until_exit();
    assert_eq!(exit, Exit::TripleFault);
    assert!(vmm.log().contains("triple fault, rip="), "{}", vmm.log());
}

#[test]
fn spinning_and_halted_guests_pause_resume_and_stop() {
    for code in [&SPIN[..], &HALT] {
        let mut vmm = Vmm::boot(&program(&[&phase(1), code]));
        vmm.event();
        for _ in 0..3 {
            vmm.ask(&Request::Pause);
            vmm.ask(&Request::Resume);
        }
        let metrics = vmm.metrics();
        assert_eq!(metrics.exits["io_out"], 1);
        assert!(metrics.phases["agent_ready"] >= metrics.phases["vm_created"]);
        assert!(metrics.vm_created_cpu_us > 0 && metrics.private_rss > 0);
        vmm.ask(&Request::Stop);
        assert_eq!(vmm.until_exit().1, Exit::Stopped);
        assert!(vmm.wait().success());
    }
}

#[test]
fn a_paused_guest_does_nothing() {
    let mut vmm = Vmm::boot(&program(&[&phase(1), &KNOCK]));
    vmm.event();
    vmm.ask(&Request::Pause);
    let before = vmm.metrics().exits["io_out"];
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(vmm.metrics().exits["io_out"], before);
    vmm.ask(&Request::Resume);
    let deadline = Instant::now() + Duration::from_secs(10);
    while vmm.metrics().exits["io_out"] == before {
        assert!(Instant::now() < deadline, "the guest did not go on");
    }
    assert!(vmm.metrics().devices["bus.unanswered"] > 0);
}

/// The guest breaks a queue, resets the device, and breaks it again, for ever.
#[test]
fn a_queue_that_is_broken_again_and_again_fills_no_log() {
    const RNG: u32 = 1;
    let available_index = 0x80_0000 + RNG * 0x1_0000 + 0x1002;
    let round = [
        bring_up(RNG, 1),
        // `mov word [address], 0x7fff`
        [
            &[0x66, 0xc7, 0x05][..],
            &available_index.to_le_bytes(),
            &[0xff, 0x7f],
        ]
        .concat(),
        store(registers(RNG) + 0x50, 0),
        // Until DEVICE_NEEDS_RESET: `test dword [status], 64; jz $-10`
        [
            &[0xf7, 0x05][..],
            &(registers(RNG) + 0x70).to_le_bytes(),
            &[64, 0, 0, 0, 0x74, 0xf4],
        ]
        .concat(),
        store(registers(RNG) + 0x70, 0),
        out_eax(),
    ]
    .concat();
    let mut vmm = Vmm::boot(&program(&[&again(&round)]));
    // Each round writes the boot timer, which is told only so often.
    for _ in 0..MAX_BOOT_PHASES {
        vmm.event();
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while vmm.log().lines().count() < 16 {
        assert!(Instant::now() < deadline, "{}", vmm.log());
    }
    std::thread::sleep(Duration::from_millis(50));
    vmm.ask(&Request::Stop);
    assert_eq!(vmm.until_exit().1, Exit::Stopped);
    let log = vmm.log();
    assert_eq!(log.lines().count(), 16, "{log}");
    assert!(
        log.contains("rng: ") && log.contains("a ring of the queue can't be used"),
        "{log}"
    );
}

#[test]
fn the_serial_port_is_there_for_debugging_only() {
    // `mov edx, 0x3f8`, then `mov al, letter; out dx, al` twice.
    let hello = [0xba, 0xf8, 0x03, 0, 0, 0xb0, b'h', 0xee, 0xb0, b'i', 0xee];
    let kernel = program(&[&hello, &RESET, &SPIN]);
    for (command_line, expected) in [("console=ttyS0", "hi"), ("quiet", "")] {
        let mut vmm = Vmm::boot_with(&kernel, |config| config.cmdline = command_line.into());
        assert_eq!(vmm.until_exit().1, Exit::Reset);
        assert_eq!(vmm.console(), expected, "with {command_line}");
    }
}

#[test]
fn all_vcpus_pause_while_the_others_wait_for_their_start() {
    let mut vmm = Vmm::boot_with(&program(&[&phase(1), &SPIN]), |config| config.vcpus = 4);
    vmm.event();
    vmm.ask(&Request::Pause);
    vmm.ask(&Request::Resume);
    vmm.ask(&Request::Stop);
    assert_eq!(vmm.until_exit().1, Exit::Stopped);
}

#[test]
fn the_end_of_the_shim_ends_the_vmm() {
    let mut vmm = Vmm::boot(&program(&[&phase(1), &SPIN]));
    vmm.event();
    vmm.hang_up();
    assert!(vmm.wait().success());
}

#[test]
fn the_end_of_the_shims_process_ends_the_vmm_though_its_socket_stays_open() {
    let supervisor = std::rc::Rc::new(Supervisor::new());
    let mut vmm = Vmm::start(&program(&[&phase(1), &SPIN]), &|setup: &mut Setup| {
        let supervisor = supervisor.clone();
        setup.control = Box::new(move || supervisor.control());
    });
    assert_eq!(vmm.message(), FromVmm::Reply(Reply::Done));
    vmm.event();
    supervisor.die();
    assert_eq!(vmm.until_exit().1, Exit::Stopped);
    assert!(vmm.wait().success());
}

#[test]
fn the_process_is_locked_up() {
    let mut vmm = Vmm::boot(&program(&[&phase(1), &SPIN]));
    vmm.event();
    let process = format!("/proc/{}", vmm.pid());
    for thread in std::fs::read_dir(format!("{process}/task")).unwrap() {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status
                .lines()
                .find(|line| line.starts_with(name))
                .unwrap_or_else(|| panic!("no {name}"));
            line[name.len()..]
                .split_ascii_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(field("Uid:"), ["64000"; 4]);
        assert_eq!(field("Gid:"), ["64000"; 4]);
        assert!(field("Groups:").is_empty());
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set)[0], 16).unwrap(), 0, "{set}");
        }
        assert_eq!(field("NoNewPrivs:"), ["1"]);
        assert_eq!(field("Seccomp:"), ["2"]);
    }
    assert_eq!(
        std::fs::read_dir(format!("{process}/root"))
            .unwrap()
            .count(),
        0,
        "the root is not empty"
    );
    for namespace in ["mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |process: &str| std::fs::read_link(format!("{process}/ns/{namespace}")).unwrap();
        assert_ne!(of(&process), of("/proc/self"), "{namespace}");
    }
    let limits = std::fs::read_to_string(format!("{process}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..]
            .split_whitespace()
            .nth(1)
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        (
            limit("Max processes").as_str(),
            limit("Max core file size").as_str()
        ),
        ("0", "0")
    );
    let log = vmm.log_path();
    for file in std::fs::read_dir(format!("{process}/fd")).unwrap() {
        let target = std::fs::read_link(file.unwrap().path()).unwrap();
        let known = [
            "/dev/null",
            "socket:",
            "anon_inode:",
            "pidfd:",
            "/memfd:",
            "pipe:",
            "/dev/kvm",
            "/proc/",
            "/tmp/.tmp",
            "/tmp/#",
        ];
        let text = target.to_string_lossy();
        assert!(
            known.iter().any(|start| text.starts_with(start)) || target == log,
            "{text} is open"
        );
    }
}

#[test]
fn what_can_not_boot_is_refused_with_one_clear_line() {
    type Change = fn(&mut Setup);
    let good = program(&[&SPIN]);
    let without_note = elf_without_note(&good);
    let same: Change = |_| {};
    let cases: [(&[u8], Change, &str); 8] = [
        (&good[..100], same, "the kernel can't be loaded"),
        (&good[..good.len() - 1], same, "the kernel can't be loaded"),
        (b"", same, "the kernel can't be loaded"),
        (&without_note, same, "CONFIG_PVH"),
        (&good, |setup| setup.initrd.clear(), "the initrd is empty"),
        (
            &good,
            |setup| setup.initrd = vec![0; 64 << 20],
            "does not fit",
        ),
        (
            &good,
            |setup| setup.config.cmdline = "x".repeat(3000),
            "command line has",
        ),
        (&good, |setup| setup.config.vcpus = 0, "asks for vCPUs 0"),
    ];
    for (kernel, change, text) in cases {
        let mut vmm = Vmm::start(kernel, &change);
        let FromVmm::Reply(Reply::Failed { message }) = vmm.message() else {
            panic!("{text}: it booted")
        };
        assert!(
            message.contains(text) && !message.contains('\n'),
            "{message}"
        );
        assert!(!vmm.wait().success());
    }
}

/// The same file with another note type.
fn elf_without_note(elf: &[u8]) -> Vec<u8> {
    let at = elf.windows(4).position(|word| word == b"Xen\0").unwrap();
    let mut other = elf.to_vec();
    other[at - 4] = 1;
    other
}
