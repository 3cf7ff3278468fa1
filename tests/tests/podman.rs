//! podman runs containers and pods through Coffer as through any OCI runtime.
//!
//! Each test is a scenario that runs with runc or crun first and then with Coffer; its rows are the cases
//! (`coffer_tests::podman`). Where Coffer differs, [`DIFFERENCES`] says so.

use coffer_tests::podman::{Difference, IMAGE, Inside, Podman, Report, compare, inside, shown};
use coffer_tests::{host, wait_for};
use std::fs;
use std::io::Read;
use std::net::TcpStream;

/// Known differences, each also in `docs/limitations.md`.
const DIFFERENCES: &[Difference] = &[
    Difference {
        row: "network of the host",
        coffer: "126",
        reason: "the guest has another kernel with a network of its own",
    },
    Difference {
        row: "network of another container",
        coffer: "code 126",
        reason: "a network namespace has one VM; containers that share one belong into a pod",
    },
    Difference {
        row: "top",
        coffer: "",
        reason: "podman reads the /proc of the process that stands for the container, which sees no other processes",
    },
];

/// Reads one of two files: cgroup v2's, or v1's.
const LIMITS: &str = "/sys/fs/cgroup";

#[test]
fn options_of_run_shape_the_container() {
    compare("podopt", DIFFERENCES, |podman, report| {
        let data = podman.dir().join("data");
        fs::create_dir(&data).unwrap();
        fs::write(data.join("file"), "from the host").unwrap();
        let profile = podman.dir().join("seccomp.json");
        let no_mkdir = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#;
        fs::write(&profile, no_mkdir).unwrap();
        let read_only = format!("--volume={}:/ro:ro", data.display());
        let writable = format!("--volume={}:/rw", data.display());
        let seccomp = format!("--security-opt=seccomp={}", profile.display());
        let (read_only, writable, seccomp) = ([&*read_only], [&*writable], [&*seccomp]);
        let bit = |n: u32| {
            format!(
                "c=$(awk '/CapEff/ {{print $2}}' /proc/self/status); echo $(( (0x$c >> {n}) & 1 ))"
            )
        };
        let (sys_time, chown) = (bit(25), bit(0));
        let memory = format!(
            "cat {LIMITS}/memory.max 2>/dev/null || cat {LIMITS}/memory/memory.limit_in_bytes"
        );
        let pids = format!("cat {LIMITS}/pids.max 2>/dev/null || cat {LIMITS}/pids/pids.max");
        let cpu = format!(
            "cat {LIMITS}/cpu.max 2>/dev/null || echo $(cat {LIMITS}/cpu/cpu.cfs_quota_us {LIMITS}/cpu/cpu.cfs_period_us)"
        );
        let table = [
            case("hostname", &["--hostname", "inside"], "hostname", "inside"),
            case("environment", &["--env", "A=b c"], "echo \"$A\"", "b c"),
            case("working directory", &["--workdir", "/tmp"], "pwd", "/tmp"),
            case(
                "ulimit",
                &["--ulimit", "nofile=512:512", "--ulimit", "nproc=1000:1000"],
                "ulimit -n",
                "512",
            ),
            case("memory limit", &["--memory", "64m"], &memory, "67108864"),
            case("cpu limit", &["--cpus", "0.5"], &cpu, "50000 100000"),
            case("pids limit", &["--pids-limit", "50"], &pids, "50"),
            case(
                "read-only root",
                &["--read-only"],
                "touch /x",
                "touch: /x: Read-only file system",
            ),
            case(
                "tmpfs",
                &["--tmpfs", "/scratch:size=1m"],
                "df -k /scratch | tail -1 | awk '{print $1, $2}'",
                "tmpfs 1024",
            ),
            case(
                "volume, read-only",
                &read_only,
                "cat /ro/file; echo; touch /ro/x",
                "from the host\ntouch: /ro/x: Read-only file system",
            ),
            case(
                "volume, writable",
                &writable,
                "echo from inside > /rw/out; cat /rw/out",
                "from inside",
            ),
            case(
                "named volume",
                &["-v", "named:/named"],
                "echo kept > /named/f; cat /named/f",
                "kept",
            ),
            case(
                "mount of type tmpfs",
                &["--mount", "type=tmpfs,dst=/m,tmpfs-size=2m"],
                "df -k /m | tail -1 | awk '{print $1, $2}'",
                "tmpfs 2048",
            ),
            case(
                "capability added",
                &["--cap-add", "SYS_TIME"],
                &sys_time,
                "1",
            ),
            case("capability dropped", &["--cap-drop", "CHOWN"], &chown, "0"),
            case(
                "no new privileges",
                &["--security-opt", "no-new-privileges"],
                "awk '/NoNewPrivs/ {print $2}' /proc/self/status",
                "1",
            ),
            case(
                "seccomp profile",
                &seccomp,
                "mkdir /scratch/d",
                "mkdir: can't create directory '/scratch/d': Operation not supported",
            ),
            case(
                "sysctl",
                &["--sysctl", "net.ipv4.ip_default_ttl=99"],
                "cat /proc/sys/net/ipv4/ip_default_ttl",
                "99",
            ),
            case("further group", &["--group-add", "2000"], "id -G", "0 2000"),
            case(
                "device",
                &["--device", "/dev/null:/dev/mine"],
                "echo x > /dev/mine; test -c /dev/mine && echo device",
                "device",
            ),
            case(
                "OOM score",
                &["--oom-score-adj", "300"],
                "cat /proc/self/oom_score_adj",
                "300",
            ),
            case("umask", &["--umask", "0027"], "umask", "0027"),
            case(
                "no network",
                &["--network", "none"],
                "ip -4 -o addr | awk '{print $2}'",
                "lo",
            ),
            case("PID namespace", &[], "cat /proc/1/comm", "sh"),
            case(
                "masked path",
                &["--security-opt", "mask=/etc/passwd"],
                "wc -c < /etc/passwd",
                "0",
            ),
            case(
                "read-only path",
                &[],
                "echo 1 > /proc/sys/kernel/domainname",
                "sh: can't create /proc/sys/kernel/domainname: Read-only file system",
            ),
        ];
        inside(podman, report, &[], &table);
        report.row(
            "file written by the container",
            read(&data.join("out")),
            "from inside\n",
        );
        let again = podman.run(&["-v", "named:/named"], &["cat", "/named/f"]);
        report.row("named volume, used again", again, "kept\ncode 0");
    });
}

