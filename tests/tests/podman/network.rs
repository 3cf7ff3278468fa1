//! podman's networks.

use super::DIFFERENCES;
use coffer_tests::podman::{IMAGE, compare, shown};
use coffer_tests::wait_for;
use std::io::Read;
use std::net::TcpStream;

/// Port of the test's own network namespace.
const PORT: u16 = 18_080;

#[test]
fn containers_have_podmans_networks() {
    compare("podnet", DIFFERENCES, |podman, report| {
        let published = format!("{PORT}:80");
        podman.ok(&[
            "run",
            "--detach",
            "--name",
            "web",
            // For ping, which podman 5 does not allow by itself.
            "--cap-add",
            "NET_RAW",
            "--publish",
            &published,
            "--add-host",
            "db:10.1.2.3",
            "--dns",
            "9.9.9.9",
            "--dns-search",
            "example.test",
            IMAGE,
            "sh",
            "-c",
            "while :; do echo hello | nc -l -p 80; done",
        ]);
        let exec = |command: &str| shown(&podman.call(&["exec", "web", "sh", "-c", command]));
        let address = podman.inspect("web", ".NetworkSettings.IPAddress");
        let gateway = podman.inspect("web", ".NetworkSettings.Gateway");
        report.row(
            "address",
            exec("ip -4 addr show eth0 | awk '/inet/ {sub(\"/.*\", \"\", $2); print $2}'"),
            format!("{address}\ncode 0"),
        );
        report.row(
            "route",
            exec("ip route | awk '/default/ {print $3}'"),
            format!("{gateway}\ncode 0"),
        );
        report.row(
            "gateway answers",
            exec(&format!("ping -c 1 -w 60 {gateway} > /dev/null")),
            "code 0",
        );
        report.row(
            "further host",
            exec("awk '$2 == \"db\" {print $1}' /etc/hosts"),
            "10.1.2.3\ncode 0",
        );
        report.row(
            "name server",
            exec("grep -v '^#' /etc/resolv.conf"),
            "search example.test\nnameserver 9.9.9.9\ncode 0",
        );
        report.row("published port", fetch(), "hello\n");
        let joined = podman.call(&[
            "run",
            "--rm",
            "--network",
            "container:web",
            IMAGE,
            "nc",
            "-w",
            "60",
            "127.0.0.1",
            "80",
        ]);
        report.row(
            "network of another container",
            shown(&joined),
            "hello\ncode 0",
        );
        let run = [
            "run",
            "--detach",
            "--name",
            "joined",
            "--network",
            "container:web",
        ];
        podman.ok(&[&run[..], &[IMAGE, "sleep", "600"]].concat());
        podman.ok(&["stop", "--time", "0", "web"]);
        report.row(
            "who joined a network stays when its owner ends",
            shown(&podman.call(&["exec", "joined", "echo", "alive"])),
            "alive\ncode 0",
        );
        podman.ok(&["rm", "--force", "--time", "0", "joined"]);
        podman.ok(&["rm", "--force", "--time", "0", "web"]);
        let host_network = podman.call(&[
            "run",
            "--rm",
            "--network",
            "host",
            IMAGE,
            "ls",
            "/sys/class/net",
        ]);
        report.row("network of the host", host_network.code, 0);
    });
}

/// What the published port says, once it answers.
fn fetch() -> String {
    let mut text = String::new();
    wait_for("the published port", || {
        text.clear();
        TcpStream::connect(("127.0.0.1", PORT))
            .is_ok_and(|mut s| s.read_to_string(&mut text).is_ok_and(|n| n > 0))
    });
    text
}
