//! The pod's network: a bridge CNI in the pod's namespace on the host, the same interface in the guest.

use crate::{APP, COFFER};
use coffer_tests::cri::node::{GATEWAY, WIRE, WIRED};
use coffer_tests::cri::stream::STDIN;
use coffer_tests::cri::{Node, pod};
use coffer_tests::{host, wait_for};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

const ECHO: &str = "nc -ll -p 7777 -e cat";

/// Sends a word to an echo server and gives what comes back.
fn echo(address: &str) -> std::io::Result<String> {
    let mut tcp = TcpStream::connect(address)?;
    tcp.set_read_timeout(Some(Duration::from_secs(60)))?;
    tcp.write_all(b"echo")?;
    tcp.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    tcp.read_to_string(&mut answer)?;
    Ok(answer)
}

pub fn pods_on_a_bridge(node: &Node<'_>) {
    let mapping = json!([{"protocol": "TCP", "container_port": 7777, "host_port": 8077}]);
    let one = node.pod(COFFER, "one", json!({"port_mappings": mapping}));
    let server = one.sh("server", ECHO, json!({}));
    let trusted = node.pod("runc", "trusted", json!({}));
    let other = trusted.sh("server", ECHO, json!({}));

    let address = format!("{}:7777", one.ip());
    wait_for("the server", || {
        echo(&address).is_ok_and(|answer| answer == "echo")
    });
    assert_eq!(
        echo(&format!("{GATEWAY}:8077")).unwrap(),
        "echo",
        "hostPort"
    );
    let ask = |ip: &str| format!("echo hello | nc -w 60 {ip} 7777");
    assert_eq!(other.sh(&ask(&one.ip())), "hello", "runc pod to Coffer's");
    assert_eq!(
        server.sh(&ask(&trusted.ip())),
        "hello",
        "Coffer's pod to runc's"
    );
    let script = format!(
        "ip -4 -o addr show dev eth0 | grep -c {}/16; ip route | grep default; ping -c 1 -w 20 {GATEWAY} | grep -c '1 packets received'",
        one.ip()
    );
    let network = server.sh(&script);
    let lines: Vec<_> = network.lines().map(str::trim).collect();
    let default = format!("default via {GATEWAY} dev eth0");
    assert_eq!(lines, ["1", &*default, "1"]);

    // What `kubectl port-forward` does.
    let mut stream = one.forward(7777);
    stream.send(STDIN, b"through the loopback").unwrap();
    stream.read_until(STDIN, "through the loopback").unwrap();

    for (namespace, name) in [
        ("network", "hostNetwork"),
        ("ipc", "hostIPC"),
        ("pid", "hostPID"),
    ] {
        let of_host =
            json!({"linux": {"security_context": {"namespace_options": {namespace: "NODE"}}}});
        let message = pod::refusal(node.try_pod(COFFER, "host", of_host));
        assert!(message.contains(name), "{message}");
    }
}

/// A bridge with both families, a point-to-point link and a macvlan: addresses, MTU and routes as CNI made them, and a route and its
/// neighbour that come later.
pub fn interfaces_of_many_kinds(node: &Node<'_>) {
    let [end, other] = WIRE;
    for args in [
        &["link", "add", end, "type", "veth", "peer", "name", other][..],
        &["link", "set", end, "up"],
        &["link", "set", other, "up"],
        &["addr", "add", "10.80.0.1/24", "dev", other],
    ] {
        host("ip", args).unwrap();
    }
    let pod = node.pod(WIRED, "wired", json!({}));
    let app = pod.sh("app", APP, json!({}));
    assert_eq!(
        app.sh("cd /sys/class/net; cat eth0/mtu eth1/mtu eth2/mtu"),
        "1430\n1400\n1380"
    );
    let routes = app.sh("ip route; ip -6 route");
    for route in [
        "default via 10.78.0.1 dev eth0",
        "172.30.0.0/16 via 10.78.0.1 dev eth0",
        "172.31.0.0/16 via 10.79.0.1 dev eth1",
        "172.32.0.0/16 via 10.80.0.1 dev eth2",
        "default via fd78::1 dev eth0",
    ] {
        let is_there = routes.lines().any(|line| line.trim().starts_with(route));
        assert!(is_there, "{route}: {routes}");
    }
    app.sh(
        "set -e; for ip in 10.78.0.1 10.79.0.1 10.80.0.1; do ping -c 1 -w 20 $ip; done; ping -6 -c 1 -w 20 fd78::1",
    );
    // As network plugins that route do it.
    let in_pod = format!("--net={}", pod.netns().display());
    for args in [
        "neigh replace 10.78.9.9 lladdr 02:00:00:00:09:09 dev eth0",
        "route add 172.33.0.0/16 via 10.78.9.9",
    ] {
        let args: Vec<_> = args.split(' ').collect();
        host("nsenter", &[&[&*in_pod, "ip"], &args[..]].concat()).unwrap();
    }
    wait_for("the route and its neighbour", || {
        let now = app.sh("ip route; ip neigh");
        now.contains("172.33.0.0/16 via 10.78.9.9") && now.contains("02:00:00:00:09:09")
    });
}
