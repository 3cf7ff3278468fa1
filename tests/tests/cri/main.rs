//! Pods through containerd's CRI plugin, with Coffer as a runtime handler: what a kubelet would ask, by a CRI client of our own.
//!
//! On this machine every scenario has a containerd of its own ([`alone`]). In the test node, where starting one costs more than a pod, many
//! share one ([`together`]).

mod lifecycle;
mod many;
mod network;
mod resources;
mod security;
mod volumes;

use coffer_tests::Test;
use coffer_tests::cri::Node;
use resources::wrong_handlers;

/// The handler under test.
const COFFER: &str = "coffer";
/// A main process that ends when it is asked to.
const APP: &str = "trap 'exit 0' TERM; while :; do sleep 1; done";

mod alone {
    use super::*;

    fn run(scenario: fn(&Node<'_>)) {
        let test = Test::new("cri");
        scenario(&Node::with_handlers(&test, &wrong_handlers()));
    }

    #[test]
    fn several_containers_share_a_pod() {
        run(|node| lifecycle::several_containers(node, COFFER));
    }

    #[test]
    fn processes_are_executed_attached_to_and_measured_and_outlive_containerd() {
        run(lifecycle::processes_and_streams);
    }

    #[test]
    fn containers_share_a_pid_namespace() {
        run(lifecycle::shared_pid_namespace);
    }

    #[test]
    fn pods_are_on_a_bridge() {
        run(network::pods_on_a_bridge);
    }

    #[test]
    fn pods_have_interfaces_of_many_kinds() {
        run(network::interfaces_of_many_kinds);
    }

    #[test]
    fn limits_hold_and_change() {
        run(resources::limits_and_their_change);
    }

    #[test]
    fn the_vm_follows_the_limits() {
        run(resources::the_vm_follows_the_limits);
    }

    #[test]
    fn a_wrong_configuration_is_named() {
        run(resources::wrong_configurations);
    }

    #[test]
    fn security_contexts_are_honoured() {
        run(security::security_contexts);
    }

    #[test]
    fn volumes_are_mounted() {
        run(volumes::volumes);
    }
}

mod together {
    use super::*;
    use coffer_tests::cri::node::WITHOUT_PAUSE;
    use std::sync::Mutex;
    use std::time::Instant;

    /// Scenarios at a time: one waits while the other works.
    const AT_A_TIME: usize = 2;

    type Scenario = (&'static str, fn(&Node<'_>));

    const ALL: [Scenario; 9] = [
        ("volumes", volumes::volumes),
        ("security contexts", security::security_contexts),
        ("several containers", |node| {
            lifecycle::several_containers(node, COFFER);
        }),
        ("limits", resources::limits_and_their_change),
        ("VM size", resources::the_vm_follows_the_limits),
        ("bridge", network::pods_on_a_bridge),
        ("interfaces", network::interfaces_of_many_kinds),
        ("shared PIDs", lifecycle::shared_pid_namespace),
        ("wrong configurations", resources::wrong_configurations),
    ];
    /// What containerd has from version 2 on.
    const NEXT: [Scenario; 2] = [
        ("several containers without pause", |node| {
            lifecycle::several_containers(node, WITHOUT_PAUSE);
        }),
        ("users", security::users_of_the_pod),
    ];

    #[test]
    fn pods_on_this_containerd() {
        let test = Test::new("crithis");
        run(&Node::with_handlers(&test, &wrong_handlers()), &ALL);
    }

    #[test]
    fn pods_on_the_next_containerd() {
        let test = Test::new("crinext");
        let scenarios = [&NEXT[..], &ALL].concat();
        run(&Node::next(&test, &wrong_handlers()), &scenarios);
    }

    /// Runs all of them, and fails with the list of those that failed.
    fn run(node: &Node<'_>, scenarios: &[Scenario]) {
        println!("containerd {}", node.version());
        let (rest, failed) = (Mutex::new(scenarios.iter()), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let work = || {
                let next = || rest.lock().unwrap().next();
                while let Some((name, scenario)) = next() {
                    let since = Instant::now();
                    let done = std::thread::scope(|scope| scope.spawn(|| scenario(node)).join());
                    println!("{:6.1} s  {name}", since.elapsed().as_secs_f32());
                    if done.is_err() {
                        failed.lock().unwrap().push(*name);
                    }
                }
            };
            for _ in 0..AT_A_TIME {
                scope.spawn(work);
            }
        });
        // It ends containerd, so it runs alone.
        lifecycle::processes_and_streams(node);
        assert_eq!(failed.into_inner().unwrap(), [""; 0]);
    }
}
