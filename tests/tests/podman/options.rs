//! Options of `podman run`: each a row, most of them seen in one container that has them all.

use super::{DIFFERENCES, MEMORY_LIMIT, read};
use coffer_tests::podman::{Inside, compare, inside};
use std::fs;

/// Where a container sees its limits.
const CGROUP: &str = "/sys/fs/cgroup";

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
        let pids = format!("cat {CGROUP}/pids.max 2>/dev/null || cat {CGROUP}/pids/pids.max");
        let cpu = format!(
            "cat {CGROUP}/cpu.max 2>/dev/null || echo $(cat {CGROUP}/cpu/cpu.cfs_quota_us {CGROUP}/cpu/cpu.cfs_period_us)"
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
            case(
                "memory limit",
                &["--memory", "64m"],
                MEMORY_LIMIT,
                "67108864",
            ),
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
            case(
                "size of /dev/shm",
                &["--shm-size", "3m"],
                "df -k /dev/shm | tail -1 | awk '{print $2}'",
                "3072",
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
        let limits = ["--memory", "30m", "--memory-swap", "30m"];
        let eats = "sleep 1; tail /dev/zero; exit $?";
        podman.run_detached("m", &limits, &["sh", "-c", eats]);
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
        let health = [
            "--health-cmd",
            "test -e /tmp/healthy",
            "--health-interval",
            "disable",
        ];
        podman.run_detached("h", &health, &["sleep", "600"]);
        let check = || podman.call(&["healthcheck", "run", "h"]).code;
        report.row("healthcheck, failing", check(), 1);
        podman.ok(&["exec", "h", "touch", "/tmp/healthy"]);
        report.row("healthcheck, passing", check(), 0);
    });
}
