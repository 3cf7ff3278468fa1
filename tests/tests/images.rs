//! An image that buildah makes, with Coffer as its runtime, runs the same by Coffer alone, by podman and by containerd.

use coffer_tests::podman::{IMAGE, Podman, private_network};
use coffer_tests::{Test, finish, host, product, wait_for};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const BUILT: &str = "localhost/built:latest";
const IN_CONTAINERD: &str = "docker.io/library/built:latest";

#[test]
fn an_image_of_buildah_runs_the_same_three_times() {
    let test = Test::new("images");
    private_network();
    let podman = Podman::new(&test, "coffer");
    let layout = test.dir().join("layout");
    build(&test, &podman, &layout);
    let expected = (5, "made in a build by 1000\nvalue\n/home/user".to_owned());
    let seen = |done: coffer_tests::Finished| (done.code, done.text().to_owned());

    let alone = finish(test.run_command(&[layout.to_str().unwrap()]));
    assert!(alone.code != 125, "{}", alone.stderr);
    assert_eq!(seen(alone), expected, "coffer run");
    let by_podman = podman.call(&["run", "--rm", "--network", "none", BUILT]);
    assert_eq!(seen(by_podman), expected, "podman run");
    let containerd = Containerd::start(test.dir());
    containerd.import(&layout);
    let run = [
        "run",
        "--rm",
        "--runtime",
        "io.containerd.coffer.v2",
        IN_CONTAINERD,
        "c",
    ];
    assert_eq!(seen(finish(containerd.ctr(&run))), expected, "ctr run");
}

/// Makes an image in steps, one of which runs in a VM, and copies it to an OCI layout.
fn build(test: &Test, podman: &Podman<'_>, layout: &Path) {
    let buildah = |args: &[&str]| {
        let done = finish(podman.tool("buildah", args));
        assert_eq!(done.code, 0, "buildah {args:?}: {}", done.stderr);
        done.text().to_owned()
    };
    let container = buildah(&["from", "--pull-never", IMAGE]);
    let runtime = podman.dir().join("bin/coffer");
    let script = "uname -r; echo made in a build by $(id -u) > /home/user/made";
    let kernel = buildah(&[
        "run",
        "--isolation",
        "oci",
        "--runtime",
        runtime.to_str().unwrap(),
        "--network",
        "none",
        "--user",
        "user",
        &container,
        "sh",
        "-c",
        script,
    ]);
    assert!(
        kernel.contains("coffer"),
        "the step ran on the kernel {kernel}"
    );
    let command = r#"["sh", "-c", "cat made; echo $A; pwd; exit 5"]"#;
    buildah(&[
        "config",
        "--cmd",
        command,
        "--env",
        "A=value",
        "--workingdir",
        "/home/user",
        "--user",
        "user",
        &container,
    ]);
    buildah(&["commit", "--quiet", &container, BUILT]);
    buildah(&["rm", &container]);
    let storage = podman.storage();
    let [_, root, _, run, _, driver] = &storage;
    let from = format!("containers-storage:[{driver}@{root}+{run}]{BUILT}");
    let to = format!("oci:{}:built", layout.display());
    host(
        "skopeo",
        &["copy", "--insecure-policy", "--quiet", &from, &to],
    )
    .unwrap();
    assert!(!test.root().join(&container).exists());
}

/// A containerd of the test's own.
struct Containerd {
    dir: std::path::PathBuf,
    namespace: String,
    daemon: Child,
}

impl Containerd {
    fn start(scratch: &Path) -> Self {
        let dir = scratch.join("containerd");
        fs::create_dir(&dir).unwrap();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n",
            dir.join("root"),
            dir.join("state"),
            dir.join("sock")
        );
        fs::write(dir.join("toml"), config).unwrap();
        let path = format!(
            "{}:{}",
            product("").display(),
            std::env::var("PATH").unwrap()
        );
        let log = fs::File::create(dir.join("log")).unwrap();
        let daemon = Command::new("containerd")
            .arg("-c")
            .arg(dir.join("toml"))
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("containerd is installed; run `cargo xtask setup`");
        let namespace = format!("images-{}", std::process::id());
        let containerd = Self {
            dir,
            namespace,
            daemon,
        };
        wait_for("containerd to answer", || {
            finish(containerd.ctr(&["version"])).code == 0
        });
        containerd
    }

    fn ctr(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("-a")
            .arg(self.dir.join("sock"))
            .args(["-n", &self.namespace])
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn import(&self, layout: &Path) {
        let archive = self.dir.join("image.tar");
        let archive = archive.to_str().unwrap();
        host(
            "tar",
            &["-C", layout.to_str().unwrap(), "-cf", archive, "."],
        )
        .unwrap();
        let done = finish(self.ctr(&["images", "import", "--index-name", IN_CONTAINERD, archive]));
        assert_eq!(done.code, 0, "ctr import: {}", done.stderr);
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = fs::remove_dir_all(Path::new("/run/coffer").join(&self.namespace));
        // ctr puts a container into the cgroup /<namespace>/<id>. The parent is nobody's.
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::remove_dir(hierarchy.path().join(&self.namespace));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.namespace));
    }
}
