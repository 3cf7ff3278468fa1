//! A systemd of a test's own: the first process of new PID, mount and cgroup namespaces. For the test node only, where no other
//! systemd runs and all else that it may touch goes with the node.

use crate::{Finished, PATIENCE, Test, finish, wait_for};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What it boots to: services have this before them.
const TARGET: &str = "basic.target";
/// Units of that target that take long, or change the machine.
const LEFT_OUT: [&str; 12] = [
    "docker.socket",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-modules-load.service",
    "systemd-remount-fs.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-setup.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup-dev-early.service",
];
/// Enters the cgroup `$1` as its only process, for systemd passes its controllers on; a cgroup namespace begins there.
const JOIN: &str = "echo 0 > \"$1\"/cgroup.procs && shift && exec unshare --cgroup sh -c \"$@\"";
/// Enters the cgroup `$1`, and then the namespaces that the rest names.
const ENTER: &str = "echo 0 > \"$1\"/cgroup.procs && shift && exec nsenter -m -p -C \"$@\"";
/// Where commands begin that are no unit's. A process can't move into cgroups of the namespace from outside.
const CALLERS: &str = "callers";
/// Makes the new namespaces ready; `$1` is a directory with what is to be in /run, `$2` the target.
const INIT: &str = "set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
cp -a \"$1\"/. /run
mkdir -p /run/lock
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
[ -s /etc/machine-id ] || printf '%032x\\n' 1 > /etc/machine-id
touch /etc/.updated /var/.updated
exec env -i container=test \"PATH=$PATH\" /usr/lib/systemd/systemd --system --unit=\"$2\"";

/// A systemd that has booted. Dropping it ends it and all it runs.
#[derive(Debug)]
pub struct Systemd {
    /// `unshare`, the parent of its first process.
    process: Child,
    pid: String,
    cgroup: PathBuf,
}

impl Systemd {
    pub fn boot(test: &Test) -> Self {
        assert!(
            Path::new("/usr/lib/node/init").exists(),
            "a systemd of a test's own is for the test node"
        );
        let cgroup = Path::new("/sys/fs/cgroup").join(test.id());
        fs::create_dir_all(cgroup.join(CALLERS)).expect("the node has cgroup v2 to itself");
        let run = test.dir().join("run-of-systemd");
        let masks = run.join("systemd/system");
        fs::create_dir_all(&masks).expect("scratch is ours");
        for unit in LEFT_OUT {
            symlink("/dev/null", masks.join(unit)).expect("scratch is ours");
        }
        let log = fs::File::create(test.dir().join("systemd.log")).expect("scratch is ours");
        let process = Command::new("unshare")
            .args(["--pid", "--mount", "--fork", "--kill-child"])
            .args(["sh", "-c", JOIN, "sh"])
            .args([cgroup.as_os_str(), INIT.as_ref(), "init".as_ref()])
            .args([run.as_os_str(), TARGET.as_ref()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("descriptors are left"))
            .stderr(log)
            .spawn()
            .expect("the node has unshare");
        let children = format!("/proc/{0}/task/{0}/children", process.id());
        let mut booted = Self {
            process,
            pid: String::new(),
            cgroup,
        };
        wait_for("the first process of systemd", || {
            let pid = fs::read_to_string(&children).unwrap_or_default();
            pid.trim().clone_into(&mut booted.pid);
            let name = fs::read_to_string(format!("/proc/{}/comm", booted.pid));
            name.is_ok_and(|name| name.trim_end() == "systemd")
        });
        wait_for("systemd to boot", || {
            let state = booted.systemctl(&["is-active", TARGET]);
            state.text() == "active"
        });
        booted
    }

    /// The words before a command that is to run under it.
    pub fn entrance(&self) -> Vec<String> {
        let cgroup = self.cgroup.join(CALLERS);
        let cgroup = cgroup.to_str().expect("UTF-8");
        let words = ["sh", "-c", ENTER, "sh", cgroup, "-t", &self.pid];
        words.map(str::to_owned).to_vec()
    }

    /// A command that runs under it.
    pub fn command(&self, words: &[&str]) -> Command {
        let entrance = self.entrance();
        let mut command = Command::new(&entrance[0]);
        command.args(&entrance[1..]).args(words);
        command.stdin(Stdio::null());
        command
    }

    pub fn systemctl(&self, args: &[&str]) -> Finished {
        finish(self.command(&[&["systemctl"], args].concat()))
    }

    /// One property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> String {
        let shown = self.systemctl(&["show", "--value", "--property", name, unit]);
        shown.text().to_owned()
    }

    /// Waits until a unit is in this state.
    pub fn wait_for_state(&self, unit: &str, state: &str) {
        wait_for(
            &format!("{unit} to be {state} (within {PATIENCE:?})"),
            || self.property(unit, "ActiveState") == state,
        );
    }

    /// Units that are loaded, whose names match.
    pub fn units(&self, pattern: &str) -> String {
        let args = ["list-units", "--all", "--plain", "--no-legend", pattern];
        self.systemctl(&args).text().to_owned()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let removed = || remove(&self.cgroup);
        wait_for("the cgroups of systemd to be empty", removed);
    }
}

/// Tries to remove a cgroup with those in it.
fn remove(cgroup: &Path) -> bool {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    fs::remove_dir(cgroup).is_ok() || !cgroup.exists()
}
