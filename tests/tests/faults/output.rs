//! Readers that are not there, programs that never read, a lot of output, and output in single bytes.

use coffer_tests::Test;
use coffer_tests::bundle::Bundle;
use coffer_tests::shim::Shim;
use coffer_tests::task::Task;
use containerd_shim_protos::api;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
/// From the end of a program to the answer, with nobody reading and under emulation.
const PROMPT: Duration = Duration::from_secs(10);
/// What the supervisor may have in memory, whatever goes through it.
const SUPERVISOR_RSS: usize = 32 * MIB;

fn fifo(test: &Test, name: &str) -> PathBuf {
    let path = test.dir().join(format!("{name}-{}", test.id()));
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    path
}

/// Creates and starts container `c` of a script with these fifos; an empty path is none.
fn start<'t>(test: &'t Test, script: &str, stdin: &Path, stdout: &Path) -> (Shim<'t>, Task) {
    let bundle = Bundle::new(test, script);
    let dir = bundle.write().to_owned();
    let shim = Shim::start(test, &bundle.dir, "c");
    let task = shim.task();
    let request = api::CreateTaskRequest {
        id: "c".into(),
        bundle: dir,
        stdin: stdin.display().to_string(),
        stdout: stdout.display().to_string(),
        ..Default::default()
    };
    task.client().create(Task::context(), &request).unwrap();
    task.start("c", "").unwrap();
    (shim, task)
}

fn ends(task: &Task, code: u32) {
    let since = Instant::now();
    assert_eq!(task.wait("c", "").unwrap(), code);
    assert!(since.elapsed() < PROMPT, "it took {:?}", since.elapsed());
    task.delete("c", "").unwrap();
}

/// What fits into the fifo waits there for a reader that comes later, though not after the end.
#[test]
fn a_reader_that_comes_late_misses_nothing() {
    let test = Test::new("unread");
    let out = fifo(&test, "out");
    let script = "head -c 60000 /dev/zero; sleep 3; exit 3";
    let (_shim, task) = start(&test, script, Path::new(""), &out);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(fs::read(&out).unwrap(), vec![0; 60_000]);
    ends(&task, 3);
}

#[test]
fn output_that_nobody_reads_delays_no_end() {
    // What does not fit holds the program up, which can be killed.
    let cases = [
        ("sleep 1; head -c 60000 /dev/zero; exit 3", None, 3),
        ("yes", Some(9), 137),
    ];
    for (script, signal, code) in cases {
        let test = Test::new("unreadend");
        let out = fifo(&test, "out");
        let (_shim, task) = start(&test, script, Path::new(""), &out);
        if let Some(signal) = signal {
            std::thread::sleep(Duration::from_secs(2));
            task.kill("c", signal).unwrap();
        }
        ends(&task, code);
    }
}

#[test]
fn input_that_nobody_reads_delays_no_end() {
    let test = Test::new("unfed");
    let input = fifo(&test, "in");
    let (_shim, task) = start(&test, "sleep 2; exit 4", &input, Path::new(""));
    let mut writer = File::options().read(true).write(true).open(&input).unwrap();
    let full = std::thread::spawn(move || {
        // As much as is taken, then no more: the fifo has another writer and reader, which is this one, so it never breaks.
        for _ in 0..64 {
            writer.write_all(&vec![b'x'; 4096]).unwrap();
        }
    });
    ends(&task, 4);
    drop(full);
}

#[test]
fn a_hundred_thousand_single_bytes_arrive() {
    let test = Test::new("bytes");
    let out = fifo(&test, "out");
    let from = out.clone();
    let reader = std::thread::spawn(move || fs::read(from).unwrap());
    let script = "dd if=/dev/zero bs=1 count=100000 2>/dev/null; exit 5";
    let (_shim, task) = start(&test, script, Path::new(""), &out);
    assert_eq!(task.wait("c", "").unwrap(), 5);
    task.delete("c", "").unwrap();
    assert_eq!(reader.join().unwrap().len(), 100_000);
}

/// The peak of a process's resident memory, in bytes.
fn peak(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<usize>().unwrap() << 10
}

fn flood(mib: usize) {
    let test = Test::new("flood");
    let out = fifo(&test, "out");
    let from = out.clone();
    let reader = std::thread::spawn(move || {
        let (mut file, mut buffer) = (File::open(from).unwrap(), vec![0; MIB]);
        let mut count = 0;
        loop {
            match file.read(&mut buffer).unwrap() {
                0 => return count,
                n => count += n,
            }
        }
    });
    let script = format!(
        "dd if=/dev/zero bs=64k count={} 2>/dev/null; exit 6",
        mib * 16
    );
    let (shim, task) = start(&test, &script, Path::new(""), &out);
    let since = Instant::now();
    // Longer than one call may take.
    while task.wait("c", "").is_err() {
        assert!(since.elapsed() < Duration::from_secs(3000));
    }
    let peak = peak(shim.pid());
    assert_eq!(task.delete("c", "").unwrap(), 6);
    assert_eq!(reader.join().unwrap(), mib * MIB);
    println!(
        "{mib} MiB in {:?}; at most {} KiB resident in the supervisor",
        since.elapsed(),
        peak >> 10
    );
    assert!(peak < SUPERVISOR_RSS, "{peak} bytes");
}

#[test]
fn a_lot_of_output_arrives_and_stays_nowhere() {
    flood(256);
}

/// Ten GiB: minutes on hardware, most of an hour under emulation.
#[test]
fn heavy_ten_gib_of_output_arrive_and_stay_nowhere() {
    flood(10 << 10);
}
