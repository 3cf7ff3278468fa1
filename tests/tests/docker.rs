//! docker runs containers through Coffer, with the options that people use and with docker's own networks. One test, because a
//! dockerd takes its time to start; it is a story with many cases. Debian 13's docker is 26, which the test node has.

use coffer_tests::docker::{Docker, IMAGE, RUNTIME};
use coffer_tests::{Finished, Test, host, wait_for};
use std::fs;
use std::io::Read;
use std::net::TcpStream;

/// Where the service is published, in the test's own network namespace.
const PORT: u16 = 18_081;
/// Says hello to who connects, and ends with a code of its own on SIGTERM.
const SERVICE: &str = "trap 'echo term; exit 3' TERM; trap 'echo usr1' USR1; echo started; echo problem >&2; \
                       while :; do echo hello | nc -l -p 80; done & while :; do sleep 0.1; done";
const BOOT: &str = "cat /proc/sys/kernel/random/boot_id";

#[test]
fn docker_runs_containers_with_its_networks() {
    let test = Test::new("docker");
    let docker = Docker::start(&test);
    foreground(&docker);
    options(&docker);
    let data = test.dir().join("volume");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "from the host").unwrap();
    let volume = format!("{}:/data", data.display());
    let published = format!("{PORT}:80");
    let options = ["--publish", &published, "--volume", &volume, "-m", "100m"];
    let run = ["run", "--detach", "--name", "web", "--runtime", RUNTIME];
    let command = [IMAGE, "sh", "-c", SERVICE];
    docker.ok(&[&run[..], &options, &command].concat());
    default_bridge(&docker);
    inside(&docker);
    assert_eq!(
        fs::read_to_string(data.join("out")).unwrap(),
        "from inside\n"
    );
    user_network(&docker);
    joined_network(&docker);
    end(&docker);
}

fn shown(done: &Finished) -> (&str, i32) {
    (done.text(), done.code)
}

fn foreground(docker: &Docker<'_>) {
    // Without a runtime: daemon.json says which.
    let run = ["run", "--rm", "-it", IMAGE];
    let script = "test -t 0 && nproc; uname -r; exit 42";
    let done = docker.call_on_terminal(&[&run[..], &["sh", "-c", script]].concat());
    // script(1) passes the end of its own input on as a NUL, which the terminal shows.
    let text = done.text().replace('\r', "").replace("^@", "");
    let (processors, kernel) = text.split_once('\n').expect("two lines");
    assert_eq!((processors, done.code), ("2", 42), "{done:?}");
    let hosts = host("uname", &["-r"]).unwrap();
    assert_ne!(kernel, hosts.trim(), "the guest has a kernel of its own");

    let done = docker.run(&["--network", "host"], &["true"]);
    assert!(
        done.code != 0 && done.stderr.contains("can't be had in a VM"),
        "{done:?}"
    );
}

/// Volumes, limits and privileges of `docker run`.
fn options(docker: &Docker<'_>) {
    let source = docker.path("mounted");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "mounted").unwrap();
    let bind = format!("type=bind,src={},dst=/bind,readonly", source.display());
    let mounts = [
        "--mount",
        &bind,
        "--mount",
        "type=volume,src=kept,dst=/kept",
    ];
    let limits = [
        "--cpus",
        "0.5",
        "--pids-limit",
        "50",
        "--ulimit",
        "nofile=100:200",
    ];
    let script = "cat /bind/file; touch /bind/file 2>/dev/null || echo ' read-only'; echo kept > /kept/file; \
                  cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; ulimit -Sn; ulimit -Hn; ip link set lo mtu 1000 2>/dev/null || echo refused";
    let done = docker.run(&[&mounts[..], &limits].concat(), &["sh", "-c", script]);
    let expected = "mounted read-only\n50000 100000\n50\n100\n200\nrefused";
    assert_eq!(shown(&done), (expected, 0), "{done:?}");

    let script = "cat /kept/file; ip link set lo mtu 1000 && echo changed";
    let done = docker.run(&["-v", "kept:/kept", "--privileged"], &["sh", "-c", script]);
    assert_eq!(shown(&done), ("kept\nchanged", 0), "{done:?}");
    docker.ok(&["volume", "rm", "kept"]);
}

/// What a TCP server says.
fn fetch(address: &str) -> String {
    let mut text = String::new();
    wait_for(&format!("an answer from {address}"), || {
        text.clear();
        TcpStream::connect(address)
            .is_ok_and(|mut server| server.read_to_string(&mut text).is_ok_and(|n| n > 0))
    });
    text
}

