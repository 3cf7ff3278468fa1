//! Namespaces.

use std::fs;

use anyhow::ensure;
use serde_json::{Value, json};

use crate::fixture::{Draft, Guest, same};

fn own(kind: &str) -> anyhow::Result<String> {
    Ok(fs::read_link(format!("/proc/self/ns/{kind}"))?
        .to_string_lossy()
        .into_owned())
}

pub fn pid_namespace(guest: &Guest) -> anyhow::Result<()> {
    let output = Draft::new(
        "pid",
        "echo $$; ls -d /proc/[0-9]*; readlink /proc/self/ns/pid; readlink /proc/self/ns/mnt",
    )?
    .run(guest)?
    .good()?;
    let lines: Vec<&str> = output.lines().collect();
    same("own pid", lines[0], "1")?;
    ensure!(
        lines[1] == "/proc/1" && lines.len() <= 5,
        "processes of others are seen: {output}"
    );
    ensure!(
        !output.contains(&own("pid")?) && !output.contains(&own("mnt")?),
        "{output}"
    );
    Ok(())
}

pub fn shared_pid_namespace(guest: &Guest) -> anyhow::Result<()> {
    let mut first = Draft::new("first", "sleep 1000")?.create()?;
    first.start()?;
    let pid = fs::File::open(format!("/proc/{}/ns/pid", first.pid))?;
    let mut second = Draft::new("second", "grep -l sleep /proc/1/comm; echo $$; sleep 1000")?;
    second.pod.pid = Some(pid.into());
    second.spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    let mut second = second.create()?;
    second.start()?;
    let seen = second
        .sh(guest, "cat /proc/1/comm; ls -d /proc/[0-9]* | wc -l")?
        .good()?;
    let lines: Vec<&str> = seen.lines().collect();
    same("process 1", lines[0], "sleep")?;
    ensure!(lines[1].trim().parse::<u32>()? >= 3, "{seen}");
    second.container.kill_all()?;
    let output = second.finish(guest)?.stdout;
    ensure!(
        output.contains("/proc/1/comm") && !output.contains("\n1\n"),
        "{output}"
    );
    second.container.delete()?;
    first.kill_and_delete(guest)
}

/// As an ephemeral container does that debugs another one.
pub fn pid_namespace_of_a_container(guest: &Guest) -> anyhow::Result<()> {
    let mut target = Draft::new("target", "sleep 1000")?.create()?;
    target.start()?;
    let mut debugger = Draft::new("debugger", "cat /proc/1/comm; ls /proc/1/root/bin/busybox")?;
    debugger.pod = target.container.shared_with(&debugger.pod)?;
    debugger.spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    let output = debugger.run(guest)?;
    same("process 1", output.stdout.lines().next(), Some("sleep"))?;
    target.container.kill_all()?;
    guest.wait(target.pid)?;
    let refused = debugger.refused()?;
    ensure!(refused.contains("has ended"), "{refused}");
    Ok(target.container.delete()?)
}

pub fn pod_namespaces(guest: &Guest) -> anyhow::Result<()> {
    let script = "for n in ipc uts net user cgroup; do readlink /proc/self/ns/$n; done";
    let output = Draft::new("pod", script)?.run(guest)?.good()?;
    let lines: Vec<&str> = output.lines().collect();
    for (line, kind) in lines.iter().zip(["ipc", "uts", "net", "user"]) {
        same(kind, *line, &own(kind)?)?;
    }
    ensure!(
        lines[4] != own("cgroup")?,
        "the cgroup namespace is the guest's"
    );
    Ok(())
}

pub fn own_host_name(guest: &Guest) -> anyhow::Result<()> {
    let script = "hostname; cat /proc/sys/kernel/domainname; readlink /proc/self/ns/uts";
    let draft = Draft::new("name", script)?
        .set("/hostname", json!("web"))
        .set("/domainname", json!("example.org"));
    let output = draft.run(guest)?.good()?;
    ensure!(output.starts_with("web\nexample.org\n"), "{output}");
    ensure!(!output.contains(&own("uts")?), "it named the pod");
    same(
        "the pod",
        fs::read_to_string("/proc/sys/kernel/hostname")?.trim(),
        "pod",
    )?;
    // The pod's own name needs no namespace.
    let output = Draft::new("name", script)?
        .set("/hostname", json!("pod"))
        .run(guest)?
        .good()?;
    ensure!(
        output.starts_with("pod\n") && output.contains(&own("uts")?),
        "{output}"
    );
    Ok(())
}