fn case<'a>(
    name: &'static str,
    options: &'a [&'a str],
    script: &'a str,
    expected: &'a str,
) -> Inside<'a> {
    Inside {
        name,
        options,
        script,
        expected,
    }
}

fn read(path: &std::path::Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| e.to_string())
}

/// A container in the background, that answers signals and keeps a count of its starts.
const SERVICE: &str = "trap 'echo term; exit 3' TERM; trap 'echo usr1' USR1; echo start >> /count; \
                       echo started; echo problem >&2; while :; do sleep 0.1; done";

#[test]
fn a_container_lives_through_all_commands() {
    compare("podlife", DIFFERENCES, |podman, report| {
        podman.ok(&[
            "run",
            "--detach",
            "--name",
            "c",
            "--network",
            "none",
            "--memory",
            "100m",
            IMAGE,
            "sh",
            "-c",
            SERVICE,
        ]);
        logged(podman, "started");
        report.row(
            "status of a running container",
            podman.inspect("c", ".State.Status"),
            "running",
        );
        report.row("ps", podman.ok(&["ps", "--format", "{{.Names}}"]), "c");
        report.row(
            "logs",
            shown(&podman.call(&["logs", "c"])),
            "started\ncode 0",
        );
        report.row(
            "logs of standard error",
            podman.call(&["logs", "c"]).stderr.trim(),
            "problem",
        );
        execs(podman, report);
        watch(podman, report);
        files(podman, report);
        podman.ok(&["update", "--memory", "90m", "c"]);
        let limit = format!(
            "cat {LIMITS}/memory.max 2>/dev/null || cat {LIMITS}/memory/memory.limit_in_bytes"
        );
        report.row(
            "update",
            podman.ok(&["exec", "c", "sh", "-c", &limit]),
            "94371840",
        );
        ends(podman, report);
    });
}

fn logged(podman: &Podman<'_>, text: &str) {
    wait_for(&format!("{text:?} in the log"), || {
        podman.call(&["logs", "c"]).text().contains(text)
    });
}

