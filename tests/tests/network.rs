//! The pod's network namespace, carried into the VM.

use coffer_tests::{Background, Test, asset, finish_with_input, host, noise, wait_for};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Command, Stdio};

/// Two namespaces joined by a veth: `pod` goes to the sandbox, `peer` is the world. Both vanish at the end.
struct Wire {
    pod: String,
    peer: String,
}

impl Wire {
    fn unconnected(test: &Test) -> Self {
        let id = test.id();
        let wire = Self {
            pod: format!("{id}-pod"),
            peer: format!("{id}-peer"),
        };
        for name in [&wire.pod, &wire.peer] {
            ip(&["netns", "add", name]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        wire
    }

    fn connect(&self) {
        let (pod, peer) = (self.pod.as_str(), self.peer.as_str());
        ip(&[
            "-n", pod, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", peer,
        ]);
        ip(&[
            "-n",
            pod,
            "link",
            "set",
            "eth0",
            "address",
            "02:11:22:33:44:55",
            "mtu",
            "1430",
            "up",
        ]);
        ip(&["-n", peer, "link", "set", "eth0", "mtu", "1430", "up"]);
        for (name, four, six) in [
            (pod, "10.9.0.2/24", "fd09::2/64"),
            (peer, "10.9.0.1/24", "fd09::1/64"),
        ] {
            ip(&["-n", name, "addr", "add", four, "dev", "eth0"]);
            ip(&["-n", name, "addr", "add", six, "dev", "eth0", "nodad"]);
        }
        ip(&["-n", pod, "route", "add", "default", "via", "10.9.0.1"]);
        ip(&[
            "-n",
            pod,
            "route",
            "add",
            "172.30.0.0/16",
            "via",
            "10.9.0.1",
            "metric",
            "7",
        ]);
        ip(&["-n", peer, "addr", "add", "172.30.0.1/16", "dev", "lo"]);
    }

    /// A command in the peer's namespace.
    fn peer(&self, command: &[&str]) -> Command {
        let mut ip = Command::new("ip");
        ip.args(["netns", "exec", &self.peer])
            .args(command)
            .stdin(Stdio::null());
        ip
    }

    /// Runs something in the pod's namespace on the host.
    fn in_pod<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let netns = File::open(format!("/run/netns/{}", self.pod)).unwrap();
        let thread = || {
            setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(thread).join().unwrap())
    }

    fn start<'t>(&self, test: &'t Test) -> Background<'t> {
        let (rootfs, netns) = (asset("debian"), format!("/run/netns/{}", self.pod));
        test.background_on(
            &["--rootfs", rootfs.to_str().unwrap()],
            &["--netns", &netns],
            &["sleep", "600"],
        )
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for name in [&self.pod, &self.peer] {
            drop(Netns(name.clone()));
        }
    }
}

/// A namespace that goes with this.
struct Netns(String);

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn ip(args: &[&str]) {
    host("ip", args).unwrap();
}