pub fn cgroup_namespace(guest: &Guest) -> anyhow::Result<()> {
    let script = "cat /proc/self/cgroup; ls /sys/fs/cgroup | grep -c pids.max; echo 5 > /sys/fs/cgroup/pids.max || echo read-only";
    let output = Draft::new("cg", script)?.run(guest)?.good()?;
    same(
        "with",
        output.lines().collect::<Vec<_>>(),
        vec!["0::/", "1", "read-only"],
    )?;
    let without = json!([{"type": "pid"}, {"type": "mount"}]);
    let output = Draft::new("cg", script)?
        .set("/linux/namespaces", without)
        .run(guest)?
        .good()?;
    same(
        "without",
        output.lines().collect::<Vec<_>>(),
        vec!["0::/cg", "1", "read-only"],
    )
}

pub fn time_namespace(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("time", "cut -d. -f1 /proc/uptime; sleep 1000")?
        .add("/linux/namespaces", json!({"type": "time"}))
        .set(
            "/linux/timeOffsets",
            json!({"boottime": {"secs": 1_000_000}, "monotonic": {"secs": 5}}),
        );
    let mut running = draft.create()?;
    running.start()?;
    let uptime = running.sh(guest, "cut -d. -f1 /proc/uptime")?.good()?;
    ensure!(
        uptime.trim().parse::<u64>()? >= 1_000_000,
        "exec: up for {uptime}"
    );
    running.container.kill_all()?;
    let uptime = running.finish(guest)?.stdout;
    ensure!(
        uptime.trim().parse::<u64>()? >= 1_000_000,
        "init: up for {uptime}"
    );
    Ok(running.container.delete()?)
}

pub fn user_namespace(guest: &Guest) -> anyhow::Result<()> {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    let script = "id -u; cat /proc/self/uid_map; echo x > /dev/null && echo null; ls /sys | grep -c kernel; \
        touch /dev/mine && stat -c %u /dev/mine; mkdir /tmp/t && mount -t tmpfs t /tmp/t && echo mounted; \
        umount /proc/kcore 2>/dev/null || echo masked; sleep 1000";
    let draft = Draft::new("user", script)?
        .add("/linux/namespaces", json!({"type": "user"}))
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map);
    let caps = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
    let draft = draft.set(
        "/process/capabilities",
        json!({"bounding": caps, "permitted": caps, "effective": caps}),
    );
    let chown =
        |path: &std::path::Path| std::os::unix::fs::chown(path, Some(100_000), Some(100_000));
    chown(&draft.rootfs())?;
    for name in ["dev", "proc", "sys", "tmp"] {
        chown(&draft.rootfs().join(name))?;
    }
    let mut running = draft.create()?;
    running.start()?;
    let status = fs::read_to_string(format!("/proc/{}/status", running.pid))?;
    ensure!(status.contains("Uid:\t100000\t100000"), "{status}");
    let seen = running
        .sh(guest, "id -u; readlink /proc/self/ns/user")?
        .good()?;
    let lines: Vec<&str> = seen.lines().collect();
    same("user of exec", lines[0], "0")?;
    let init = fs::read_link(format!("/proc/{}/ns/user", running.pid))?;
    ensure!(
        init == std::path::Path::new(lines[1]) && lines[1] != own("user")?,
        "{seen}"
    );
    crate::fixture::eventually("the script", || draft.rootfs().join("tmp/t").exists())?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    running.container.kill_all()?;
    let output = running.finish(guest)?;
    let words: Vec<&str> = output.stdout.split_whitespace().collect();
    same(
        "inside",
        words,
        vec![
            "0", "0", "100000", "1000", "null", "1", "0", "mounted", "masked",
        ],
    )?;
    Ok(running.container.delete()?)
}

pub fn sysctls_of_the_pod(guest: &Guest) -> anyhow::Result<()> {
    let settings: Value = json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "1234567", "net/ipv4/ip_local_port_range": "2000 3000"});
    let script = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax; echo 0 > /proc/sys/net/ipv4/ip_forward || echo read-only";
    let output = Draft::new("sysctl", script)?
        .set("/linux/sysctl", settings)
        .run(guest)?
        .good()?;
    same(
        "inside",
        output.lines().collect::<Vec<_>>(),
        vec!["1", "1234567", "read-only"],
    )?;
    same(
        "the pod's",
        fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?.trim(),
        "2000\t3000",
    )
}

/// Every process starts with a new session keyring.
pub fn session_keyring(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("keys", "/probe keyring > /own; sleep 1000")?;
    draft.add_probe()?;
    let mut running = draft.create()?;
    running.start()?;
    let script = "until test -s /own; do sleep 0.1; done; cat /own; /probe keyring";
    let output = running.sh(guest, script)?.good()?;
    let mut serials: Vec<i64> = output.lines().map(str::parse).collect::<Result<_, _>>()?;
    serials.push(crate::probe::session_keyring());
    let [init, exec, agent] = serials[..] else {
        anyhow::bail!("{output}");
    };
    ensure!(init > 0 && exec > 0, "no keyring: {serials:?}");
    ensure!(
        init != exec && init != agent && exec != agent,
        "shared: {serials:?}"
    );
    running.kill_and_delete(guest)
}
