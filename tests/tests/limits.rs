//! Resource limits inside the guest.

use coffer_tests::Test;
use coffer_tests::bundle::Bundle;
use coffer_tests::memory_cgroup::MemoryCgroup;
use serde_json::{Value, json};

#[test]
fn a_memory_limit_that_is_hit_is_reported_with_the_container() {
    let test = Test::new("oom");
    let mut bundle = Bundle::new(&test, "tail -c 100m /dev/zero; echo survived $?");
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 32 << 20});
    let done = bundle.run(&test);
    assert!(!done.text().contains("survived 0"), "{}", done.text());
    assert!(done.stderr.contains("out of memory"), "{}", done.stderr);
    assert!(
        done.stderr.contains("oom-"),
        "the container is not named: {}",
        done.stderr
    );
}

#[test]
fn the_pids_limit_holds() {
    let test = Test::new("pids");
    let mut bundle = Bundle::new(
        &test,
        "i=0; while [ $i -lt 40 ]; do sleep 5 & i=$((i+1)); done; echo all started",
    );
    bundle.config["linux"]["resources"]["pids"] = json!({"limit": 16});
    let done = bundle.run(&test);
    assert!(!done.text().contains("all started"), "{}", done.text());
    assert!(done.stderr.contains("fork"), "{}", done.stderr);
}

#[test]
fn limits_are_in_the_guests_cgroup() {
    let test = Test::new("cgroup");
    let mut bundle = Bundle::new(
        &test,
        "cd /sys/fs/cgroup; cat cpu.max cpu.weight memory.max pids.max",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
    let options = ["ro", "nosuid", "noexec", "nodev"];
    mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options}));
    bundle.config["linux"]["resources"] = json!({
        "cpu": {"quota": 50_000, "period": 100_000, "shares": 512}, "memory": {"limit": 64 << 20}, "pids": {"limit": 99}
    });
    let done = bundle.run(&test);
    // 1 + (512 - 2) * 9999 / 262142 is 20, as runc and crun convert shares to a weight.
    assert_eq!(
        done.text(),
        format!("50000 100000\n20\n{}\n99", 64 << 20),
        "{}",
        done.stderr
    );
}

#[test]
fn stats_tell_what_the_container_uses() {
    let test = Test::new("stats");
    let sandbox = test.background(&[], &["sh", "-c", "while :; do :; done"]);
    std::thread::sleep(std::time::Duration::from_secs(2));
    let stats: Value = serde_json::from_str(&test.ok(&["stats", "--json", &sandbox.id])).unwrap();
    let find = |name: &str| number(&stats, name).unwrap_or_else(|| panic!("no {name} in {stats}"));
    assert!(find("cpu_usage_us") > 500_000, "{stats}");
    assert!(
        find("memory_current") > 0 && find("pids_current") >= 1,
        "{stats}"
    );
}

/// The first number of this name, at any depth.
fn number(value: &Value, name: &str) -> Option<u64> {
    match value {
        Value::Object(map) => map
            .get(name)
            .and_then(Value::as_u64)
            .or_else(|| map.values().find_map(|v| number(v, name))),
        Value::Array(list) => list.iter().find_map(|v| number(v, name)),
        _ => None,
    }
}

#[test]
fn a_vm_that_the_host_has_no_memory_for_is_reported_as_such() {
    let test = Test::new("hostoom");
    let sandbox = test.background(&["--memory", "256m"], &["sleep", "600"]);
    MemoryCgroup::at("/coffer")
        .child(&sandbox.id)
        .leave(16 << 20);
    // Memory that the guest has not touched yet.
    let _ = sandbox.exec(&["tail", "-c", "150m", "/dev/zero"]);
    sandbox.wait_status("stopped");
    let state = sandbox.state();
    let reason = state["annotations"]["io.coffer.reason"].as_str().unwrap();
    assert!(reason.contains("the host ran out of memory"), "{state}");
}
