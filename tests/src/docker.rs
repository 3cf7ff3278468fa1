//! A dockerd of a test's own, with a containerd of its own, in a network namespace of its own: bridges, port mappings and rules
//! are nobody else's and go with the namespace.

use crate::podman::private_network;
use crate::{
    Finished, Test, asset, evidence, finish, finish_with_input, host, leaks, product, wait_for,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle, sleep};
use std::time::Duration;

/// The busybox of the test assets, as docker calls it.
pub const IMAGE: &str = "busybox:test";
/// The name by which docker takes a containerd shim without any configuration.
pub const RUNTIME: &str = "io.containerd.coffer.v2";
/// A name for Coffer that only this dockerd's configuration has, for containers that name no runtime.
pub const NAMED: &str = "named";

/// dockerd, containerd and the image.
#[derive(Debug)]
pub struct Docker<'t> {
    test: &'t Test,
    /// Containers are in this namespace of containerd, and in a cgroup of this name.
    namespace: String,
    containerd: Child,
    dockerd: Child,
}

impl<'t> Docker<'t> {
    pub fn start(test: &'t Test) -> Self {
        private_network();
        let namespace = test.id();
        let path = |name: &str| test.dir().join(name);
        let (root, state, sock) = (path("c-root"), path("c-state"), path("containerd.sock"));
        let toml = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {sock:?}\n"
        );
        fs::write(path("containerd.toml"), toml).expect("scratch is ours");
        fs::write(path("coffer.toml"), "vcpus = 2\n").expect("scratch is ours");
        let options = json!({
            "TypeUrl": "runtimeoptions.v1.Options", "ConfigPath": path("coffer.toml"),
        });
        let named = json!({"runtimeType": RUNTIME, "options": options});
        let config = json!({"runtimes": {NAMED: named}, "default-runtime": NAMED});
        fs::write(path("daemon.json"), config.to_string()).expect("scratch is ours");

        let mut containerd = Command::new("containerd");
        containerd.arg("-c").arg(path("containerd.toml"));
        let containerd = daemon(containerd, &path("containerd.log"));
        wait_for("containerd's socket", || sock.exists());
        let mut dockerd = Command::new("dockerd");
        for (option, value) in [
            ("--config-file", path("daemon.json")),
            ("--containerd", sock),
            ("--data-root", path("data")),
            ("--exec-root", path("exec")),
            ("--pidfile", path("dockerd.pid")),
        ] {
            dockerd.arg(option).arg(value);
        }
        dockerd
            .args(["--containerd-namespace", &namespace])
            .args(["--cgroup-parent", &format!("/{namespace}")])
            .args(["--exec-opt", "native.cgroupdriver=cgroupfs"])
            .arg("--host")
            .arg(format!("unix://{}", path("docker.sock").display()));
        let dockerd = daemon(dockerd, &path("dockerd.log"));
        let docker = Self {
            test,
            namespace,
            containerd,
            dockerd,
        };
        wait_for("dockerd to answer", || docker.call(&["info"]).code == 0);
        docker.import();
        docker
    }

    fn import(&self) {
        let archive = self.path("image.tar");
        let archive = archive.to_str().expect("UTF-8");
        let files = asset("busybox");
        let files = files.to_str().expect("UTF-8");
        host("tar", &["-C", files, "-cf", archive, "."]).expect("tar runs");
        self.ok(&["import", archive, IMAGE]);
    }

    /// A path in the test's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.test.dir().join(name)
    }

    /// `docker` with these words.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command
            .arg("--host")
            .arg(format!("unix://{}", self.path("docker.sock").display()))
            .args(args)
            .env("DOCKER_CONFIG", self.path("config"))
            .stdin(Stdio::null());
        command
    }

    pub fn call(&self, args: &[&str]) -> Finished {
        finish(self.command(args))
    }

    /// The same while the test goes on.
    pub fn background(&self, args: &[&str]) -> JoinHandle<Finished> {
        let command = self.command(args);
        thread::spawn(|| finish(command))
    }

    pub fn call_with_input(&self, args: &[&str], input: &str) -> Finished {
        finish_with_input(self.command(args), input.as_bytes().to_vec())
    }

    /// The same on a terminal, as a user has one. Its output has the terminal's line ends.
    pub fn call_on_terminal(&self, args: &[&str]) -> Finished {
        let docker = self.command(args);
        let words = [docker.get_program()].into_iter().chain(docker.get_args());
        let words: Vec<_> = words
            .map(|word| format!("'{}'", word.to_str().expect("UTF-8")))
            .collect();
        let mut script = Command::new("script");
        script
            .args(["--quiet", "--return", "--command", &words.join(" ")])
            .arg("/dev/null")
            .stdin(Stdio::null());
        finish(script)
    }

    /// Runs a command that must succeed; gives its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let done = self.call(args);
        assert_eq!(done.code, 0, "docker {args:?}: {}", done.stderr);
        done.text().to_owned()
    }

    /// `docker run --rm` with Coffer, on the image.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Finished {
        let run = ["run", "--rm", "--runtime", RUNTIME];
        self.call(&[&run, options, &[IMAGE], command].concat())
    }

    /// A shell script in a running container; it must succeed.
    pub fn sh(&self, container: &str, script: &str) -> String {
        self.ok(&["exec", container, "sh", "-c", script])
    }

    /// One field of `docker inspect`.
    pub fn inspect(&self, container: &str, field: &str) -> String {
        self.ok(&[
            "inspect",
            "--format",
            &format!("{{{{{field}}}}}"),
            container,
        ])
    }
}

