use super::*;
use std::process::Command;

/// A namespace of its own with a veth into a second one; both vanish at the end.
struct Netns {
    name: String,
}

impl Netns {
    fn new(test: &str) -> Self {
        let netns = Self {
            name: format!("cfrtest-{test}-{}", std::process::id()),
        };
        let (a, b) = (netns.name.clone(), netns.peer());
        ip(&format!("netns add {a}"));
        ip(&format!("netns add {b}"));
        ip(&format!(
            "-n {a} link add eth0 type veth peer name eth0 netns {b}"
        ));
        ip(&format!(
            "-n {a} link set eth0 address 02:00:00:00:00:07 mtu 1400 up"
        ));
        ip(&format!("-n {b} link set eth0 up"));
        ip(&format!(
            "-n {a} addr add 10.77.0.2/24 brd 10.77.0.255 dev eth0"
        ));
        ip(&format!("-n {a} addr add fd77::2/64 dev eth0 nodad"));
        ip(&format!("-n {a} route add default via 10.77.0.1 dev eth0"));
        ip(&format!(
            "-n {a} route add 10.78.0.0/16 dev eth0 scope link metric 5"
        ));
        ip(&format!(
            "-n {a} neigh add 10.77.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent"
        ));
        netns
    }

    fn peer(&self) -> String {
        format!("{}-peer", self.name)
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        for name in [self.name.clone(), self.peer()] {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

fn ip(args: &str) -> String {
    let out = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(
        out.status.success(),
        "ip {args}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

#[tokio::test]
async fn an_interface_is_described_with_all_it_has() {
    let netns = Netns::new("describe");
    let nics = attach(&netns.path(), &[], 4).await.unwrap();
    let [nic] = &nics[..] else { panic!("{nics:?}") };
    let interface = &nic.interface;
    assert_eq!(
        (interface.name.as_str(), interface.mac.as_str()),
        ("eth0", "02:00:00:00:00:07")
    );
    assert_eq!((interface.mtu, interface.down), (1400, false));
    let addresses: Vec<_> = interface
        .addresses
        .iter()
        .map(|a| format!("{}/{}", a.ip, a.prefix))
        .collect();
    assert_eq!(addresses, ["10.77.0.2/24", "fd77::2/64"]);
    let routes: Vec<_> = interface
        .routes
        .iter()
        .map(|r| (r.destination.as_str(), r.gateway.as_str(), r.metric))
        .collect();
    assert_eq!(routes, [("10.78.0.0/16", "", 5), ("", "10.77.0.1", 0)]);
    assert_eq!(interface.neighbours.len(), 1);
    assert_eq!(interface.neighbours[0].mac, "02:00:00:00:00:01");
}

#[tokio::test]
async fn frames_of_the_peer_come_out_of_the_tap() {
    let netns = Netns::new("frames");
    let nics = attach(&netns.path(), &[], 4).await.unwrap();
    let file = File::from(nics.into_iter().next().unwrap().tap);
    let ping = format!(
        "netns exec {} ping -6 -c 20 -i 0.1 -W 1 ff02::1%eth0",
        netns.peer()
    );
    let sender = std::thread::spawn(move || Command::new("ip").args(ping.split(' ')).output());
    let frame = tokio::task::spawn_blocking(move || {
        use std::io::Read;
        let mut buffer = [0; 2048];
        for _ in 0..500 {
            match (&file).read(&mut buffer) {
                Ok(n) => return n,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        }
        0
    });
    // 12 bytes of virtio-net header and an Ethernet header at least.
    assert!(frame.await.unwrap() > 26);
    sender.join().unwrap().unwrap();
}

#[tokio::test]
async fn attaching_again_takes_only_what_is_new_and_detach_leaves_nothing() {
    let netns = Netns::new("again");
    let first = attach(&netns.path(), &[], 4).await.unwrap();
    let known: Vec<_> = first.iter().map(|nic| nic.index).collect();
    assert!(attach(&netns.path(), &known, 4).await.unwrap().is_empty());
    drop(first);
    detach(&netns.path()).await.unwrap();
    let left = ip(&format!("netns exec {} tc qdisc show dev eth0", netns.name));
    assert!(!left.contains("ingress"), "{left}");
    detach(&netns.path()).await.unwrap();
    detach(Path::new("/run/netns/none-such")).await.unwrap();
}

#[tokio::test]
async fn a_namespace_that_is_not_there_is_named() {
    let error = attach(Path::new("/run/netns/none-such"), &[], 4)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("/run/netns/none-such"),
        "{error}"
    );
}

#[tokio::test]
async fn changes_of_the_namespace_are_noticed() {
    let netns = Netns::new("watch");
    let mut changes = watch(&netns.path());
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    ip(&format!("-n {} addr add 10.77.0.3/24 dev eth0", netns.name));
    let seen = tokio::time::timeout(std::time::Duration::from_secs(10), changes.recv()).await;
    assert_eq!(seen.unwrap(), Some(()));
    let now = describe(&netns.path()).await.unwrap();
    assert!(
        now[0].1.addresses.iter().any(|a| a.ip == "10.77.0.3"),
        "{now:?}"
    );
}

#[test]
fn a_namespace_is_known_by_all_its_names_and_the_hosts_is_refused() {
    let netns = Netns::new("names");
    let named = NamespaceId::of_pod(&netns.path()).unwrap();
    let file = File::open(netns.path()).unwrap();
    let open = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    assert_eq!(NamespaceId::of_pod(Path::new(&open)).unwrap(), named);
    let peer = Path::new("/run/netns").join(netns.peer());
    assert_ne!(NamespaceId::of_pod(&peer).unwrap(), named);
    let hosts = NamespaceId::of_pod(Path::new("/proc/self/ns/net"));
    assert!(matches!(hosts, Err(NetworkError::Host { .. })), "{hosts:?}");
}
