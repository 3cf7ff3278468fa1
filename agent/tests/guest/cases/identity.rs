//! Users, capabilities, seccomp, rlimits and what else a process is given.

use anyhow::ensure;
use serde_json::{Value, json};

use crate::fixture::{Draft, Guest, same};

const CAPS: &str = "grep '^Cap' /proc/self/status | tr -d ' '";

/// CapInh, CapPrm, CapEff, CapBnd, CapAmb
fn sets(output: &str) -> Vec<u64> {
    let value = |line: &str| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok();
    output.lines().filter_map(value).collect()
}

pub fn capabilities(guest: &Guest) -> anyhow::Result<()> {
    let (kill, chown, net) = (1 << 5, 1 << 0, 1 << 12);
    let draft = Draft::new(
        "caps",
        &format!("{CAPS}; chown 1:1 /etc/passwd && echo chowned; hostname x || echo denied"),
    )?
    .set(
        "/process/capabilities",
        json!({
            "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_ADMIN"],
            "permitted": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_ADMIN"],
            "effective": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_ADMIN"],
            "inheritable": [],
        }),
    );
    let output = draft.run(guest)?.good()?;
    let all = kill | chown | net;
    same("sets", sets(&output), vec![0, all, all, all, 0])?;
    ensure!(
        output.contains("chowned") && output.contains("denied"),
        "{output}"
    );
    Ok(())
}

pub fn no_capabilities(guest: &Guest) -> anyhow::Result<()> {
    let mut draft = Draft::new("nocaps", CAPS)?;
    draft.spec["process"]
        .as_object_mut()
        .unwrap()
        .remove("capabilities");
    same("sets", sets(&draft.run(guest)?.good()?), vec![0; 5])
}

pub fn ambient_capabilities(guest: &Guest) -> anyhow::Result<()> {
    let bind = 1 << 10;
    let set = json!(["CAP_NET_BIND_SERVICE"]);
    let draft = Draft::new("ambient", CAPS)?
        .set("/process/user", json!({"uid": 33, "gid": 33}))
        .set("/process/capabilities", json!({
            "bounding": ["CAP_NET_BIND_SERVICE", "CAP_KILL"], "permitted": set.clone(), "effective": set.clone(),
            "inheritable": set.clone(), "ambient": set,
        }));
    same(
        "sets",
        sets(&draft.run(guest)?.good()?),
        vec![bind, bind, bind, bind | 1 << 5, bind],
    )?;
    // Without ambient ones a user other than root has none after execve, whatever was permitted.
    let draft = Draft::new("ambient", CAPS)?.set("/process/user", json!({"uid": 33, "gid": 33}));
    let output = draft.run(guest)?.good()?;
    let values = sets(&output);
    ensure!(
        values[1] == 0 && values[2] == 0 && values[3] != 0,
        "{output}"
    );
    Ok(())
}

pub fn user_and_groups(guest: &Guest) -> anyhow::Result<()> {
    let script = "id -u; id -g; grep Groups /proc/self/status; umask; touch /tmp/f; stat -c '%u %g %a' /tmp/f; cat /tmp/root";
    let draft = Draft::new("user2", script)?
        .set(
            "/process/user",
            json!({"uid": 1001, "gid": 1002, "additionalGids": [7, 8, 9], "umask": 0o027}),
        )
        .mount("tmpfs", "/tmp", "tmpfs", &["mode=1777"]);
    let output = draft.run(guest)?;
    same(
        "user",
        output.stdout.as_str(),
        "1001\n1002\nGroups:\t7 8 9 \n0027\n1001 1002 640\n",
    )?;
    let output = Draft::new("user2", "umask; grep Groups /proc/self/status")?
        .run(guest)?
        .good()?;
    same("defaults", output.as_str(), "0022\nGroups:\t \n")
}

pub fn home_and_environment(guest: &Guest) -> anyhow::Result<()> {
    let run = |uid: u32, env: Value| -> anyhow::Result<String> {
        Draft::new("env", "")?
            .set("/process/args", json!(["/bin/env"]))
            .set("/process/user", json!({"uid": uid, "gid": 0}))
            .set("/process/env", env)
            .run(guest)?
            .good()
    };
    same(
        "root",
        run(0, json!(["A=1 2", "PATH=/bin"]))?.as_str(),
        "A=1 2\nPATH=/bin\nHOME=/root\n",
    )?;
    same("web", run(33, json!([]))?.as_str(), "HOME=/srv/web\n")?;
    same("nobody knows", run(5, json!([]))?.as_str(), "HOME=/\n")?;
    same("own", run(0, json!(["HOME=/own"]))?.as_str(), "HOME=/own\n")
}