/// What dockerd's goroutines call; thousands of lines that wait for nothing of ours are left out.
const TOLD_GOROUTINES: [&str; 3] = ["libcontainerd", "daemon.(*Daemon).ContainerExec", "/cio."];

impl Docker<'_> {
    /// Where dockerd is: on SIGUSR1 it writes that to a file.
    fn print_goroutines(&self) {
        let _ = kill(pid(&self.dockerd), Signal::SIGUSR1);
        sleep(Duration::from_secs(2));
        let files = fs::read_dir(self.path("exec"))
            .into_iter()
            .flatten()
            .flatten();
        for file in files.map(|entry| entry.path()) {
            if !file.to_string_lossy().contains("goroutine-stacks") {
                continue;
            }
            let text = fs::read_to_string(&file).unwrap_or_default();
            let told = |stack: &&str| TOLD_GOROUTINES.iter().any(|word| stack.contains(word));
            for stack in text.split("\n\n").filter(told) {
                eprintln!("--- dockerd\n{stack}");
            }
        }
    }
}

/// A program that serves until it is killed, with the product's shim in its PATH.
fn daemon(mut command: Command, log: &Path) -> Child {
    let product = product("");
    let path = std::env::var("PATH").unwrap_or_default();
    let log = fs::File::create(log).expect("scratch is ours");
    command
        .env("PATH", format!("{}:{path}", product.display()))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a file can be duplicated"))
        .stderr(log);
    let name = command.get_program().to_owned();
    let started = command.spawn();
    started.unwrap_or_else(|error| panic!("{name:?} is not installed: {error}"))
}

/// Ends a daemon as a service manager does.
fn terminate(daemon: &mut Child) {
    let _ = kill(pid(daemon), Signal::SIGTERM);
    let _ = daemon.wait();
}

fn pid(daemon: &Child) -> Pid {
    Pid::from_raw(daemon.id().cast_signed())
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        let state = Path::new("/run/coffer").join(&self.namespace);
        if thread::panicking() {
            for log in ["containerd.log", "dockerd.log"] {
                let text = fs::read_to_string(self.path(log)).unwrap_or_default();
                eprintln!("--- {log}\n{text}");
            }
            evidence::print(&state);
            self.print_goroutines();
            leaks::kill_descendants();
        }
        let _ = self.call(&["rm", "--force", "--volumes", "web", "client"]);
        terminate(&mut self.dockerd);
        if !thread::panicking() {
            wait_for("the sandboxes to end", || {
                fs::read_dir(&state).map_or(true, |mut left| left.next().is_none())
            });
        }
        terminate(&mut self.containerd);
        let _ = fs::remove_dir_all(&state);
        // dockerd's own name for the network namespace it is in, and the storage driver's mount.
        for mount in ["exec/netns/default", "data/overlay2"] {
            let _ = Command::new("umount")
                .arg(self.path(mount))
                .stderr(Stdio::null())
                .status();
        }
        // The containers' parent is ours.
        let parents = fs::read_dir("/sys/fs/cgroup").into_iter().flatten();
        for hierarchy in parents.flatten().map(|entry| entry.path()) {
            let _ = fs::remove_dir(hierarchy.join(&self.namespace));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.namespace));
    }
}
