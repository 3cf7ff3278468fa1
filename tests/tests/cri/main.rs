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

/// The handler under test.
const COFFER: &str = "coffer";
/// A main process that ends when it is asked to.
const APP: &str = "trap 'exit 0' TERM; while :; do sleep 1; done";

mod alone {
    use super::*;

    fn run(scenario: fn(&Node<'_>)) {
        let test = Test::new("cri");
        scenario(&Node::start(&test));
    }

    #[test]
    fn several_containers_share_a_pod() {
        run(|node| lifecycle::several_containers(node, COFFER));
    }

    #[test]
    fn processes_are_executed_attached_to_and_measured() {
        run(lifecycle::exec_attach_and_stats);
    }

    #[test]
    fn containers_share_a_pid_namespace() {
        run(lifecycle::shared_pid_namespace);
    }

    #[test]
    fn a_restart_of_containerd_loses_no_pod() {
        run(lifecycle::restart_of_containerd);
    }

    #[test]
    fn pods_are_on_a_bridge() {
        run(network::pods_on_a_bridge);
    }

    #[test]
    fn a_forwarded_port_is_the_guests() {
        run(network::port_forward);
    }

    #[test]
    fn limits_hold_and_change() {
        run(resources::limits_and_their_change);
    }

    #[test]
    fn security_contexts_are_honoured() {
        run(security::security_contexts);
    }

    #[test]
    fn volumes_are_mounted() {
        run(volumes::volumes);
    }

    #[test]
    fn block_volumes_are_devices() {
        run(volumes::block_device);
    }
}

mod together {
    use super::*;
    use coffer_tests::cri::node::WITHOUT_PAUSE;

    #[test]
    fn lives_of_pods() {
        let test = Test::new("crilives");
        let node = Node::start(&test);
        lifecycle::several_containers(&node, COFFER);
        lifecycle::exec_attach_and_stats(&node);
        lifecycle::restart_of_containerd(&node);
        lifecycle::shared_pid_namespace(&node);
    }

    #[test]
    fn what_surrounds_pods() {
        let test = Test::new("crirest");
        let node = Node::start(&test);
        network::pods_on_a_bridge(&node);
        network::port_forward(&node);
        resources::limits_and_their_change(&node);
        security::security_contexts(&node);
        volumes::volumes(&node);
        volumes::block_device(&node);
    }

    #[test]
    fn pods_on_the_next_containerd() {
        let test = Test::new("crinext");
        let node = Node::next(&test);
        lifecycle::several_containers(&node, COFFER);
        lifecycle::several_containers(&node, WITHOUT_PAUSE);
        lifecycle::exec_attach_and_stats(&node);
    }
}