/// A TCP client that sends stdin and prints the answer; the Debian root has perl but no netcat.
const CLIENT: &str = r#"
use IO::Socket::IP;
my $s = IO::Socket::IP->new(PeerHost => $ARGV[0], PeerPort => 7000, Type => SOCK_STREAM) or die "connect: $@";
if (fork) {
    while (sysread(STDIN, my $b, 65536)) { for (my $o = 0; $o < length $b;) { $o += syswrite($s, $b, length($b) - $o, $o) // die } }
    shutdown($s, 1); wait; exit($? >> 8);
}
while (sysread($s, my $b, 65536)) { for (my $o = 0; $o < length $b;) { $o += syswrite(STDOUT, $b, length($b) - $o, $o) // die } }
"#;

/// Sends bytes to an echo server on the other side of the wire, and wants them back.
fn echo(sandbox: &Background<'_>, wire: &Wire, address: &str, bytes: &[u8]) {
    let mut server = wire
        .peer(&[
            "socat",
            "-b",
            "65536",
            "TCP6-LISTEN:7000,ipv6only=0,reuseaddr",
            "EXEC:cat",
        ])
        .spawn()
        .unwrap();
    wait_for("the server to listen", || {
        let sockets = wire.peer(&["cat", "/proc/net/tcp6"]).output().unwrap();
        String::from_utf8_lossy(&sockets.stdout).contains(":1B58 ")
    });
    let done = finish_with_input(
        sandbox.exec_command(&["-i"], &["perl", "-e", CLIENT, address]),
        bytes.to_vec(),
    );
    let _ = server.kill();
    server.wait().unwrap();
    assert_eq!(done.code, 0, "{address}: {}", done.stderr);
    assert!(
        done.stdout == bytes,
        "{} of {} bytes came back from {address}",
        done.stdout.len(),
        bytes.len()
    );
}

#[test]
fn the_guest_takes_the_veths_place_in_the_network() {
    let test = Test::new("net");
    let wire = Wire::unconnected(&test);
    wire.connect();
    let sandbox = wire.start(&test);
    assert_eq!(
        sandbox.sh("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu"),
        "02:11:22:33:44:55\n1430"
    );
    let routes = sandbox.sh("cat /proc/net/route");
    assert!(
        routes.contains("00001EAC\t0100090A") && routes.contains("00000000\t0100090A"),
        "{routes}"
    );
    echo(&sandbox, &wire, "10.9.0.1", b"four");
    echo(&sandbox, &wire, "fd09::1", b"six");
    echo(&sandbox, &wire, "172.30.0.1", b"routed");
    // A large transfer, both ways at once.
    echo(&sandbox, &wire, "10.9.0.1", &noise(16 << 20, 5));
}

/// Names of the guest's interfaces that have a card.
fn interfaces(sandbox: &Background<'_>) -> String {
    sandbox.sh("cd /sys/class/net && echo $(ls -d */device | cut -d/ -f1)")
}

/// A macvlan interface has the wire of another, and an address of its own on it.
#[test]
fn the_guest_takes_the_place_of_a_macvlan() {
    takes_the_place_of("macvlan", "bridge");
}

/// An ipvlan interface has the other's address too: what comes in is told apart by its IP address.
#[test]
fn the_guest_takes_the_place_of_an_ipvlan() {
    takes_the_place_of("ipvlan", "l2");
}

fn takes_the_place_of(kind: &str, mode: &str) {
    let test = Test::new(kind);
    let wire = Wire::unconnected(&test);
    let (pod, peer) = (wire.pod.as_str(), wire.peer.as_str());
    let node = format!("{}-node", test.id());
    ip(&["netns", "add", &node]);
    let _node = Netns(node.clone());
    let to_peer = ["type", "veth", "peer", "name", "eth0", "netns", peer];
    ip(&[&["-n", &node, "link", "add", "up0"], &to_peer[..]].concat());
    ip(&["-n", &node, "link", "set", "up0", "up"]);
    let on_it = ["link", "up0", "name", "on0", "type", kind, "mode", mode];
    ip(&[&["-n", &node, "link", "add"], &on_it[..]].concat());
    ip(&[
        "-n", &node, "link", "set", "on0", "netns", pod, "name", "eth0",
    ]);
    for (name, four, six) in [
        (pod, "10.9.0.2/24", "fd09::2/64"),
        (peer, "10.9.0.1/24", "fd09::1/64"),
    ] {
        ip(&["-n", name, "link", "set", "eth0", "up"]);
        ip(&["-n", name, "addr", "add", four, "dev", "eth0"]);
        ip(&["-n", name, "addr", "add", six, "dev", "eth0", "nodad"]);
    }
    let sandbox = wire.start(&test);
    echo(&sandbox, &wire, "10.9.0.1", b"four");
    echo(&sandbox, &wire, "fd09::1", b"six");
}

/// As Calico and CNI's ptp do it: the address is alone on its link, and so is the gateway, whose MAC address is given.
#[test]
fn the_guest_takes_a_point_to_point_wire() {
    let test = Test::new("ptp");
    let wire = Wire::unconnected(&test);
    let (pod, peer) = (wire.pod.as_str(), wire.peer.as_str());
    ip(&[
        "-n", pod, "link", "add", "eth0", "type", "veth", "peer", "name", "cali0", "netns", peer,
    ]);
    ip(&[
        "-n",
        peer,
        "link",
        "set",
        "cali0",
        "address",
        "ee:ee:ee:ee:ee:ee",
        "up",
    ]);
    ip(&["-n", peer, "addr", "add", "172.30.0.1/32", "dev", "lo"]);
    ip(&[
        "-n",
        peer,
        "addr",
        "add",
        "fd30::1/128",
        "dev",
        "lo",
        "nodad",
    ]);
    ip(&["-n", peer, "route", "add", "10.9.0.2/32", "dev", "cali0"]);
    ip(&["-n", peer, "route", "add", "fd09::2/128", "dev", "cali0"]);
    ip(&["-n", pod, "link", "set", "eth0", "mtu", "1400", "up"]);
    ip(&["-n", pod, "addr", "add", "10.9.0.2/32", "dev", "eth0"]);
    ip(&[
        "-n",
        pod,
        "addr",
        "add",
        "fd09::2/128",
        "dev",
        "eth0",
        "nodad",
    ]);
    for gateway in ["169.254.1.1", "fe80::1"] {
        let neighbour = [
            "lladdr",
            "ee:ee:ee:ee:ee:ee",
            "nud",
            "permanent",
            "dev",
            "eth0",
        ];
        ip(&[&["-n", pod, "neigh", "add", gateway], &neighbour[..]].concat());
    }
    ip(&[
        "-n",
        pod,
        "route",
        "add",
        "169.254.1.1",
        "dev",
        "eth0",
        "scope",
        "link",
    ]);
    ip(&[
        "-n",
        pod,
        "route",
        "add",
        "default",
        "via",
        "169.254.1.1",
        "dev",
        "eth0",
    ]);
    ip(&[
        "-n", pod, "route", "add", "default", "via", "fe80::1", "dev", "eth0", "onlink",
    ]);
    let sandbox = wire.start(&test);
    assert_eq!(sandbox.sh("cat /sys/class/net/eth0/mtu"), "1400");
    echo(&sandbox, &wire, "172.30.0.1", b"four");
    echo(&sandbox, &wire, "fd30::1", b"six");
}

/// Another veth between pod and peer, with 10.9.n.2 and 10.9.n.1.
fn connect_another(wire: &Wire, name: &str, n: u8) {
    let (pod, peer) = (wire.pod.as_str(), wire.peer.as_str());
    ip(&[
        "-n", pod, "link", "add", name, "type", "veth", "peer", "name", name, "netns", peer,
    ]);
    for (netns, host) in [(pod, 2), (peer, 1)] {
        let address = format!("10.9.{n}.{host}/24");
        ip(&["-n", netns, "addr", "add", &address, "dev", name]);
        ip(&["-n", netns, "link", "set", name, "up"]);
    }
}

#[test]
fn interfaces_come_and_go_while_the_sandbox_runs() {
    let test = Test::new("several");
    let wire = Wire::unconnected(&test);
    // In the other order than the guest would name its cards by itself.
    connect_another(&wire, "eth1", 1);
    connect_another(&wire, "eth0", 2);
    let sandbox = wire.start(&test);
    // Cards without an interface are out of sight.
    assert_eq!(interfaces(&sandbox), "eth0 eth1");
    echo(&sandbox, &wire, "10.9.1.1", b"one");
    echo(&sandbox, &wire, "10.9.2.1", b"two");

    let wait_for_interfaces = |wanted: &str| {
        wait_for(wanted, || interfaces(&sandbox) == wanted);
    };
    let wait_for_address = |n: u8| {
        let address = format!("10.9.{n}.2");
        wait_for(&address, || {
            sandbox.sh("cat /proc/net/fib_trie").contains(&address)
        });
    };
    connect_another(&wire, "net3", 3);
    wait_for_interfaces("eth0 eth1 net3");
    wait_for_address(3);
    echo(&sandbox, &wire, "10.9.3.1", b"three");

    ip(&["-n", &wire.pod, "link", "del", "net3"]);
    wait_for_interfaces("eth0 eth1");
    // The freed slot takes another one, which may have the old one's name.
    connect_another(&wire, "net3", 5);
    wait_for_interfaces("eth0 eth1 net3");
    wait_for_address(5);
    echo(&sandbox, &wire, "10.9.5.1", b"five");
    echo(&sandbox, &wire, "10.9.1.1", b"one, still");

    // No VM has slots for all of these: what is too much stays on the host, and the rest goes on.
    for (name, n) in [("net6", 6), ("net7", 7)] {
        connect_another(&wire, name, n);
    }
    let late = [
        "-n",
        &wire.pod,
        "addr",
        "add",
        "10.9.2.77/24",
        "dev",
        "eth0",
    ];
    ip(&late);
    wait_for("the new address", || {
        sandbox.sh("cat /proc/net/fib_trie").contains("10.9.2.77")
    });
    assert!(!interfaces(&sandbox).contains("net7"));
}

#[test]
fn a_network_that_comes_after_the_boot_is_attached() {
    let test = Test::new("late");
    let wire = Wire::unconnected(&test);
    let sandbox = wire.start(&test);
    wire.connect();
    wait_for("the guest to have the address", || {
        sandbox.sh("cat /proc/net/fib_trie").contains("10.9.0.2")
    });
    wait_for("the guest to have the routes", || {
        sandbox.sh("cat /proc/net/route").contains("0100090A")
    });
    echo(&sandbox, &wire, "10.9.0.1", b"late");
    // An address that is added to the running pod follows as well.
    ip(&[
        "-n",
        &wire.pod,
        "addr",
        "add",
        "10.9.0.77/24",
        "dev",
        "eth0",
    ]);
    wait_for("the new address", || {
        sandbox.sh("cat /proc/net/fib_trie").contains("10.9.0.77")
    });
}

/// A server on the guest's loopback: sends back what it gets, and after the client's end of file a last word.
const SERVER: &str = r#"
use IO::Socket::IP;
$SIG{CHLD} = 'IGNORE';
my $l = IO::Socket::IP->new(LocalHost => $ARGV[0], LocalPort => $ARGV[1], Type => SOCK_STREAM, Listen => 16, V6Only => 1) or die "listen: $@";
while (my $s = $l->accept) {
    next if fork;
    while (sysread($s, my $b, 65536)) { for (my $o = 0; $o < length $b;) { $o += syswrite($s, $b, length($b) - $o, $o) // die } }
    syswrite($s, "bye");
    exit;
}
"#;

fn serve_in_guest(sandbox: &Background<'_>, address: &str, port: u16) {
    let start = r#"perl -e "$0" "$1" "$2" < /dev/null > /dev/null 2>&1 &"#;
    let done = sandbox.exec(&["sh", "-c", start, SERVER, address, &port.to_string()]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let listens = format!("grep -q ':{port:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6");
    wait_for("the guest's server to listen", || {
        sandbox.exec(&["sh", "-c", &listens]).code == 0
    });
}

/// Sends bytes, ends its side, and wants them back and a word that came after the end.
fn talk(address: &str, bytes: &[u8]) {
    let mut client = TcpStream::connect(address).unwrap();
    assert_eq!(client.peer_addr().unwrap().to_string(), address);
    let mut sender = client.try_clone().unwrap();
    let mut got = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            sender.write_all(bytes).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        client.read_to_end(&mut got).unwrap();
    });
    assert!(
        got.strip_suffix(b"bye") == Some(bytes),
        "{} bytes came back of {}",
        got.len(),
        bytes.len()
    );
}

#[test]
fn connections_to_loopback_in_the_pods_namespace_reach_the_guest() {
    let test = Test::new("forward");
    let wire = Wire::unconnected(&test);
    wire.connect();
    let sandbox = wire.start(&test);
    serve_in_guest(&sandbox, "127.0.0.1", 8080);
    serve_in_guest(&sandbox, "::1", 8081);
    serve_in_guest(&sandbox, "127.0.0.9", 8082);
    wire.in_pod(|| {
        talk("127.0.0.1:8080", b"four");
        talk("[::1]:8081", b"six");
        talk("127.0.0.9:8082", b"another address");
        // What serves port-forward says "localhost" and would try the other family, were it refused.
        talk("127.0.0.1:8081", b"six, by way of four");
        talk("127.0.0.1:8080", &noise(10 << 20, 3));

        // A refused connection is one that is reset at once; what listens on the host does not come in between.
        let mut nobody = TcpStream::connect("127.0.0.1:8089").unwrap();
        let reset = nobody.read(&mut [0]).unwrap_err();
        assert_eq!(reset.kind(), io::ErrorKind::ConnectionReset);
        let _host = std::net::TcpListener::bind("127.0.0.1:8090").unwrap();
        let mut guests = TcpStream::connect("127.0.0.1:8090").unwrap();
        assert!(guests.read(&mut [0]).is_err());

        let many: Vec<_> = (0..40)
            .map(|_| TcpStream::connect("127.0.0.1:8080").unwrap())
            .collect();
        for (i, mut client) in many.into_iter().enumerate() {
            let word = i.to_string();
            client.write_all(word.as_bytes()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut got = String::new();
            client.read_to_string(&mut got).unwrap();
            assert_eq!(got, format!("{word}bye"));
        }
    });

    // The end of the sandbox is the end of its connections, and the namespace is the host's again.
    let mut open = wire.in_pod(|| TcpStream::connect("127.0.0.1:8080").unwrap());
    open.write_all(b"x").unwrap();
    open.read_exact(&mut [0]).unwrap();
    drop(sandbox);
    assert!(matches!(open.read(&mut [0]), Ok(0) | Err(_)));
    let refused = wire.in_pod(|| TcpStream::connect("127.0.0.1:8080").unwrap_err());
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
}
