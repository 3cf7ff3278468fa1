//! Containers as units of a systemd that runs: quadlets, and what podman makes itself.

use super::DIFFERENCES;
use coffer_tests::podman::{IMAGE, Podman, Report, compare_within, private_network};
use coffer_tests::systemd::Systemd;
use coffer_tests::{Test, wait_for};
use std::fs;

/// Where quadlets are, and the service that becomes of the test's.
const QUADLETS: &str = "/etc/containers/systemd";
const SERVICE: &str = "web.service";
/// podman asks systemd for the cgroups.
const MANAGER: &str = "--cgroup-manager=systemd";
/// The units of Coffer's supervisors.
const SUPERVISORS: &str = "coffer-*.service";

#[test]
fn units_end_with_their_containers_and_leave_nothing() {
    let test = Test::new("units");
    private_network();
    let systemd = Systemd::boot(&test);
    compare_within(&test, &systemd.entrance(), DIFFERENCES, |podman, report| {
        quadlet_is_stopped(podman, &systemd, report);
        quadlet_ends(podman, &systemd, report);
        monitor_is_killed(podman, &systemd, report);
        if podman.is_coffer() {
            supervisor_is_stopped(podman, &systemd, report);
        }
    });
}

/// Writes a quadlet whose container runs a script, and starts its service.
fn start(podman: &Podman<'_>, systemd: &Systemd, script: &str) -> i32 {
    let global = podman.storage().join(" ") + " " + MANAGER;
    let config = podman.config_file();
    let quadlet = format!(
        "[Container]\nImage={IMAGE}\nContainerName=web\nNetwork=none\nPull=never\nGlobalArgs={global}\nExec=sh -c \"{script}\"\n\
         [Service]\nEnvironment=CONTAINERS_CONF={}\n",
        config.display()
    );
    fs::create_dir_all(QUADLETS).unwrap();
    fs::write(format!("{QUADLETS}/web.container"), quadlet).unwrap();
    assert_eq!(systemd.systemctl(&["daemon-reload"]).code, 0);
    systemd.systemctl(&["start", SERVICE]).code
}

/// The cgroup of the one supervisor there is, from systemd.
fn supervisors_cgroup(systemd: &Systemd) -> String {
    let units = systemd.units(SUPERVISORS);
    let unit = units.split_whitespace().next().unwrap_or_default();
    systemd.property(unit, "ControlGroup")
}

fn quadlet_is_stopped(podman: &Podman<'_>, systemd: &Systemd, report: &mut Report) {
    let started = start(
        podman,
        systemd,
        "trap 'exit 0' TERM; while :; do sleep 1; done",
    );
    report.row("quadlet: start", started, 0);
    report.row(
        "quadlet: state",
        systemd.property(SERVICE, "ActiveState"),
        "active",
    );
    if podman.is_coffer() {
        let cgroup = supervisors_cgroup(systemd);
        report.row(
            "quadlet: slice of the supervisor",
            cgroup.starts_with("/system.slice/coffer-"),
            true,
        );
        let log = podman.supervisors_log("web");
        report.row("quadlet: warnings", log.contains("WARN"), false);
    }
    report.row(
        "quadlet: exec",
        podman.ok(&["exec", "web", "echo", "inside"]),
        "inside",
    );
    report.row(
        "quadlet: stop",
        systemd.systemctl(&["stop", SERVICE]).code,
        0,
    );
    report.row(
        "quadlet: result",
        systemd.property(SERVICE, "Result"),
        "success",
    );
    nothing_is_left(podman, systemd, report);
}

fn quadlet_ends(podman: &Podman<'_>, systemd: &Systemd, report: &mut Report) {
    report.row(
        "quadlet that ends: start",
        start(podman, systemd, "sleep 2; exit 3"),
        0,
    );
    systemd.wait_for_state(SERVICE, "failed");
    report.row(
        "quadlet that ends: status",
        systemd.property(SERVICE, "ExecMainStatus"),
        3,
    );
    let reset = systemd.systemctl(&["reset-failed", SERVICE]);
    report.row("quadlet that ends: reset", reset.code, 0);
    nothing_is_left(podman, systemd, report);
}

/// A container that sleeps, in the units that podman makes for it; gives its id.
fn run_detached(podman: &Podman<'_>, name: &str) -> String {
    let run = [MANAGER, "run", "--detach", "--network=none", name];
    podman.ok(&[&run[..], &[IMAGE, "sleep", "600"]].concat())
}

/// conmon's own unit is killed: the container is nobody's then, and goes with `podman rm`.
fn monitor_is_killed(podman: &Podman<'_>, systemd: &Systemd, report: &mut Report) {
    let id = run_detached(podman, "--name=m");
    let monitor = format!("libpod-conmon-{id}.scope");
    report.row(
        "monitor: unit",
        systemd.property(&monitor, "ActiveState"),
        "active",
    );
    let killed = systemd.systemctl(&["kill", "--signal=KILL", &monitor]);
    report.row("monitor: killed", killed.code, 0);
    if podman.is_coffer() {
        let cgroup = supervisors_cgroup(systemd);
        report.row(
            "monitor: the supervisor lives on",
            cgroup,
            format!("/machine.slice/coffer-{id}.service"),
        );
    }
    // The first only finds that nobody can tell the exit code.
    let remove = [MANAGER, "rm", "--force", "--ignore", "--time=0", "m"];
    podman.call(&remove);
    podman.ok(&remove);
    nothing_is_left(podman, systemd, report);
}

/// As an administrator or the end of the host does it. podman gets the code that says that the VM ended, not the program.
fn supervisor_is_stopped(podman: &Podman<'_>, systemd: &Systemd, report: &mut Report) {
    let id = run_detached(podman, "--name=s");
    let unit = format!("coffer-{id}.service");
    let stopped = systemd.systemctl(&["stop", &unit]);
    report.row("supervisor stopped: systemctl", stopped.code, 0);
    let code = podman.ok(&[MANAGER, "wait", "s"]);
    report.row("supervisor stopped: exit code", code, "125");
    podman.ok(&[MANAGER, "rm", "s"]);
    nothing_is_left(podman, systemd, report);
}

fn nothing_is_left(podman: &Podman<'_>, systemd: &Systemd, report: &mut Report) {
    let left = || {
        let containers = podman.ok(&["ps", "--all", "--quiet"]);
        let units = systemd.units(SUPERVISORS) + &systemd.units("libpod-*");
        format!("{containers}{units}{}", cgroups(systemd))
    };
    let mut last = String::new();
    let mut tries = 0;
    wait_for("what is left", || {
        last = left();
        tries += 1;
        last.is_empty() || tries == 10
    });
    report.row("nothing is left", last, "");
}

/// Cgroups below systemd's slices that are a container's or a supervisor's.
fn cgroups(systemd: &Systemd) -> String {
    let find = "cd /sys/fs/cgroup && find . -name 'libpod-*' -o -name 'coffer*'";
    let found = coffer_tests::finish(systemd.command(&["sh", "-c", find]));
    found.text().to_owned()
}
