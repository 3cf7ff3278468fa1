//! cgroup v2: limits, device rules, figures.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::ensure;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};

use crate::container;
use crate::fixture::{Draft, Guest, eventually, same};

fn file(id: &str, name: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string(Path::new("/sys/fs/cgroup").join(id).join(name))?;
    Ok(text.trim().to_owned())
}

pub fn memory_limit(guest: &Guest) -> anyhow::Result<()> {
    // tail keeps a line without end in its memory.
    let draft = Draft::new(
        "oom",
        "tail -n 1 /dev/zero; echo $? > /etc/status; sleep 1000",
    )?
    .set(
        "/linux/resources/memory",
        json!({"limit": 16 << 20, "reservation": 8 << 20, "swap": 16 << 20}),
    );
    let mut running = draft.create()?;
    same(
        "memory.max",
        file("oom", "memory.max")?,
        (16 << 20).to_string(),
    )?;
    same(
        "memory.low",
        file("oom", "memory.low")?,
        (8 << 20).to_string(),
    )?;
    let events = running.container.oom_events()?;
    same("kills", running.container.oom_kills()?, 0)?;
    running.start()?;
    let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
    same("events", poll(&mut fds, PollTimeout::from(60_000u16))?, 1)?;
    eventually("the kill", || {
        running.container.oom_kills().is_ok_and(|n| n >= 1)
    })?;
    let status = || fs::read_to_string(draft.rootfs().join("etc/status")).unwrap_or_default();
    eventually("tail's end by SIGKILL", || status() == "137\n")?;
    running.kill_and_delete(guest)
}

pub fn pids_limit(guest: &Guest) -> anyhow::Result<()> {
    let script =
        "for i in 1 2 3 4 5 6 7 8 9; do sleep 100 & done; echo $(ls -d /proc/[0-9]* | wc -l)";
    let draft = Draft::new("pids", script)?.set("/linux/resources/pids", json!({"limit": 5}));
    let mut running = draft.create()?;
    same("pids.max", file("pids", "pids.max")?, "5".to_owned())?;
    running.start()?;
    let output = running.finish(guest)?;
    ensure!(output.stderr.contains("can't fork"), "{output:?}");
    Ok(running.container.delete()?)
}

pub fn cpu_and_weights(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("cpu", "cat /sys/fs/cgroup/cpu.max; sleep 1000")?
        .set("/linux/resources/cpu", json!({"shares": 1024, "quota": 50_000, "period": 200_000, "burst": 10_000, "cpus": "0", "mems": "0"}))
        .set("/linux/resources/blockIO", json!({"weight": 500}));
    let mut running = draft.create()?;
    for (name, value) in [
        ("cpu.weight", "39"),
        ("cpu.max", "50000 200000"),
        ("cpu.max.burst", "10000"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
    ] {
        same(name, file("cpu", name)?, value.to_owned())?;
    }
    same(
        "io.weight",
        file("cpu", "io.weight")?.lines().next(),
        Some("default 4950"),
    )?;
    running.start()?;
    running.container.kill_all()?;
    running.finish(guest)?;
    Ok(running.container.delete()?)
}

/// What a kubelet writes on a larger machine: page sizes, CPUs and memory nodes of its own.
pub fn numbers_of_the_host(guest: &Guest) -> anyhow::Result<()> {
    let mut running = Draft::new("numbers", "sleep 1000")?
        .set(
            "/linux/resources/cpu",
            json!({"cpus": "60-63", "mems": "0-1"}),
        )
        .set(
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "2MB", "limit": 0}, {"pageSize": "16GB", "limit": 0}]),
        )
        .create()?;
    same(
        "cpuset.cpus",
        file("numbers", "cpuset.cpus")?,
        String::new(),
    )?;
    running.kill_and_delete(guest)?;
    let refused = Draft::new("numbers", "true")?
        .set(
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "16GB", "limit": 1_i64 << 34}]),
        )
        .refused()?;
    ensure!(refused.contains("hugetlb.16GB"), "{refused}");
    Ok(())
}

pub fn unified(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("unified", "sleep 1000")?.set(
        "/linux/resources/unified",
        json!({"memory.high": "33554432", "pids.max": "77"}),
    );
    let mut running = draft.create()?;
    same(
        "memory.high",
        file("unified", "memory.high")?,
        "33554432".to_owned(),
    )?;
    same("pids.max", file("unified", "pids.max")?, "77".to_owned())?;
    running.kill_and_delete(guest)
}

pub fn update(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("update", "sleep 1000")?
        .set("/linux/resources/memory", json!({"limit": 64 << 20}))
        .set("/linux/resources/cpu", json!({"quota": 30_000}));
    let mut running = draft.create()?;
    running.start()?;
    let update = |limits: Value| -> anyhow::Result<()> {
        let limits = container::parse(limits.to_string().as_bytes())?;
        Ok(running.container.update(&limits)?)
    };
    update(
        json!({"memory": {"limit": 32 << 20}, "pids": {"limit": 9}, "cpu": {"period": 50_000}}),
    )?;
    same(
        "memory.max",
        file("update", "memory.max")?,
        (32 << 20).to_string(),
    )?;
    same("pids.max", file("update", "pids.max")?, "9".to_owned())?;
    same(
        "cpu.max",
        file("update", "cpu.max")?,
        "30000 50000".to_owned(),
    )?;
    update(json!({"memory": {"limit": -1}, "cpu": {"quota": -1}}))?;
    same(
        "memory.max",
        file("update", "memory.max")?,
        "max".to_owned(),
    )?;
    same(
        "cpu.max",
        file("update", "cpu.max")?,
        "max 50000".to_owned(),
    )?;
    let error = update(json!({"memory": {"swappiness": 1}})).expect_err("swappiness");
    ensure!(
        error.to_string().starts_with("memory.swappiness"),
        "{error}"
    );
    let error =
        update(json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}})).expect_err("too low");
    ensure!(error.to_string().contains("in use"), "{error}");
    running.kill_and_delete(guest)
}

