//! Containers as services of systemd, with the test in systemd's place.

use super::{DIFFERENCES, read};
use coffer_tests::podman::{IMAGE, compare};
use coffer_tests::{PATIENCE, finish, wait_for};
use std::fs;
use std::os::unix::net::UnixDatagram;

/// What a unit of `Type=notify` does, as quadlet and `podman generate systemd` write it: it hears which process is the main one, and
/// ends with that.
#[test]
fn a_service_ends_with_its_container() {
    compare("podunit", DIFFERENCES, |podman, report| {
        let (socket, id_file) = (podman.dir().join("notify"), podman.dir().join("cid"));
        let systemd = UnixDatagram::bind(&socket).unwrap();
        systemd.set_read_timeout(Some(PATIENCE)).unwrap();
        let id_file = id_file.to_str().unwrap();
        let mut run = podman.command(&[
            "run",
            "--cidfile",
            id_file,
            "--cgroups=no-conmon",
            "--rm",
            "--sdnotify=conmon",
            "--detach",
            "--replace",
            "--name",
            "unit",
            "--network",
            "none",
            IMAGE,
            "sleep",
            "600",
        ]);
        run.env("NOTIFY_SOCKET", &socket);
        let done = finish(run);
        assert_eq!(done.code, 0, "{done:?}");
        let mut message = [0; 4096];
        let length = systemd.recv(&mut message).unwrap();
        let message = String::from_utf8_lossy(&message[..length]).into_owned();
        report.row("unit: ready", message.contains("READY=1"), true);
        let main = message
            .lines()
            .find_map(|line| line.strip_prefix("MAINPID="));
        let main = format!("/proc/{}", main.unwrap_or_default());
        let name = read(format!("{main}/comm").as_ref());
        report.row("unit: main process", name.trim_end(), "conmon");
        podman.ok(&["stop", "--cidfile", id_file, "--time", "1"]);
        wait_for("the main process to end", || {
            // Nobody reaps it before the test's end, and a process that ended has no command line.
            fs::read(format!("{main}/cmdline")).map_or(true, |line| line.is_empty())
        });
        let left = podman.ok(&["ps", "--all", "--quiet"]);
        report.row("unit: nothing is left", left, "");
    });
}
