//! `coffer run`: a container's life from one command.

use coffer_tests::{Test, asset, finish, finish_with_input};

#[test]
fn a_container_runs_in_its_own_kernel() {
    let test = Test::new("kernel");
    let done = test.shell(
        &["--hostname", "inside"],
        "uname -r; hostname; echo $$; cat /proc/1/comm; true",
    );
    assert_eq!(done.code, 0, "{}", done.stderr);
    let lines: Vec<_> = done.text().lines().collect();
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(
        lines[0].contains("coffer") && lines[0] != host.trim(),
        "{lines:?}"
    );
    assert_eq!(lines[1..], ["inside", "1", "sh"]);
}

#[test]
fn exit_codes_are_passed_on() {
    let test = Test::new("codes");
    let sandbox = test.background(&[], &["sleep", "600"]);
    for code in [0, 1, 42, 255] {
        assert_eq!(
            sandbox.exec(&["sh", "-c", &format!("exit {code}")]).code,
            code
        );
    }
    assert_eq!(sandbox.exec(&["sh", "-c", "kill -9 $$"]).code, 137);
    assert_eq!(sandbox.exec(&["sh", "-c", "kill -15 $$"]).code, 143);
    assert_eq!(sandbox.exec(&["/no/such/program"]).code, 127);
    assert_eq!(sandbox.exec(&["/etc/passwd"]).code, 126);
    drop(sandbox);
    let rootfs = asset("busybox");
    let run = |program: &str| {
        finish(test.run_command(&["--rootfs", rootfs.to_str().unwrap(), "--", program]))
    };
    assert_eq!(test.shell(&[], "exit 42").code, 42);
    let missing = run("/no/such");
    assert!(
        missing.code == 127 && missing.stderr.contains("/no/such"),
        "{missing:?}"
    );
    let denied = run("/etc/passwd");
    assert!(
        denied.code == 126 && denied.stderr.contains("/etc/passwd"),
        "{denied:?}"
    );
}

#[test]
fn a_debian_root_file_system_runs() {
    let test = Test::new("debian");
    let rootfs = asset("debian");
    let script = "cat /etc/os-release; dpkg -l | wc -l; perl -e 'print 6*7'";
    let done = finish(test.run_command(&[
        "--rootfs",
        rootfs.to_str().unwrap(),
        "--",
        "/bin/bash",
        "-c",
        script,
    ]));
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.text().contains("ID=debian") && done.text().ends_with("42"),
        "{}",
        done.text()
    );
}

#[test]
fn an_image_layout_runs_with_its_config() {
    let test = Test::new("layout");
    let layout = asset("busybox-layout");
    let layout = layout.to_str().unwrap();
    let done = finish(test.run_command(&[layout, "--", "/bin/echo", "from the image"]));
    assert_eq!(
        (done.code, done.text()),
        (0, "from the image"),
        "{}",
        done.stderr
    );
    let done = finish_with_input(
        test.run_command(&["-i", layout]),
        b"echo from the default command\n".to_vec(),
    );
    assert_eq!(
        (done.code, done.text()),
        (0, "from the default command"),
        "{}",
        done.stderr
    );
}

#[test]
fn options_shape_the_container() {
    let test = Test::new("options");
    let volume = test.dir().join("v");
    std::fs::create_dir(&volume).unwrap();
    let bind = format!("{}:/tmp", volume.display());
    let options = [
        "--env",
        "COLOUR=blue",
        "--workdir",
        "/tmp",
        "--user",
        "1000:2000",
        "--cpus",
        "2",
        "--memory",
        "300m",
        "--volume",
        &bind,
        "--read-only",
        "--ulimit",
        "nofile=123:456",
        "--sysctl",
        "net.ipv4.ip_forward=1",
    ];
    let script = "echo $COLOUR; pwd; id -u; id -g; nproc; ulimit -n; cat /proc/sys/net/ipv4/ip_forward; touch /x 2>/dev/null && echo writable; echo end";
    let done = test.shell(&options, script);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let lines: Vec<_> = done.text().lines().collect();
    assert_eq!(
        lines,
        ["blue", "/tmp", "1000", "2000", "2", "123", "1", "end"]
    );
}

#[test]
fn boot_phases_are_shown() {
    let test = Test::new("phases");
    let done = test.shell(&["--timings"], "true");
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.stderr.to_lowercase().contains("agent"),
        "no phase of the agent in: {}",
        done.stderr
    );
    assert!(done.stderr.contains("ms"), "no times in: {}", done.stderr);
}

/// `cargo xtask bench` reads them.
#[test]
fn boot_phases_are_json_too() {
    let test = Test::new("phasesjson");
    let done = test.shell(&["--timings", "--json"], "true");
    let line = done.stderr.lines().find(|line| line.starts_with('{'));
    let timings: serde_json::Value = serde_json::from_str(line.unwrap()).unwrap();
    let phases = timings["phases"].as_array().unwrap();
    let last = |clock: &str| {
        let mut of_clock = phases.iter().rev().filter(|phase| phase["clock"] == clock);
        of_clock.next().unwrap()["at_us"].as_u64().unwrap()
    };
    assert!(last("hypervisor") > 0 && last("guest") > 0, "{timings}");
    assert!(
        timings["total_us"].as_u64() >= Some(last("host")),
        "{timings}"
    );
}