fn execs(podman: &Podman<'_>, report: &mut Report) {
    let exec = |options: &[&str], command: &[&str]| {
        let done = podman.call(&[&["exec"], options, &["c"], command].concat());
        shown(&done)
    };
    report.row(
        "exec",
        exec(&[], &["sh", "-c", "echo hello; exit 7"]),
        "hello\ncode 7",
    );
    report.row(
        "exec of what is not there",
        exec(&[], &["/no/such"]),
        "code 127",
    );
    report.row(
        "exec of what is no program",
        exec(&[], &["/etc/passwd"]),
        "code 126",
    );
    report.row(
        "exec ended by a signal",
        exec(&[], &["sh", "-c", "kill -9 $$"]),
        "code 137",
    );
    let done = podman.call_with_input(&["exec", "-i", "c", "cat"], "through\n");
    report.row("exec with input", shown(&done), "through\ncode 0");
    let tty = exec(&["--tty"], &["sh", "-c", "test -t 0 && echo terminal"]);
    report.row(
        "exec with a terminal",
        tty.replace('\r', ""),
        "terminal\ncode 0",
    );
    report.row(
        "exec as a user",
        exec(&["--user", "1000:2000"], &["sh", "-c", "id -u; id -g"]),
        "1000\n2000\ncode 0",
    );
    report.row(
        "exec as a user by name",
        exec(&["--user", "user"], &["id", "-G"]),
        "1000 10 2000\ncode 0",
    );
    report.row(
        "exec in a directory",
        exec(&["--workdir", "/etc"], &["pwd"]),
        "/etc\ncode 0",
    );
    report.row(
        "exec with environment",
        exec(&["--env", "A=1"], &["sh", "-c", "echo $A"]),
        "1\ncode 0",
    );
    podman.ok(&["exec", "--detach", "c", "sh", "-c", "echo done > /detached"]);
    wait_for("the detached exec", || {
        exec(&[], &["cat", "/detached"]) == "done\ncode 0"
    });
    report.row("exec, detached", "done", "done");
}

fn watch(podman: &Podman<'_>, report: &mut Report) {
    let top = podman.ok(&["top", "c", "pid", "comm"]);
    let init = top
        .lines()
        .nth(1)
        .unwrap_or_default()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    report.row("top", init, "1 sh");
    let stats = podman.ok(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.Name}} {{.PIDs}}",
        "c",
    ]);
    let processes: u32 = stats
        .split(' ')
        .next_back()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    report.row("stats", processes >= 1, true);
    podman.ok(&["pause", "c"]);
    report.row("pause", podman.inspect("c", ".State.Status"), "paused");
    podman.ok(&["unpause", "c"]);
    report.row("unpause", podman.inspect("c", ".State.Status"), "running");
    podman.ok(&["kill", "--signal", "USR1", "c"]);
    logged(podman, "usr1");
    report.row(
        "kill with a signal",
        podman.inspect("c", ".State.Status"),
        "running",
    );
}

fn files(podman: &Podman<'_>, report: &mut Report) {
    let (from, to) = (podman.dir().join("from"), podman.dir().join("to"));
    fs::write(&from, "copied in").unwrap();
    podman.ok(&["cp", from.to_str().unwrap(), "c:/in"]);
    report.row(
        "cp into the container",
        podman.ok(&["exec", "c", "cat", "/in"]),
        "copied in",
    );
    podman.ok(&["exec", "c", "sh", "-c", "echo copied out > /out"]);
    podman.ok(&["cp", "c:/out", to.to_str().unwrap()]);
    report.row("cp out of the container", read(&to), "copied out\n");
    let changed = podman.ok(&["diff", "c"]);
    report.row("diff", changed.contains(" /out"), true);
    podman.ok(&["commit", "--quiet", "c", "localhost/committed"]);
    let done = podman.call(&[
        "run",
        "--rm",
        "--network",
        "none",
        "localhost/committed",
        "cat",
        "/in",
    ]);
    report.row(
        "commit, and run of the new image",
        shown(&done),
        "copied in\ncode 0",
    );
}