/// docker gives the namespace an interface between create and start.
fn default_bridge(docker: &Docker<'_>) {
    let network = |field: &str| docker.inspect("web", &format!(".NetworkSettings.{field}"));
    let (address, gateway) = (network("IPAddress"), network("Gateway"));
    assert_eq!(
        fetch(&format!("127.0.0.1:{PORT}")),
        "hello\n",
        "published port"
    );
    assert_eq!(fetch(&format!("{address}:80")), "hello\n");
    let inside = "ip -4 -o addr show dev eth0 | awk '{sub(\"/.*\", \"\", $4); print $4}'";
    assert_eq!(docker.sh("web", inside), address);
    let route = docker.sh("web", "ip route | awk '/default/ {print $3}'");
    assert_eq!(route, gateway);
    docker.sh("web", &format!("ping -c 1 -w 60 {gateway}"));
    let hostname = docker.inspect("web", ".Config.Hostname");
    assert_eq!(docker.sh("web", "hostname"), hostname);
    let hosts = format!("awk '$2 == \"{hostname}\" {{print $1}}' /etc/hosts");
    assert_eq!(docker.sh("web", &hosts), address);
}

fn inside(docker: &Docker<'_>) {
    let done = docker.call(&["exec", "web", "sh", "-c", "echo hello; exit 7"]);
    assert_eq!(shown(&done), ("hello", 7), "{done:?}");
    let done = docker.call_with_input(&["exec", "-i", "web", "cat"], "through\n");
    assert_eq!(shown(&done), ("through", 0), "{done:?}");
    let tty = ["exec", "-it", "web", "sh", "-c", "test -t 0; exit $?"];
    let done = docker.call_on_terminal(&tty);
    assert_eq!(done.code, 0, "{done:?}");
    let file = docker.sh("web", "cat /data/file; echo from inside > /data/out");
    assert_eq!(file, "from the host");
    let done = docker.call(&["logs", "web"]);
    assert_eq!(shown(&done), ("started", 0), "{done:?}");
    assert_eq!(done.stderr, "problem\n");
    let stats = docker.ok(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.PIDs}} {{.MemUsage}}",
        "web",
    ]);
    let (processes, memory) = stats.split_once(' ').expect("two columns");
    assert!(processes.parse::<u32>().is_ok_and(|n| n >= 2), "{stats}");
    assert!(
        memory.ends_with("/ 100MiB") && !memory.starts_with("0B"),
        "{stats}"
    );
    docker.ok(&["pause", "web"]);
    assert_eq!(docker.inspect("web", ".State.Status"), "paused");
    docker.ok(&["unpause", "web"]);
}

/// A second network while it runs, and one on which containers know each other by name.
fn user_network(docker: &Docker<'_>) {
    docker.ok(&["network", "create", "net"]);
    docker.ok(&["network", "connect", "net", "web"]);
    let address = docker.inspect("web", ".NetworkSettings.Networks.net.IPAddress");
    wait_for("the second interface", || {
        let done = docker.call(&[
            "exec", "web", "ip", "-4", "-o", "addr", "show", "dev", "eth1",
        ]);
        done.text().contains(&address)
    });
    // By its name, which docker's resolver knows.
    let script = "found=$(nslookup -type=a web | awk '/^Name/ {n = 1} n && /^Address/ {print $2}'); \
                  echo $found; nc -w 60 $found 80";
    let done = docker.run(&["--network", "net"], &["sh", "-c", script]);
    let expected = format!("{address}\nhello");
    assert_eq!(shown(&done), (expected.as_str(), 0), "{done:?}");
}

/// A container that joins another's network is in its VM.
fn joined_network(docker: &Docker<'_>) {
    let script = format!("nc -w 60 127.0.0.1 80; {BOOT}");
    let done = docker.run(&["--network", "container:web"], &["sh", "-c", &script]);
    let boot = docker.sh("web", BOOT);
    assert_eq!(
        shown(&done),
        (format!("hello\n{boot}").as_str(), 0),
        "{done:?}"
    );
}

fn end(docker: &Docker<'_>) {
    let last = |line: &str| docker.ok(&["logs", "web"]).ends_with(line);
    docker.ok(&["kill", "--signal", "USR1", "web"]);
    wait_for("the signal", || last("usr1"));
    docker.ok(&["restart", "--time", "60", "web"]);
    wait_for("its second start", || last("started"));
    let attached = docker.background(&["attach", "--no-stdin", "web"]);
    // docker tells when somebody has attached.
    let seen = [
        "events",
        "--since",
        "1h",
        "--until",
        "0s",
        "--filter",
        "event=attach",
    ];
    wait_for("docker attach", || docker.ok(&seen).contains("name=web"));
    docker.ok(&["stop", "--time", "60", "web"]);
    let attached = attached.join().unwrap();
    assert_eq!(shown(&attached), ("term", 3), "{attached:?}");
    assert_eq!(docker.inspect("web", ".State.ExitCode"), "3");
    assert_eq!(docker.ok(&["logs", "--tail", "1", "web"]), "term");
    docker.ok(&["start", "web"]);
    assert_eq!(
        fetch(&format!("127.0.0.1:{PORT}")),
        "hello\n",
        "after a start"
    );
    docker.ok(&["rm", "--force", "web"]);
    assert_eq!(docker.ok(&["ps", "--all", "--quiet"]), "");
}
