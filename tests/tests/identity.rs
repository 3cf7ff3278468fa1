//! Who a process is and what it may do, against the same bundle under runc.

use coffer_tests::Test;
use coffer_tests::bundle::Bundle;
use serde_json::{Value, json};

#[test]
fn a_process_is_the_same_as_under_runc() {
    let test = Test::new("runc");
    let script = "grep -E '^(Cap|NoNewPrivs|Seccomp:|Uid|Gid|Groups|Umask)' /proc/self/status; \
                  ulimit -n; ulimit -Hn; id; pwd; env | sort; cat /proc/self/oom_score_adj";
    let mut bundle = Bundle::new(&test, script);
    let process = &mut bundle.config["process"];
    process["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 44], "umask": 0o027});
    process["cwd"] = json!("/tmp");
    process["env"] = json!(["PATH=/bin", "X=a b", "Y="]);
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
    process["noNewPrivileges"] = json!(true);
    process["oomScoreAdj"] = json!(500);
    for set in ["ambient", "inheritable"] {
        process["capabilities"][set] = json!(["CAP_KILL"]);
    }
    let (ours, theirs) = (bundle.run(&test), bundle.run_with_runc(&test));
    assert_eq!((theirs.code, theirs.stderr.as_str()), (0, ""));
    assert_eq!(ours.text(), theirs.text(), "{}", ours.stderr);
}

#[test]
fn devices_masks_and_read_only_paths_are_the_same_as_under_runc() {
    let test = Test::new("masks");
    let script = "for p in /proc/sys /proc/bus /proc/sysrq-trigger; do [ -w $p ] && touch $p/x 2>&1; done | grep -c Read-only; \
                  ls -l /dev | awk '{print $1, $NF}' | sort; cat /proc/1/comm; hostname; [ -e /proc/timer_list ] && wc -c < /proc/timer_list";
    let mut bundle = Bundle::new(&test, script);
    // This host and the guest differ in cgroup version.
    bundle.config["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|mount| mount["type"] != "cgroup");
    bundle.config["hostname"] = json!("same");
    let (ours, theirs) = (bundle.run(&test), bundle.run_with_runc(&test));
    // Whether /dev/core exists depends on the kernel's configuration.
    let lines = |text: &str| {
        text.lines()
            .filter(|l| !l.starts_with("total") && !l.ends_with("/proc/kcore"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        lines(ours.text()),
        lines(theirs.text()),
        "{} {}",
        ours.stderr,
        theirs.stderr
    );
}

#[test]
fn seccomp_rules_are_enforced() {
    let test = Test::new("seccomp");
    let mut bundle = Bundle::new(
        &test,
        "mkdir /tmp/x || echo refused; chmod 700 /tmp; echo killed $?",
    );
    bundle.config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99},
            {"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_KILL_PROCESS"},
        ]
    });
    let done = bundle.run(&test);
    // 99 is EADDRNOTAVAIL, 159 is 128 + SIGSYS.
    assert!(
        done.stderr.contains("assign requested address"),
        "{}",
        done.stderr
    );
    assert_eq!(done.text(), "refused\nkilled 159", "{}", done.stderr);
    let strict = test.shell(&[], "grep Seccomp: /proc/self/status");
    assert_eq!(
        strict.text().split_whitespace().last(),
        Some("2"),
        "no seccomp profile by default: {}",
        strict.text()
    );
}

#[test]
fn what_is_not_honoured_is_refused_by_name() {
    let test = Test::new("refused");
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 4] = [
        ("intelRdt", |c| {
            c["linux"]["intelRdt"] = json!({"closID": "x"});
        }),
        ("sysctl", |c| {
            c["linux"]["sysctl"] = json!({"kernel.panic": "1"});
        }),
        ("CAP_FLY", |c| {
            c["process"]["capabilities"]["bounding"] = json!(["CAP_FLY"]);
        }),
        ("mounts[", |c| {
            let mount = json!({"destination": "/x", "type": "nfs", "source": "server:/"});
            c["mounts"].as_array_mut().unwrap().push(mount);
        }),
    ];
    for (name, change) in cases {
        let mut bundle = Bundle::new(&test, "true");
        change(&mut bundle.config);
        let done = bundle.run(&test);
        assert!(
            done.code != 0 && done.stderr.contains(name),
            "{name}: {} {}",
            done.code,
            done.stderr
        );
    }
}