fn ends(podman: &Podman<'_>, report: &mut Report) {
    podman.ok(&["stop", "--time", "60", "c"]);
    report.row(
        "stop lets the program end",
        podman.inspect("c", ".State.ExitCode"),
        "3",
    );
    report.row(
        "status of a stopped container",
        podman.inspect("c", ".State.Status"),
        "exited",
    );
    report.row(
        "output until the end",
        podman.ok(&["logs", "--tail", "1", "c"]),
        "term",
    );
    podman.ok(&["start", "c"]);
    report.row(
        "start again",
        podman.inspect("c", ".State.Status"),
        "running",
    );
    podman.ok(&["restart", "--time", "1", "c"]);
    wait_for("the third start", || {
        podman.call(&["exec", "c", "cat", "/count"]).text() == "start\nstart\nstart"
    });
    report.row(
        "restart keeps the files",
        podman.ok(&["exec", "c", "wc", "-l", "/count"]),
        "3 /count",
    );
    podman.ok(&["kill", "c"]);
    report.row("wait", podman.ok(&["wait", "c"]), "137");
    podman.ok(&["rm", "c"]);
    report.row("rm", podman.ok(&["ps", "--all", "--quiet"]), "");
    // A second ^C: no time to stop.
    podman.ok(&[
        "run",
        "--detach",
        "--name",
        "c",
        "--network",
        "none",
        IMAGE,
        "sleep",
        "600",
    ]);
    podman.ok(&["rm", "--force", "--time", "0", "c"]);
    report.row("rm --force", podman.ok(&["ps", "--all", "--quiet"]), "");
}

#[test]
fn podman_run_gives_codes_input_and_terminals() {
    compare("podrun", DIFFERENCES, |podman, report| {
        let sh = |options: &[&str], script: &str| podman.run(options, &["sh", "-c", script]);
        report.row(
            "code of the program",
            sh(&[], "echo out; exit 42"),
            "out\ncode 42",
        );
        report.row(
            "program that is not there",
            podman.run(&[], &["/no/such"]),
            "code 127",
        );
        report.row(
            "program that is none",
            podman.run(&[], &["/etc/passwd"]),
            "code 126",
        );
        let done = podman.call_with_input(
            &["run", "--rm", "-i", "--network", "none", IMAGE, "cat"],
            "through\n",
        );
        report.row("input", shown(&done), "through\ncode 0");
        let tty = podman.run(&["--tty"], &["sh", "-c", "tty; test -t 0 && exit 5"]);
        report.row("terminal", tty.replace('\r', ""), "/dev/pts/0\ncode 5");
        report.row(
            "time-out",
            podman.run(&["--timeout", "5"], &["sleep", "600"]),
            "code 255",
        );
        report.row(
            "nothing is left",
            podman.ok(&["ps", "--all", "--quiet"]),
            "",
        );
        podman.ok(&[
            "create",
            "--name",
            "a",
            "--network",
            "none",
            IMAGE,
            "sh",
            "-c",
            "echo attached; exit 6",
        ]);
        report.row(
            "start --attach",
            shown(&podman.call(&["start", "--attach", "a"])),
            "attached\ncode 6",
        );
        let attached = attach(podman);
        report.row("attach", attached, "got a line, then 4");
    });
}

/// Attaches to a container that waits for input.
fn attach(podman: &Podman<'_>) -> String {
    let script = "read line; echo \"got $line\"; exit 4";
    podman.ok(&[
        "run",
        "--detach",
        "-i",
        "--name",
        "b",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        script,
    ]);
    let done = podman.call_with_input(&["attach", "b"], "a line\n");
    podman.ok(&["wait", "b"]);
    // The code of podman 4's attach is its own.
    format!(
        "{}, then {}",
        done.text(),
        podman.inspect("b", ".State.ExitCode")
    )
}

#[test]
fn users_init_and_memory_are_as_asked() {
    compare("poduser", DIFFERENCES, |podman, report| {
        let sh = |options: &[&str], script: &str| podman.run(options, &["sh", "-c", script]);
        report.row(
            "user",
            sh(&["--user", "1000:2000"], "id -u; id -g; echo $HOME"),
            "1000\n2000\n/home/user\ncode 0",
        );
        report.row(
            "init",
            sh(&["--init"], "cat /proc/1/comm"),
            "podman-init\ncode 0",
        );
        let mapped = sh(
            &["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"],
            "id -u; awk '{print $1, $2, $3}' /proc/self/uid_map",
        );
        report.row("user namespace", mapped, "0\n0 100000 65536\ncode 0");
        podman.ok(&[
            "run",
            "--detach",
            "--name",
            "m",
            "--network",
            "none",
            "--memory",
            "30m",
            "--memory-swap",
            "30m",
            IMAGE,
            "sh",
            "-c",
            "sleep 1; tail /dev/zero; exit $?",
        ]);
        report.row("out of memory", podman.ok(&["wait", "m"]), "137");
        // podman 4 looks for conmon's file in another directory than that where conmon leaves it.
        let cgroup_v2 = fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap();
        if podman.is_coffer() || cgroup_v2 {
            report.row("OOMKilled", podman.inspect("m", ".State.OOMKilled"), "true");
        }
        let privileged = sh(
            &["--privileged"],
            "mount -t tmpfs none /tmp && echo mounted",
        );
        report.row("privileged", privileged, "mounted\ncode 0");
        podman.ok(&[
            "run",
            "--detach",
            "--name",
            "h",
            "--network",
            "none",
            "--health-cmd",
            "test -e /tmp/healthy",
            "--health-interval",
            "disable",
            IMAGE,
            "sleep",
            "600",
        ]);
        report.row(
            "healthcheck, failing",
            podman.call(&["healthcheck", "run", "h"]).code,
            1,
        );
        podman.ok(&["exec", "h", "touch", "/tmp/healthy"]);
        report.row(
            "healthcheck, passing",
            podman.call(&["healthcheck", "run", "h"]).code,
            0,
        );
    });
}

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