const TRY_KMSG: &str = "mknod /tmp/kmsg c 1 11; head -c 0 /tmp/kmsg && echo read; true > /tmp/kmsg && echo written; \
    head -c 1 /dev/zero | wc -c";

pub fn device_rules(guest: &Guest) -> anyhow::Result<()> {
    let run = |rules: Value| -> anyhow::Result<String> {
        let output = Draft::new("rules", TRY_KMSG)?
            .set("/linux/resources/devices", rules)
            .run(guest)?;
        let refused = output.stderr.matches("Operation not permitted").count();
        Ok(format!("{}{refused} refused", output.stdout))
    };
    let rule = |allow: bool, access: &str| json!({"allow": allow, "type": "c", "major": 1, "minor": 11, "access": access});
    let deny_all = json!({"allow": false, "access": "rwm"});
    same("none", run(json!([]))?.as_str(), "1\n2 refused")?;
    same("deny all", run(json!([deny_all]))?.as_str(), "1\n2 refused")?;
    same(
        "read",
        run(json!([deny_all, rule(true, "r")]))?.as_str(),
        "read\n1\n1 refused",
    )?;
    same(
        "both, apart",
        run(json!([deny_all, rule(true, "r"), rule(true, "w")]))?.as_str(),
        "read\nwritten\n1\n0 refused",
    )?;
    same(
        "taken back",
        run(json!([rule(true, "rw"), rule(false, "w")]))?.as_str(),
        "read\n1\n1 refused",
    )?;
    let everything = json!({"allow": true, "access": "rwm"});
    same(
        "everything",
        run(json!([everything]))?.as_str(),
        "read\nwritten\n1\n0 refused",
    )
}

pub fn update_of_device_rules(guest: &Guest) -> anyhow::Result<()> {
    let mut running = Draft::new("rules2", "mknod /tmp/kmsg c 1 11; sleep 1000")?.create()?;
    running.start()?;
    let read =
        |running: &crate::fixture::Running| running.sh(guest, "head -c 0 /tmp/kmsg && echo read");
    eventually("the node", || {
        Path::new("/run/coffer/share/rules2/rootfs/tmp/kmsg").exists()
    })?;
    ensure!(read(&running)?.status != 0, "it was readable");
    for (allow, expected) in [(true, "read\n"), (false, "")] {
        let limits = json!({"devices": [{"allow": allow, "type": "c", "major": 1, "minor": 11, "access": "rw"}]});
        running
            .container
            .update(&container::parse(limits.to_string().as_bytes())?)?;
        same(
            "after the update",
            read(&running)?.stdout.as_str(),
            expected,
        )?;
    }
    running.kill_and_delete(guest)
}

pub fn statistics(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("stat", "while :; do :; done")?
        .set("/linux/resources/memory", json!({"limit": 64 << 20}))
        .set("/linux/resources/pids", json!({"limit": 12}));
    let mut running = draft.create()?;
    running.start()?;
    // The kernel tells user time by what runs at its ticks, so that the first of them can all be the system's.
    eventually("some work", || {
        let stat = running.container.stat();
        stat.is_ok_and(|s| s.cpu_usage_us > 20_000 && s.cpu_user_us > 0)
    })?;
    let stat = running.container.stat()?;
    same(
        "limits",
        (stat.memory_limit, stat.pids_limit),
        (64 << 20, 12),
    )?;
    ensure!(
        stat.memory_current > 4096 && stat.memory_peak >= stat.memory_current / 2,
        "{stat:?}"
    );
    ensure!(
        stat.pids_current >= 1 && stat.memory_stat.contains_key("anon"),
        "{stat:?}"
    );
    same("oom", stat.memory_events.get("oom_kill"), Some(&0))?;
    running.kill_and_delete(guest)
}

/// A container that manages cgroups of its own, as systemd or docker in it would.
pub fn nested_cgroups(guest: &Guest) -> anyhow::Result<()> {
    let script = "cd /sys/fs/cgroup; mkdir -p own/deep; echo $$ > own/cgroup.procs; echo +pids > cgroup.subtree_control && echo ready; sleep 1000";
    let draft = Draft::new("nested", script)?
        .remove_mount("/sys/fs/cgroup")
        .mount(
            "cgroup2",
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev"],
        );
    let mut running = draft.create()?;
    running.start()?;
    eventually("controllers handed out", || {
        file("nested", "cgroup.subtree_control").is_ok_and(|t| t == "pids")
    })?;
    let output = running.sh(guest, "cat /proc/self/cgroup")?.good()?;
    same("cgroup of an exec", output.as_str(), "0::/own\n")?;
    ensure!(
        running.container.pids()?.contains(&running.pid),
        "init is not listed"
    );
    running.kill_and_delete(guest)?;
    draft.check_gone()
}