pub fn no_new_privileges(guest: &Guest) -> anyhow::Result<()> {
    let script = "grep NoNewPrivs /proc/self/status";
    let output = Draft::new("nnp", script)?
        .set("/process/noNewPrivileges", json!(true))
        .run(guest)?
        .good()?;
    same("with", output.as_str(), "NoNewPrivs:\t1\n")?;
    same(
        "without",
        Draft::new("nnp", script)?.run(guest)?.good()?.as_str(),
        "NoNewPrivs:\t0\n",
    )
}

fn filter(action: &str, errno: Option<u32>, names: &[&str]) -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": names, "action": action, "errnoRet": errno}],
    })
}

pub fn seccomp_errno(guest: &Guest) -> anyhow::Result<()> {
    let calls = ["mkdir", "mkdirat", "a_call_of_the_future"];
    let draft = Draft::new(
        "seccomp",
        "mkdir /tmp/d; grep Seccomp: /proc/self/status; sleep 1000",
    )?
    .set("/process/noNewPrivileges", json!(true))
    .set("/linux/seccomp", filter("SCMP_ACT_ERRNO", Some(28), &calls));
    let mut running = draft.create()?;
    running.start()?;
    // A further process has the container's filter as well.
    let exec = running.sh(guest, "mkdir /tmp/e; echo $?")?;
    ensure!(
        exec.stderr.contains("No space left") && exec.stdout == "1\n",
        "{exec:?}"
    );
    running.container.kill_all()?;
    let output = running.finish(guest)?;
    ensure!(output.stderr.contains("No space left"), "{output:?}");
    same("mode", output.stdout.trim(), "Seccomp:\t2")?;
    Ok(running.container.delete()?)
}

pub fn seccomp_without_no_new_privs(guest: &Guest) -> anyhow::Result<()> {
    // The filter forbids what is needed to become the user unless it is loaded in time.
    let draft = Draft::new("seccomp2", "mkdir /tmp/d; id -u")?
        .set("/process/user", json!({"uid": 33, "gid": 33}))
        .set(
            "/linux/seccomp",
            filter("SCMP_ACT_ERRNO", None, &["mkdir", "mkdirat"]),
        )
        .mount("tmpfs", "/tmp", "tmpfs", &["mode=1777"]);
    let output = draft.run(guest)?;
    same("user", output.stdout.as_str(), "33\n")?;
    ensure!(
        output.stderr.contains("Operation not permitted"),
        "{}",
        output.stderr
    );
    Ok(())
}

pub fn seccomp_kill(guest: &Guest) -> anyhow::Result<()> {
    for action in ["SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL", "SCMP_ACT_TRAP"] {
        let draft = Draft::new("seccomp3", "mkdir /tmp/d; echo $?")?
            .set("/process/noNewPrivileges", json!(true))
            .set(
                "/linux/seccomp",
                filter(action, None, &["mkdir", "mkdirat"]),
            );
        let output = draft.run(guest)?;
        // The shell says how mkdir ended, by SIGSYS; a shell that runs it as its last command has that status itself.
        ensure!(
            output.stdout == "159\n" || output.status == 159,
            "{action}: {output:?}"
        );
    }
    Ok(())
}

pub fn seccomp_arguments(guest: &Guest) -> anyhow::Result<()> {
    // kill(1, …) is forbidden, all other kill(2)s are not; an allow list with one condition per bit of a flag.
    let rule = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13,
             "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]},
            {"names": ["umask"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5,
             "args": [{"index": 0, "value": 0o077, "valueTwo": 0o022, "op": "SCMP_CMP_MASKED_EQ"}]},
        ],
    });
    let draft = Draft::new("seccomp4", "kill -0 1; sleep 100 & kill $! && echo killed")?
        .set("/process/noNewPrivileges", json!(true))
        .set("/linux/seccomp", rule);
    let output = draft.run(guest)?;
    ensure!(
        output.stdout == "killed\n" && output.stderr.contains("Permission denied"),
        "{output:?}"
    );
    Ok(())
}

