//! Many pods: at once, one after another, and a table of what each phase takes beside runc.

use crate::{APP, COFFER};
use coffer_tests::cri::{Node, grpc};
use coffer_tests::{Test, leaks, wait_for};
use serde_json::json;
use std::time::{Duration, Instant};

/// What the project promises for the processes of one pod on the host.
const SHIM_MIB: u64 = 12;
const FSD_MIB: u64 = 10;

#[test]
fn five_pods_at_once() {
    let test = Test::new("crifive");
    let node = Node::start(&test);
    std::thread::scope(|scope| {
        for i in 0..5 {
            let node = &node;
            scope.spawn(move || {
                let pod = node.pod(COFFER, &format!("pod-{i}"), json!({}));
                let app = pod.sh("app", APP, json!({}));
                let script = format!("test $(hostname) = pod-{i}; exit {i}$?");
                assert_eq!(app.exec(&script).code, i * 10);
                let ends = pod.sh("ends", &format!("sleep 1; exit {}", 40 + i), json!({}));
                assert_eq!(ends.wait().0, 40 + i.cast_signed());
            });
        }
    });
}

#[test]
fn heavy_fifty_pods_in_a_row() {
    let test = Test::new("crififty");
    let node = Node::start(&test);
    for i in 0..50 {
        let pod = node.pod(COFFER, &format!("pod-{i}"), json!({}));
        let app = pod.sh("app", &format!("exit {i}"), json!({}));
        assert_eq!(app.wait().0, i);
    }
}

/// Names of the phases with the time that each took.
type Phases = Vec<(&'static str, Duration)>;

fn life_of_a_pod(node: &Node<'_>, handler: &str, name: &str) -> Phases {
    let mut phases = Phases::new();
    let mut since = Instant::now();
    let mut done = |name| {
        phases.push((name, since.elapsed()));
        since = Instant::now();
    };
    let pod = node.pod(handler, name, json!({}));
    done("pod from image");
    let script = format!("echo up; {APP}");
    let one = pod.sh("one", &script, json!({}));
    done("1st container");
    let _two = pod.sh("two", &script, json!({}));
    done("2nd container");
    let _three = pod.sh("three", &script, json!({}));
    done("3rd container");
    one.sh("true");
    done("exec");
    wait_for("the log", || one.logged("stdout") == ["up"]);
    done("logs");
    assert!(grpc::number(&one.stats()["memory"]["working_set_bytes"]) > 0);
    done("stats");
    if handler == COFFER {
        print_memory();
    }
    since = Instant::now();
    one.stop(30);
    phases.push(("stop one", since.elapsed()));
    since = Instant::now();
    pod.stop();
    phases.push(("stop pod", since.elapsed()));
    since = Instant::now();
    pod.remove();
    phases.push(("remove pod", since.elapsed()));
    phases
}

/// Resident memory of the pod's processes on the host. Memory of the guest, which coffer-fsd has mapped too, is shared and the VM's.
fn print_memory() {
    for (program, promised) in [
        ("containerd-shim-coffer-v2", SHIM_MIB),
        ("coffer-fsd", FSD_MIB),
    ] {
        let pids = leaks::descendants(std::process::id()).unwrap();
        let pids = pids.into_iter();
        for pid in pids.filter(|pid| leaks::command_line(*pid).contains(program)) {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let resident = |kind: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(kind));
                let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
                kib.expect("a running process has memory")
            };
            let kib = resident("RssAnon:") + resident("RssFile:");
            println!("{program:>28} {:6.1} MiB resident", kib as f64 / 1024.0);
            assert!(
                kib <= promised * 1024,
                "{program} has {kib} KiB, promised are {promised} MiB"
            );
        }
    }
}

/// Prints a table: `cargo xtask test --only node --heavy -E 'test(heavy_phases)'`.
#[test]
fn heavy_phases_of_a_pod_beside_runc() {
    let test = Test::new("criphases");
    let node = Node::start(&test);
    // The first pod of each kind warms the page cache.
    for handler in ["runc", COFFER] {
        life_of_a_pod(&node, handler, "warm");
    }
    let [runc, coffer] = ["runc", COFFER].map(|handler| life_of_a_pod(&node, handler, "timed"));
    println!(
        "{:<16} {:>9} {:>9} {:>7}",
        "phase", "runc", "coffer", "ratio"
    );
    let total = |phases: &Phases| phases.iter().map(|phase| phase.1).sum();
    let rows = runc.iter().zip(&coffer).map(|(r, c)| (r.0, r.1, c.1));
    for (name, runc, coffer) in rows.chain([("all", total(&runc), total(&coffer))]) {
        let ratio = coffer.as_secs_f64() / runc.as_secs_f64();
        let (runc, coffer) = (runc.as_millis(), coffer.as_millis());
        println!("{name:<16} {runc:>6} ms {coffer:>6} ms {ratio:>7.1}");
    }
}
