//! podman over Coffer and over the runtime it is compared with.
//!
//! A scenario runs once with each runtime and reports rows: what was seen under a name, and what is expected. A row fails
//! if either runtime shows something else, unless a [`Difference`] says what Coffer shows there, and why.

use crate::oci::{is_wanted, program};
use crate::{Finished, Test, asset, finish, finish_with_input, host, product};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The busybox of the test assets, as podman calls it.
pub const IMAGE: &str = "localhost/busybox:latest";

/// A row in which Coffer differs from other runtimes. Each has its place in `docs/limitations.md`.
#[derive(Debug)]
pub struct Difference {
    pub row: &'static str,
    pub coffer: &'static str,
    pub reason: &'static str,
}

/// podman with storage, networks, locks and runtime state of its own.
#[derive(Debug)]
pub struct Podman<'t> {
    test: &'t Test,
    runtime: &'static str,
    dir: PathBuf,
    /// Words before each command; none where podman runs as the test does.
    entrance: Vec<String>,
}

impl<'t> Podman<'t> {
    /// podman for a runtime: "coffer", "runc" or "crun"; with the image.
    pub fn new(test: &'t Test, runtime: &'static str) -> Self {
        Self::within(test, runtime, Vec::new())
    }

    /// The same where these words lead to, as into the namespaces of a systemd.
    fn within(test: &'t Test, runtime: &'static str, entrance: Vec<String>) -> Self {
        let dir = test.dir().join(format!("podman-{runtime}"));
        for name in ["", "bin", "networks"] {
            fs::create_dir(dir.join(name)).expect("scratch is ours");
        }
        let podman = Self {
            test,
            runtime,
            dir,
            entrance,
        };
        let program = if podman.is_coffer() {
            podman.wrapper()
        } else {
            program(runtime)
        };
        fs::write(podman.config_file(), podman.config(&program)).expect("scratch is ours");
        let archive = podman.dir.join("image.tar");
        let archive = archive.to_str().expect("UTF-8");
        let layout = asset("busybox-layout");
        host(
            "tar",
            &["-C", layout.to_str().expect("UTF-8"), "-cf", archive, "."],
        )
        .expect("tar runs");
        podman.ok(&["load", "--quiet", "--input", archive]);
        podman
    }

    /// podman gives the runtime no state root, so a script of its name does.
    fn wrapper(&self) -> PathBuf {
        let path = self.dir.join("bin/coffer");
        let (program, root) = (product("coffer"), self.test.root());
        let script = format!("#!/bin/sh\nexec {program:?} --root {root:?} \"$@\"\n");
        fs::write(&path, script).expect("scratch is ours");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
        path
    }

    fn config(&self, program: &Path) -> String {
        let (dir, name) = (self.dir.display(), self.runtime);
        // Lower limits than podman's own: raising them takes CAP_SYS_RESOURCE, which a test machine may not have.
        format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\nlog_driver = \"k8s-file\"\n\
             [network]\nnetwork_backend = \"netavark\"\nnetwork_config_dir = \"{dir}/networks\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nlock_type = \"file\"\n\
             tmp_dir = \"{dir}/tmp\"\nruntime = \"{name}\"\nruntime_supports_json = [\"{name}\"]\n\
             helper_binaries_dir = [\"/usr/lib/podman\", \"/usr/libexec/podman\", \"/usr/bin\"]\n\
             init_path = \"/usr/bin/catatonit\"\n\
             [engine.runtimes]\n{name} = [{program:?}]\n"
        )
    }

    pub fn is_coffer(&self) -> bool {
        self.runtime == "coffer"
    }

    pub fn runtime(&self) -> &'static str {
        self.runtime
    }

    /// Its configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.dir.join("containers.conf")
    }

    /// The log of the supervisor of a container.
    pub fn supervisors_log(&self, name: &str) -> String {
        let id = self.inspect(name, ".Id");
        let log = self.test.root().join(id).join("supervisor.log");
        fs::read_to_string(log).unwrap_or_else(|error| error.to_string())
    }

    /// A directory for files of the scenario.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where buildah and skopeo find this podman's images, as `containers-storage:[…]`.
    pub fn storage(&self) -> [String; 6] {
        // vfs works everywhere; overlay is what people have.
        let driver = if self.test.hypervisor() == "coffer-vmm" {
            "overlay"
        } else {
            "vfs"
        };
        let path = |name: &str| self.dir.join(name).to_str().expect("UTF-8").to_owned();
        [
            "--root".into(),
            path("root"),
            "--runroot".into(),
            path("run"),
            "--storage-driver".into(),
            driver.into(),
        ]
    }

    /// A program of podman's family with this storage and configuration.
    pub fn tool(&self, program: &str, args: &[&str]) -> Command {
        let mut words = self.entrance.iter().map(String::as_str).chain([program]);
        let mut command = Command::new(words.next().expect("there is a program"));
        command
            .args(words)
            .args(self.storage())
            .args(args)
            // conmon inherits it, and leaves a file there when memory runs out.
            .current_dir(&self.dir)
            .env("CONTAINERS_CONF", self.config_file())
            .stdin(Stdio::null());
        command
    }

    pub fn command(&self, args: &[&str]) -> Command {
        self.tool("podman", args)
    }

    pub fn call(&self, args: &[&str]) -> Finished {
        finish(self.command(args))
    }

    pub fn call_with_input(&self, args: &[&str], input: &str) -> Finished {
        finish_with_input(self.command(args), input.as_bytes().to_vec())
    }

    /// Runs a command that must succeed; gives its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let done = self.call(args);
        assert_eq!(
            done.code, 0,
            "{}: podman {args:?}: {}",
            self.runtime, done.stderr
        );
        done.text().to_owned()
    }

    /// One field of `podman inspect`.
    pub fn inspect(&self, name: &str, field: &str) -> String {
        self.ok(&["inspect", "--format", &format!("{{{{{field}}}}}"), name])
    }

    /// `podman run --rm` without a network; gives what it printed, and its code on a line of its own.
    pub fn run(&self, options: &[&str], command: &[&str]) -> String {
        let args = [
            &["run", "--rm", "--network", "none"],
            options,
            &[IMAGE],
            command,
        ]
        .concat();
        shown(&self.call(&args))
    }

    /// `podman run --detach` without a network.
    pub fn run_detached(&self, name: &str, options: &[&str], command: &[&str]) {
        let head = ["run", "--detach", "--network", "none", "--name", name];
        self.ok(&[&head[..], options, &[IMAGE], command].concat());
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        for args in [
            &["pod", "rm", "--force", "--all", "--time", "0"][..],
            &["rm", "--force", "--all", "--time", "0"],
        ] {
            let done = self.call(args);
            if done.code != 0 && !std::thread::panicking() {
                panic!("{}: podman {args:?}: {}", self.runtime, done.stderr);
            }
        }
        // The storage driver's own mount keeps the directory busy.
        let _ = Command::new("umount")
            .arg(self.dir.join("root/overlay"))
            .stderr(Stdio::null())
            .status();
    }
}