/// An allow list gives EPERM to what it leaves out, and ENOSYS to calls that nobody knew when it was written.
pub fn seccomp_and_new_system_calls(guest: &Guest) -> anyhow::Result<()> {
    let mut names: Vec<String> = Vec::new();
    for number in 0..=334 {
        let call = libseccomp::ScmpSyscall::from_raw_syscall(number);
        names.extend(
            call.get_name()
                .ok()
                .filter(|name| name != "mkdir" && name != "mkdirat"),
        );
    }
    for number in 424..=450 {
        names.extend(
            libseccomp::ScmpSyscall::from_raw_syscall(number)
                .get_name()
                .ok(),
        );
    }
    let profile = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
    });
    let draft = Draft::new("seccomp5", "")?
        .set("/process/args", json!(["/probe", "460", "83"]))
        .set("/process/noNewPrivileges", json!(true))
        .set("/linux/seccomp", profile);
    draft.add_probe()?;
    let output = draft.run(guest)?.good()?;
    let (enosys, eperm) = (libc::ENOSYS, libc::EPERM);
    same(
        "errno of 460 and of mkdir",
        output.as_str(),
        &format!("{enosys}\n{eperm}\n"),
    )
}

pub fn rlimits(guest: &Guest) -> anyhow::Result<()> {
    let limit =
        |kind: &str, soft: u64, hard: u64| json!({"type": kind, "soft": soft, "hard": hard});
    let draft = Draft::new(
        "rlimits",
        "cat /proc/self/limits; ulimit -n 5000 || echo above",
    )?
    .set(
        "/process/rlimits",
        json!([
            limit("RLIMIT_NOFILE", 1024, 4096),
            limit("RLIMIT_CORE", 0, 0),
            limit("RLIMIT_NPROC", 500, u64::MAX),
            limit("RLIMIT_MEMLOCK", 65536, 65536),
            limit("RLIMIT_RTTIME", 1000, 2000),
        ]),
    );
    let output = draft.run(guest)?;
    let squeezed: Vec<String> = output
        .stdout
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    for expected in [
        "Max open files 1024 4096 files",
        "Max core file size 0 0 bytes",
        "Max processes 500 unlimited processes",
        "Max locked memory 65536 65536 bytes",
        "Max realtime timeout 1000 2000 us",
    ] {
        ensure!(
            squeezed.iter().any(|line| line == expected),
            "no {expected:?} in {squeezed:?}"
        );
    }
    ensure!(
        output.stdout.contains("above") || output.status != 0,
        "the hard limit was passed"
    );
    Ok(())
}

pub fn scheduling(guest: &Guest) -> anyhow::Result<()> {
    // Fields 19 and 41 of stat: nice and policy.
    let script = "cut -d' ' -f19,41 /proc/self/stat";
    let run = |scheduler: Value| -> anyhow::Result<String> {
        Draft::new("sched", script)?
            .set("/process/scheduler", scheduler)
            .run(guest)?
            .good()
    };
    same(
        "batch",
        run(json!({"policy": "SCHED_BATCH", "nice": 5}))?.as_str(),
        "5 3\n",
    )?;
    same(
        "fifo",
        run(json!({"policy": "SCHED_FIFO", "priority": 10}))?.as_str(),
        "0 1\n",
    )?;
    same(
        "idle",
        run(json!({"policy": "SCHED_IDLE"}))?.as_str(),
        "0 5\n",
    )?;
    let draft = Draft::new("ionice", "sleep 1000")?.set(
        "/process/ioPriority",
        json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0}),
    );
    let mut running = draft.create()?;
    same("I/O class", io_class(running.pid.as_raw()), 3)?;
    running.drop_started();
    running.finish(guest)?;
    Ok(running.container.delete()?)
}

#[allow(unsafe_code, reason = "ioprio_get(2) has no wrapper")]
fn io_class(pid: i32) -> i64 {
    // SAFETY: takes two integers; 1 is IOPRIO_WHO_PROCESS.
    let value = unsafe { libc::syscall(libc::SYS_ioprio_get, 1, pid) };
    value >> 13
}

pub fn oom_score(guest: &Guest) -> anyhow::Result<()> {
    let script = "cat /proc/self/oom_score_adj";
    // PID 1 has -1000, which no container may inherit.
    same(
        "default",
        Draft::new("oomscore", script)?.run(guest)?.good()?.as_str(),
        "0\n",
    )?;
    let output = Draft::new("oomscore", script)?
        .set("/process/oomScoreAdj", json!(-998))
        .run(guest)?
        .good()?;
    same("own", output.as_str(), "-998\n")
}

pub fn personality(guest: &Guest) -> anyhow::Result<()> {
    let output = Draft::new("persona", "uname -m")?
        .set("/linux/personality", json!({"domain": "LINUX32"}))
        .run(guest)?;
    same("machine", output.good()?.as_str(), "i686\n")
}