#[test]
fn pods_share_what_podman_says() {
    compare("podpod", DIFFERENCES, |podman, report| {
        for (name, infra) in [("with", true), ("without", false)] {
            let infra_option = format!("--infra={infra}");
            let mut create = vec!["pod", "create", "--name", name, &infra_option];
            if infra {
                create.extend([
                    "--infra-image",
                    IMAGE,
                    "--infra-command",
                    "/bin/sleep 600",
                    "--hostname",
                    "the-pod",
                ]);
            }
            podman.ok(&create);
            let run =
                |words: &[&str]| podman.ok(&[&["run", "--detach", "--pod", name], words].concat());
            run(&[
                "--name",
                "server",
                IMAGE,
                "sh",
                "-c",
                "while :; do echo from the server | nc -l -p 7777; done",
            ]);
            run(&["--name", "client", IMAGE, "sleep", "600"]);
            let exec = |container: &str, command: &str| {
                shown(&podman.call(&["exec", container, "sh", "-c", command]))
            };
            let boot = "cat /proc/sys/kernel/random/boot_id";
            let same = exec("server", boot) == exec("client", boot);
            if infra {
                report.row("pod: one kernel", same, true);
                report.row(
                    "pod: shared network",
                    exec("client", "nc -w 60 127.0.0.1 7777"),
                    "from the server\ncode 0",
                );
                report.row(
                    "pod: hostname",
                    exec("client", "hostname"),
                    "the-pod\ncode 0",
                );
            } else {
                report.row("pod without infra: one kernel", same, true);
                report.row(
                    "pod without infra: exec",
                    exec("client", "echo works"),
                    "works\ncode 0",
                );
            }
            podman.ok(&["rm", "--force", "--time", "0", "server"]);
            let left = exec("client", "echo alive");
            podman.ok(&["pod", "stop", "--time", "1", name]);
            let status = podman.ok(&["pod", "inspect", "--format", "{{.State}}", name]);
            podman.ok(&["pod", "rm", "--force", name]);
            if infra {
                report.row("pod: the others stay when one goes", left, "alive\ncode 0");
                report.row("pod: stop", status, "Exited");
            } else {
                report.row(
                    "pod without infra: the others stay when one goes",
                    left,
                    "alive\ncode 0",
                );
            }
        }
    });
}

#[test]
fn five_at_once_give_their_own_codes() {
    compare("podfive", DIFFERENCES, |podman, report| {
        let codes: Vec<_> = std::thread::scope(|scope| {
            let run = |n: usize| podman.run(&[], &["sh", "-c", &format!("echo {n}; exit {n}")]);
            let threads: Vec<_> = (1..=5).map(|n| scope.spawn(move || run(n))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let expected: Vec<_> = (1..=5).map(|n| format!("{n}\ncode {n}")).collect();
        report.row("five at once", codes.join(", "), expected.join(", "));
    });
}

#[test]
fn heavy_thirty_in_a_row_leave_nothing() {
    compare("podrow", DIFFERENCES, |podman, report| {
        let codes = (1..=30)
            .all(|n| podman.run(&[], &["sh", "-c", &format!("exit {n}")]) == format!("code {n}"));
        report.row("thirty in a row", codes, true);
        let left = host("ps", &["-eo", "args"]).unwrap();
        let storage = podman.dir().to_str().unwrap();
        let left = left
            .lines()
            .filter(|line| line.starts_with("/usr/bin/conmon") && line.contains(storage))
            .count();
        report.row("no conmon is left", left, 0);
    });
}
