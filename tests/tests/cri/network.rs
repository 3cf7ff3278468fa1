//! The pod's network: a bridge CNI in the pod's namespace on the host, the same interface in the guest.

use crate::COFFER;
use coffer_tests::cri::node::GATEWAY;
use coffer_tests::cri::stream::STDIN;
use coffer_tests::cri::{Node, pod};
use coffer_tests::wait_for;
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
    assert_eq!(
        server.sh(&format!(
            "ip -4 -o addr show dev eth0 | grep -c {}/16",
            one.ip()
        )),
        "1"
    );
    assert_eq!(
        server.sh("ip route | grep default").trim(),
        format!("default via {GATEWAY} dev eth0")
    );
    assert_eq!(
        server.sh(&format!(
            "ping -c 1 -w 20 {GATEWAY} | grep -c '1 packets received'"
        )),
        "1"
    );

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

pub fn port_forward(node: &Node<'_>) {
    let pod = node.pod(COFFER, "forward", json!({}));
    let server = pod.sh("server", "nc -ll -p 7777 -e cat", json!({}));
    server.sh("until netstat -ltn | grep -q :7777; do sleep 0.2; done");
    let mut stream = pod.forward(7777);
    stream.send(STDIN, b"through the loopback").unwrap();
    stream.read_until(STDIN, "through the loopback").unwrap();
}
