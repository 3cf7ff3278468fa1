//! Pods, with and without an infra container.

use super::DIFFERENCES;
use coffer_tests::podman::{IMAGE, Podman, compare, shown};

const SERVER: &str = "while :; do echo from the server | nc -l -p 7777; done";

/// Runs a server and a client in the pod.
fn run_members(podman: &Podman<'_>, pod: &str) {
    let run = ["run", "--detach", "--pod", pod, "--name"];
    podman.ok(&[&run[..], &["server", IMAGE, "sh", "-c", SERVER]].concat());
    podman.ok(&[&run[..], &["client", IMAGE, "sleep", "600"]].concat());
}

fn exec(podman: &Podman<'_>, container: &str, command: &str) -> String {
    shown(&podman.call(&["exec", container, "sh", "-c", command]))
}

fn have_one_kernel(podman: &Podman<'_>) -> bool {
    let boot = "cat /proc/sys/kernel/random/boot_id";
    exec(podman, "server", boot) == exec(podman, "client", boot)
}

/// What the client says when the server is gone.
fn without_server(podman: &Podman<'_>) -> String {
    podman.ok(&["rm", "--force", "--time", "0", "server"]);
    exec(podman, "client", "echo alive")
}

#[test]
fn members_of_a_pod_share_kernel_network_and_hostname() {
    compare("podpod", DIFFERENCES, |podman, report| {
        let infra = ["--infra-image", IMAGE, "--infra-command", "/bin/sleep 600"];
        let name = ["--name", "pod", "--hostname", "the-pod"];
        podman.ok(&[&["pod", "create"][..], &infra, &name].concat());
        run_members(podman, "pod");
        report.row("pod: one kernel", have_one_kernel(podman), true);
        report.row(
            "pod: shared network",
            exec(podman, "client", "nc -w 60 127.0.0.1 7777"),
            "from the server\ncode 0",
        );
        let hostname = exec(podman, "client", "hostname");
        report.row("pod: hostname", hostname, "the-pod\ncode 0");
        let left = without_server(podman);
        report.row("pod: the others stay when one goes", left, "alive\ncode 0");
        podman.ok(&["pod", "stop", "--time", "1", "pod"]);
        let state = podman.ok(&["pod", "inspect", "--format", "{{.State}}", "pod"]);
        report.row("pod: stop", state, "Exited");
        podman.ok(&["pod", "rm", "--force", "pod"]);
    });
}

#[test]
fn a_pod_without_infra_has_one_kernel_too() {
    compare("podbare", DIFFERENCES, |podman, report| {
        podman.ok(&["pod", "create", "--infra=false", "--name", "bare"]);
        run_members(podman, "bare");
        let same = have_one_kernel(podman);
        report.row("pod without infra: one kernel", same, true);
        let works = exec(podman, "client", "echo works");
        report.row("pod without infra: exec", works, "works\ncode 0");
        let left = without_server(podman);
        report.row(
            "pod without infra: the others stay when one goes",
            left,
            "alive\ncode 0",
        );
        podman.ok(&["pod", "stop", "--time", "1", "bare"]);
        podman.ok(&["pod", "rm", "--force", "bare"]);
    });
}