/// A network namespace for the test: bridges, port mappings and rules of podman's go with it.
pub fn private_network() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("the tests run as root");
    host("ip", &["link", "set", "lo", "up"]).expect("ip runs");
}

/// Standard output and the code, as one text.
pub fn shown(done: &Finished) -> String {
    let text = done.text();
    let gap = if text.is_empty() { "" } else { "\n" };
    format!("{text}{gap}code {}", done.code)
}

/// What one runtime showed.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    name: &'static str,
    seen: String,
    expected: String,
}

impl Report {
    // Rows are given numbers, truths and strings alike, and most of them just made.
    #[allow(clippy::needless_pass_by_value)]
    pub fn row(&mut self, name: &'static str, seen: impl ToString, expected: impl ToString) {
        self.rows.push(Row {
            name,
            seen: seen.to_string(),
            expected: expected.to_string(),
        });
    }
}

/// What to look at inside a container: rows of one table share a container that has the options of all.
#[derive(Debug)]
pub struct Inside<'a> {
    pub name: &'static str,
    pub options: &'a [&'a str],
    pub script: &'a str,
    pub expected: &'a str,
}

/// Marks in the output where a row begins.
const MARK: char = '\u{1e}';

/// Runs the table's rows in one container, each with its name.
pub fn inside(podman: &Podman<'_>, report: &mut Report, options: &[&str], table: &[Inside<'_>]) {
    let mut words = vec!["run", "--rm"];
    words.extend(options);
    let mut script = String::new();
    for row in table {
        words.extend(row.options);
        writeln!(
            script,
            "printf '\\036{}\\n'; ( {} ) 2>&1",
            row.name, row.script
        )
        .expect("a string grows");
    }
    words.extend([IMAGE, "sh", "-c", &script]);
    let done = podman.call(&words);
    let seen: BTreeMap<&str, &str> = done
        .text()
        .split(MARK)
        .filter_map(|part| part.split_once('\n'))
        .collect();
    for row in table {
        let text = seen.get(row.name).map_or(done.stderr.as_str(), |text| text);
        report.row(row.name, text.trim_end(), row.expected);
    }
}

/// The runtime that Coffer is compared with: what podman on this machine would take.
fn reference() -> &'static str {
    let crun = host("sh", &["-c", "command -v crun"]).is_ok();
    if crun { "crun" } else { "runc" }
}

/// Runs a scenario with both runtimes and compares row by row.
pub fn compare(
    name: &str,
    differences: &[Difference],
    scenario: impl Fn(&Podman<'_>, &mut Report),
) {
    let test = Test::new(name);
    private_network();
    compare_within(&test, &[], differences, scenario);
}

/// The same where these words lead to.
pub fn compare_within(
    test: &Test,
    entrance: &[String],
    differences: &[Difference],
    scenario: impl Fn(&Podman<'_>, &mut Report),
) {
    let mut wrong = Vec::new();
    for runtime in [reference(), "coffer"] {
        if !is_wanted(if runtime == "coffer" { runtime } else { "runc" }) {
            continue;
        }
        let podman = Podman::within(test, runtime, entrance.to_vec());
        let mut report = Report::default();
        scenario(&podman, &mut report);
        for row in &report.rows {
            let difference = differences
                .iter()
                .find(|d| podman.is_coffer() && d.row == row.name);
            let expected = difference.map_or(row.expected.as_str(), |d| d.coffer);
            let verdict = match difference {
                _ if row.seen != expected => "FAIL",
                Some(_) => "differs",
                None => "ok",
            };
            println!("{verdict:8}{runtime:8}{}", row.name);
            if row.seen != expected {
                wrong.push(format!(
                    "{runtime}, {}: expected {expected:?}, saw {:?}",
                    row.name, row.seen
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "rows that are not as they should be:\n  {}",
        wrong.join("\n  ")
    );
}
