//! What becomes of the output: log drivers, partial lines, logs of a limited size.

use crate::remove;
use coffer_tests::Test;
use coffer_tests::bundle::Bundle;
use coffer_tests::conmon::Conmon;
use coffer_tests::oci::Runtime;
use std::fs;

/// A container that runs to its end under conmon.
fn run<'t>(
    test: &Test,
    runtime: &'t Runtime<'t>,
    bundle: &Bundle,
    options: &[&str],
) -> (Conmon<'t>, i32) {
    let conmon = Conmon::started(test, runtime, bundle, options);
    let code = conmon.exit_code();
    remove(runtime, &conmon);
    (conmon, code)
}

#[test]
fn long_lines_and_ends_without_a_newline_are_marked_and_whole() {
    let test = Test::new("conparts");
    let script = "head -c 70000 /dev/zero | tr '\\0' '#'; echo; printf 'the end'; exit 3";
    let bundle = Bundle::new(&test, script);
    for runtime in Runtime::all(&test) {
        let (conmon, code) = run(&test, &runtime, &bundle, &[]);
        assert_eq!(code, 3, "{}", runtime.name());
        let whole = conmon.logged("stdout");
        assert_eq!(
            whole.trim_end(),
            format!("{}\nthe end", "#".repeat(70_000)),
            "{}",
            runtime.name()
        );
        let log = fs::read_to_string(conmon.dir.join("log")).unwrap();
        assert!(log.contains(" stdout P #") && log.contains(" stdout P the end"));
    }
}

#[test]
fn a_log_of_limited_size_keeps_the_last_lines() {
    const LIMIT: u64 = 4096;
    let test = Test::new("conlimit");
    let bundle = Bundle::new(
        &test,
        "for i in $(seq 500); do echo \"line $i.\"; done; exit 5",
    );
    for runtime in Runtime::all(&test) {
        let options = ["--log-size-max", &LIMIT.to_string()];
        let (conmon, code) = run(&test, &runtime, &bundle, &options);
        assert_eq!(code, 5, "{}", runtime.name());
        let text = conmon.logged("stdout");
        assert!(
            text.ends_with("line 500.\n") && !text.contains("line 1."),
            "{}: {text}",
            runtime.name()
        );
        let size = fs::metadata(conmon.dir.join("log")).unwrap().len();
        assert!(size <= LIMIT, "{}: {size} bytes", runtime.name());
    }
}

#[test]
fn every_log_driver_gets_the_output() {
    let test = Test::new("condrivers");
    let bundle = Bundle::new(&test, "echo to out; echo to err >&2; exit 6");
    let file = test.dir().join("beside");
    let beside = format!("k8s-file:{}", file.display());
    for runtime in Runtime::all(&test) {
        // A path alone means the same as k8s-file; two drivers at once are allowed. Nothing listens at the journal's socket here,
        // which conmon passes over.
        let plain = file.to_str().unwrap();
        for drivers in [&["-l", plain][..], &["-l", &beside, "-l", "journald:"]] {
            let (_, code) = run(&test, &runtime, &bundle, drivers);
            assert_eq!(code, 6, "{} {drivers:?}", runtime.name());
            let log = fs::read_to_string(&file).unwrap();
            assert!(
                log.contains(" stdout F to out\n") && log.contains(" stderr F to err\n"),
                "{} {drivers:?}: {log}",
                runtime.name()
            );
            fs::remove_file(&file).unwrap();
        }
        // The program has conmon's own streams, with nobody between.
        let (conmon, code) = run(&test, &runtime, &bundle, &["-l", "passthrough"]);
        assert_eq!(code, 6, "{}", runtime.name());
        let stream = |name| fs::read_to_string(conmon.dir.join(name)).unwrap();
        assert_eq!(stream("stdout"), "to out\n", "{}", runtime.name());
        assert!(stream("stderr").contains("to err\n"), "{}", runtime.name());
    }
}

#[test]
fn output_without_a_log_reaches_those_who_are_attached() {
    let test = Test::new("connolog");
    let bundle = Bundle::new(&test, "read line; echo \"got $line\"; exit 2");
    for runtime in Runtime::all(&test) {
        let mut conmon = Conmon::create(&test, &runtime, &bundle, &["-l", "none", "-i"]);
        conmon.pid();
        let mut client = conmon.attach();
        conmon.start();
        client.write("this\n");
        client.wait("got this\n");
        assert_eq!(conmon.exit_code(), 2, "{}", runtime.name());
        assert!(!conmon.dir.join("log").exists());
        remove(&runtime, &conmon);
    }
}
