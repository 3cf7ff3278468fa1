//! Standard streams: nothing lost, nothing added, however much and however fast.

use coffer_tests::{Test, asset, finish_with_input, noise, wait_for};
use std::io::{Read, Write};
use std::process::Stdio;

const HUNDRED_MIB: usize = 100 << 20;

#[test]
fn a_hundred_mib_go_in_by_stdin_and_come_back_by_stdout() {
    let test = Test::new("streams");
    let sandbox = test.background(&[], &["sleep", "600"]);
    let bytes = noise(HUNDRED_MIB, 7);
    let done = finish_with_input(sandbox.exec_command(&["-i"], &["cat"]), bytes.clone());
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.stdout == bytes,
        "{} of {} bytes came back, or other ones",
        done.stdout.len(),
        bytes.len()
    );
}

#[test]
fn what_is_written_right_before_the_exit_is_not_lost() {
    let test = Test::new("tail");
    for _ in 0..3 {
        let done = test.shell(&[], "head -c 300000 /dev/zero; echo last; echo problem >&2");
        assert_eq!(done.stdout.len(), 300_005, "{}", done.stderr);
        assert!(
            done.stdout.ends_with(b"last\n") && done.stderr.contains("problem"),
            "{}",
            done.stderr
        );
    }
}

#[test]
fn a_container_without_input_reads_end_of_file() {
    let test = Test::new("eof");
    assert_eq!(test.shell(&[], "cat; echo done").text(), "done");
    let rootfs = asset("busybox");
    let count = test.run_command(&["-i", "--rootfs", rootfs.to_str().unwrap(), "--", "wc", "-c"]);
    let done = finish_with_input(count, vec![b'x'; 1000]);
    assert_eq!(done.text().trim(), "1000", "{}", done.stderr);
}

#[test]
fn a_reader_that_leaves_early_does_not_hang_the_process() {
    let test = Test::new("early");
    let sandbox = test.background(&[], &["sleep", "600"]);
    let mut command =
        sandbox.exec_command(&[], &["sh", "-c", "yes | head -c 50000000; echo end >&2"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"y\ny\ny\ny\ny\n");
    wait_for("the exec to end", || child.try_wait().unwrap().is_some());
}

#[test]
fn a_child_that_holds_stdout_keeps_it_open() {
    let test = Test::new("held");
    let sandbox = test.background(&[], &["sleep", "600"]);
    assert_eq!(
        sandbox
            .exec(&["sh", "-c", "(sleep 1; echo late) & echo soon"])
            .text(),
        "soon\nlate"
    );
}

#[test]
fn a_slow_reader_slows_the_writer_down() {
    let test = Test::new("slow");
    let sandbox = test.background(&[], &["sleep", "600"]);
    let mut command = sandbox.exec_command(&["-i"], &["cat"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let bytes = noise(16 << 20, 3);
    let (mut stdin, send) = (child.stdin.take().unwrap(), bytes.clone());
    let writer = std::thread::spawn(move || stdin.write_all(&send));
    std::thread::sleep(std::time::Duration::from_secs(2));
    // Buffers on the way hold far less than 16 MiB: without back-pressure somebody would have taken it all.
    assert!(
        !writer.is_finished(),
        "sixteen MiB went somewhere although nobody reads"
    );
    let mut back = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut back).unwrap();
    writer.join().unwrap().unwrap();
    assert!(back == bytes);
    assert!(child.wait().unwrap().success());
}
