//! Further processes of a container.

use std::fs;
use std::io::Read;

use anyhow::{Context, ensure};
use serde_json::json;

use crate::container::{self, ChildStdio};
use crate::fixture::{Draft, Guest, eventually, process, same};

pub fn exec_has_its_own_process_block(guest: &Guest) -> anyhow::Result<()> {
    let mut running = Draft::new("exec", "hostname > /etc/name; sleep 1000")?.create()?;
    running.start()?;
    let mut block = process(
        "id -u; id -g; id -G; pwd; echo $WORD; umask; ulimit -n; grep CapEff /proc/self/status; cat /proc/self/oom_score_adj; exit 7",
    );
    block["user"] = json!({"uid": 33, "gid": 34, "additionalGids": [35, 36], "umask": 0o077});
    block["cwd"] = json!("/etc");
    block["env"] = json!(["PATH=/bin", "WORD=other"]);
    block["oomScoreAdj"] = json!(321);
    block["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]);
    block["capabilities"] = json!({"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"],
        "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]});
    let output = running.exec(guest, &block)?;
    same("status", output.status, 7)?;
    let lines: Vec<&str> = output.stdout.lines().collect();
    same(
        "lines",
        lines,
        vec![
            "33",
            "34",
            "34 35 36",
            "/etc",
            "other",
            "0077",
            "77",
            "CapEff:\t0000000000000020",
            "321",
        ],
    )?;
    // It is in the container: its files, its processes, its cgroup.
    let inside = running
        .sh(guest, "cat /etc/name; ls -d /proc/1; cat /proc/self/cgroup")?
        .good()?;
    same(
        "inside",
        inside.lines().collect::<Vec<_>>(),
        vec!["pod", "/proc/1", "0::/"],
    )?;
    let missing = running.exec(
        guest,
        &json!({"args": ["nosuch"], "cwd": "/", "user": {"uid": 0, "gid": 0}}),
    );
    ensure!(
        missing.is_err_and(|e| e.to_string().contains("not found in $PATH")),
        "a program that is missing"
    );
    running.kill_and_delete(guest)
}

pub fn twenty_execs_at_once(guest: &Guest) -> anyhow::Result<()> {
    let mut running = Draft::new("execs", "sleep 1000")?.create()?;
    running.start()?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let running = &running;
        let all: Vec<_> = (0..20)
            .map(|i| scope.spawn(move || running.sh(guest, &format!("echo {i}; exit {i}"))))
            .collect();
        for (i, one) in all.into_iter().enumerate() {
            let output = one.join().expect("a thread")?;
            same("status", output.status, i32::try_from(i)?)?;
            same("output", output.stdout.trim(), &i.to_string())?;
        }
        Ok(())
    })?;
    eventually("only init is left", || {
        running.container.pids().is_ok_and(|p| p == [running.pid])
    })?;
    running.kill_and_delete(guest)
}

pub fn exec_after_the_end(guest: &Guest) -> anyhow::Result<()> {
    let mut running = Draft::new("ended", "true")?.create()?;
    running.start()?;
    running.finish(guest)?.good()?;
    let error = running
        .sh(guest, "true")
        .err()
        .context("exec in an ended container")?;
    ensure!(error.to_string().contains("init has ended"), "{error}");
    Ok(running.container.delete()?)
}

pub fn exec_on_chosen_cpus(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("affinity", "sleep 1000")?
        .set("/process/execCPUAffinity", json!({"final": "0"}));
    let mut running = draft.create()?;
    running.start()?;
    let script = "grep Cpus_allowed_list /proc/self/status";
    let output = running.sh(guest, script)?.good()?;
    same(
        "the container's",
        output.as_str(),
        "Cpus_allowed_list:\t0\n",
    )?;
    let mut block = process(script);
    block["execCPUAffinity"] = json!({"initial": "0", "final": "1"});
    let output = running.exec(guest, &block)?.good()?;
    same("its own", output.as_str(), "Cpus_allowed_list:\t1\n")?;
    running.kill_and_delete(guest)
}

pub fn exec_terminal(guest: &Guest) -> anyhow::Result<()> {
    let mut running = Draft::new("exectty", "sleep 1000")?.create()?;
    running.start()?;
    let mut block = process("tty; stty size; test -c /dev/console || echo no console");
    block["terminal"] = json!(true);
    block["consoleSize"] = json!({"height": 10, "width": 20});
    let block = container::parse(block.to_string().as_bytes())?;
    let stdio = ChildStdio::Terminal {
        rows: 0,
        columns: 0,
    };
    let mut started = running.container.exec(&block, stdio)?;
    let pid = started.pid;
    let mut master: fs::File = started.terminal.take().context("no master")?.into();
    started.release()?;
    let mut text = Vec::new();
    let _ = master.read_to_end(&mut text);
    same("status", guest.wait(pid)?, 0)?;
    let text = String::from_utf8_lossy(&text).replace("\r\n", "\n");
    same("text", text.as_str(), "/dev/pts/0\n10 20\nno console\n")?;
    running.kill_and_delete(guest)
}

pub fn streams_are_all_that_is_open(guest: &Guest) -> anyhow::Result<()> {
    let script = "exec ls /proc/self/fd";
    let mut running = Draft::new("fds", "ls /proc/self/fd; sleep 1000")?.create()?;
    running.start()?;
    // ls has the directory itself open as 3.
    let output = running.sh(guest, script)?.good()?;
    same(
        "descriptors of an exec",
        output.split_whitespace().collect::<Vec<_>>(),
        vec!["0", "1", "2", "3"],
    )?;
    running.container.kill_all()?;
    let output = running.finish(guest)?.stdout;
    same(
        "descriptors of init",
        output.split_whitespace().collect::<Vec<_>>(),
        vec!["0", "1", "2", "3"],
    )?;
    Ok(running.container.delete()?)
}
