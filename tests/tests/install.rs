//! The Debian package on a machine that never had Coffer, in the steps that `docs/containerd.md` and `docs/podman.md` tell a new user.
//!
//! It changes the machine it runs on, so it runs in the test node only, where every test has a machine of its own.

use coffer_tests::cri::grpc::Client;
use coffer_tests::{Finished, Test, asset, finish, host, wait_for};
use serde_json::json;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const RUNTIME: &str = "io.containerd.coffer.v2";
const PROGRAMS: &str = "/usr/lib/coffer";
const PODMAN: &str = "/etc/containers/containers.conf.d/50-coffer.conf";

#[test]
fn the_package_is_installed_used_upgraded_and_removed() {
    let test = Test::new("install");
    let told = dpkg("--install", &package());
    assert!(told.contains("a VM can run on this machine"), "{told}");
    let version = host("coffer", &["--version"]).unwrap();
    assert!(version.starts_with("coffer version "), "{version}");
    host("coffer", &["check"]).unwrap();

    podman(&test);
    let containerd = Containerd::start(&test);
    containerd.knows_the_handler();
    containerd.runs_and_survives_an_upgrade();
    drop(containerd);

    dpkg("--purge", "coffer");
    for path in [PROGRAMS, PODMAN, "/usr/bin/coffer", "/usr/share/coffer"] {
        assert!(fs::symlink_metadata(path).is_err(), "{path} is gone");
    }
}

fn package() -> String {
    std::env::var("COFFER_TEST_PACKAGE").expect("`cargo xtask test --only node` sets it")
}

fn dpkg(action: &str, what: &str) -> String {
    host("dpkg", &[action, what]).unwrap()
}

/// What a container printed is the release of a kernel, and not the host's.
fn ran_in_a_vm(done: &Finished) {
    assert_eq!(done.code, 0, "{done:?}");
    let hosts = host("uname", &["-r"]).unwrap();
    assert!(done.text().starts_with("6."), "{done:?}");
    assert_ne!(done.text(), hosts.trim());
}

/// The package's drop-in is enough for `podman --runtime coffer`.
fn podman(test: &Test) {
    let podman = |args: &[&str]| {
        let mut command = Command::new("podman");
        // Its usual places are in the node's memory, on a file system that overlay does not take.
        for (option, place) in [("--root", "storage"), ("--runroot", "state")] {
            command.arg(option).arg(test.dir().join(place));
        }
        command.args(args).stdin(Stdio::null());
        finish(command)
    };
    let layout = format!("oci:{}", asset("busybox-layout").display());
    let pulled = podman(&["pull", "--quiet", &layout]);
    assert_eq!(pulled.code, 0, "{pulled:?}");
    let run = ["run", "--rm", "--runtime", "coffer", "--network", "none"];
    let done = podman(&[&run[..], &[pulled.text(), "uname", "-r"]].concat());
    ran_in_a_vm(&done);
}

/// containerd with the configuration that the package brings for it.
struct Containerd<'t> {
    test: &'t Test,
    daemon: Child,
}

impl<'t> Containerd<'t> {
    fn start(test: &'t Test) -> Self {
        let snippet = fs::read_to_string("/usr/share/coffer/containerd-1.toml").unwrap();
        let config = Path::new("/etc/containerd/config.toml");
        fs::create_dir_all(config.parent().unwrap()).unwrap();
        fs::write(config, format!("version = 2\n{snippet}")).unwrap();
        let log = fs::File::create(test.dir().join("containerd.log")).unwrap();
        let daemon = Command::new("containerd")
            .arg("--root")
            .arg(test.dir().join("containerd"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("containerd is installed");
        let containerd = Self { test, daemon };
        wait_for("containerd to answer", || {
            containerd.ctr(&["version"]).code == 0
        });
        containerd
    }

    fn ctr(&self, args: &[&str]) -> Finished {
        let mut ctr = Command::new("ctr");
        ctr.args(args).stdin(Stdio::null());
        finish(ctr)
    }

    fn ok(&self, args: &[&str]) -> String {
        let done = self.ctr(args);
        assert_eq!(done.code, 0, "ctr {args:?}: {done:?}");
        done.text().to_owned()
    }

    /// What the kubelet would ask for is there.
    fn knows_the_handler(&self) {
        let cri = Client::new(Path::new("/run/containerd/containerd.sock"));
        let mut config = String::new();
        wait_for("the CRI plugin to answer", || {
            let status = cri.call("Status", &json!({"verbose": true}));
            config = status.map_or_else(|_| String::new(), |s| s["info"]["config"].to_string());
            !config.is_empty()
        });
        assert!(config.contains(RUNTIME), "{config}");
    }

    /// A container goes on, with its own files of the product, while others take their place.
    fn runs_and_survives_an_upgrade(&self) {
        let archive = self.test.dir().join("image.tar");
        let (layout, archive) = (asset("busybox-layout"), archive.to_str().unwrap());
        host(
            "tar",
            &["-C", layout.to_str().unwrap(), "-cf", archive, "."],
        )
        .unwrap();
        let imported = self.ok(&["image", "import", "--base-name", "busybox", archive]);
        let image = self.ok(&["image", "ls", "--quiet"]);
        assert!(!image.is_empty(), "{imported}");
        let run = ["run", "--runtime", RUNTIME];
        ran_in_a_vm(&self.ctr(&[&run[..], &["--rm", &image, "once", "uname", "-r"]].concat()));

        self.ok(&[&run[..], &["--detach", &image, "long", "sleep", "1000"]].concat());
        let program = format!("{PROGRAMS}/coffer-vmm");
        let before = fs::metadata(&program).unwrap().ino();
        dpkg("--install", &package());
        assert_ne!(fs::metadata(&program).unwrap().ino(), before);
        let exec = ["task", "exec", "--exec-id", "e", "long", "uname", "-r"];
        ran_in_a_vm(&self.ctr(&exec));
        self.ok(&["task", "kill", "--signal", "SIGKILL", "long"]);
        wait_for("the task to stop", || {
            self.ok(&["task", "ls"]).contains("STOPPED")
        });
        self.ok(&["task", "delete", "long"]);
        self.ok(&["container", "delete", "long"]);
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        self.daemon.kill().expect("it is our child");
        self.daemon.wait().expect("it is our child");
        if std::thread::panicking() {
            let log = fs::read_to_string(self.test.dir().join("containerd.log"));
            eprintln!("{}", log.unwrap_or_default());
        }
    }
}
