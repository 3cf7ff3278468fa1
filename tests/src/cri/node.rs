//! containerd with the CRI plugin as a node of a cluster has it: handlers `runc` and `coffer`, a bridge CNI, two images.
//!
//! It runs in a network namespace of the test's own, so bridge, port mappings and the streaming server's port are nobody else's, and
//! whatever a CNI plugin leaves goes with the namespace. The test's thread is in it too: it is "outside" for the pods.

use super::grpc::Client;
use super::pod::Pod;
use crate::{Test, asset, finish, host, leaks, product, sha256_of, wait_for};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

/// busybox, with no entry point of its own.
pub const IMAGE: &str = "docker.io/library/busybox:test";
/// busybox as the pod's first process: reaps, and ends on SIGTERM.
const PAUSE_IMAGE: &str = "docker.io/library/pause:test";
const PAUSE: &str = "trap exit TERM INT; while :; do sleep 3600 & wait; done";
/// The handler whose pods are sandboxes of the Sandbox API, with no pause container.
pub const WITHOUT_PAUSE: &str = "coffer-without-pause";
/// Part of PATH with the containerd of Debian's development branch, which only the test node has.
const NEXT: &str = "/opt/containerd-next/usr/bin:";
/// Where Debian's package puts the CNI plugins.
const CNI_PLUGINS: &str = "/usr/lib/cni";
/// The bridge's address, as pods see it.
pub const GATEWAY: &str = "10.77.0.1";
/// The plugin's section of containerd's configuration, version 2.
const CRI: &str = r#"plugins."io.containerd.grpc.v1.cri""#;
/// All that the CRI makes is in this namespace of containerd.
const NAMESPACE: &str = "k8s.io";

/// One node.
#[derive(Debug)]
pub struct Node<'t> {
    pub test: &'t Test,
    pub cri: Client,
    daemon: Mutex<Option<Child>>,
    /// What goes before PATH for containerd and its shims, with a colon at its end.
    programs: &'static str,
    /// Name of the test's parent cgroup.
    pub cgroup: String,
}

impl<'t> Node<'t> {
    pub fn start(test: &'t Test) -> Self {
        Self::make(test, "", &[])
    }

    /// A node with the next major version of containerd, and the handler [`WITHOUT_PAUSE`]. Only the test node has it.
    pub fn next(test: &'t Test) -> Self {
        Self::make(test, NEXT, &[])
    }

    /// A node with further handlers of Coffer's: each a name and a `coffer.toml`.
    pub fn with_handlers(test: &'t Test, handlers: &[(&str, &str)]) -> Self {
        Self::make(test, "", handlers)
    }

    fn make(test: &'t Test, programs: &'static str, handlers: &[(&str, &str)]) -> Self {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("root may have a network namespace");
        host("ip", &["link", "set", "lo", "up"]).expect("ip is installed");
        let node = Self {
            test,
            cri: Client::new(&test.dir().join("containerd.sock")),
            daemon: Mutex::new(None),
            programs,
            cgroup: test.id(),
        };
        node.configure(handlers).expect("scratch is ours");
        node.launch();
        node.import().expect("the images are imported");
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.test.dir().join(format!("containerd.{name}"))
    }

    fn configure(&self, handlers: &[(&str, &str)]) -> Result<()> {
        let cni = self.path("cni");
        fs::create_dir(&cni)?;
        let list = json!({
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": "10.77.0.0/16", "gateway": GATEWAY}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                        "dataDir": self.path("addresses"),
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
            ],
        });
        fs::write(cni.join("10-pods.conflist"), list.to_string())?;
        let mut toml = self.toml() + &handler("coffer", None);
        if self.programs == NEXT {
            toml = toml + &handler(WITHOUT_PAUSE, None) + "sandboxer = \"shim\"\n";
        }
        for (name, config) in handlers {
            let file = self.path(&format!("{name}.toml"));
            fs::write(&file, config)?;
            toml += &handler(name, Some(&file));
        }
        Ok(fs::write(self.path("toml"), toml)?)
    }

    fn toml(&self) -> String {
        let (root, state) = (self.path("root"), self.path("state"));
        let (sock, cni) = (self.path("sock"), self.path("cni"));
        format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n[grpc]\naddress = {sock:?}\n\
             [{CRI}]\nsandbox_image = {PAUSE_IMAGE:?}\nstream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n\
             restrict_oom_score_adj = true\n\
             [{CRI}.cni]\nbin_dir = {CNI_PLUGINS:?}\nconf_dir = {cni:?}\n\
             [{CRI}.containerd]\nsnapshotter = \"overlayfs\"\ndefault_runtime_name = \"runc\"\n\
             [{CRI}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n"
        )
    }

    /// Starts containerd and waits until its CRI plugin says that it is ready.
    pub fn launch(&self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .expect("scratch is ours");
        let mut command = self.program("containerd");
        command.arg("-c").arg(self.path("toml"));
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be duplicated"))
            .stderr(log);
        let daemon = command.spawn();
        let daemon = daemon.expect("containerd is installed; run `cargo xtask setup`");
        *self.daemon.lock().expect("no panic under the lock") = Some(daemon);
        wait_for("containerd's CRI plugin", || {
            self.cri.call("Status", &json!({})).is_ok_and(|status| {
                let conditions = status["status"]["conditions"].as_array();
                conditions.is_some_and(|all| all.iter().all(|c| c["status"] == true))
            })
        });
    }

    /// A program of containerd's, with the product's shim in its PATH.
    fn program(&self, name: &str) -> Command {
        let product = product("");
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}{}:{path}", self.programs, product.display());
        // env(1) looks it up in the PATH that it sets.
        let mut command = Command::new("env");
        command.arg(format!("PATH={path}")).arg(name);
        command
    }

    /// SIGKILL, as the OOM killer would.
    pub fn kill(&self) {
        let mut daemon = self.daemon.lock().expect("no panic under the lock");
        if let Some(mut daemon) = daemon.take() {
            daemon.kill().expect("it is our child");
            daemon.wait().expect("it is our child");
        }
    }

    /// Imports the busybox image, and the same as a pause image, from one archive.
    fn import(&self) -> Result<()> {
        let archive = self.path("images.tar");
        let layout = self.path("images");
        write_layout(&layout)?;
        let (from, to) = (layout.to_str().context("UTF-8")?, archive.to_str());
        let to = to.context("UTF-8")?;
        host("tar", &["-C", from, "-cf", to, "."])?;
        let mut ctr = self.program("ctr");
        ctr.arg("-a").arg(self.path("sock"));
        ctr.args(["-n", NAMESPACE, "images", "import", to]);
        let done = finish(ctr);
        anyhow::ensure!(done.code == 0, "ctr images import: {}", done.stderr);
        wait_for("the CRI to know the images", || {
            [IMAGE, PAUSE_IMAGE].iter().all(|image| {
                let request = json!({"image": {"image": image}});
                let answer = self.cri.call("ImageStatus", &request);
                answer.is_ok_and(|answer| !answer["image"].is_null())
            })
        });
        Ok(())
    }

    /// A running pod; `change` is merged into its configuration.
    pub fn pod(&self, handler: &str, name: &str, change: Value) -> Pod<'_> {
        self.try_pod(handler, name, change)
            .unwrap_or_else(|error| panic!("the pod {name} does not run: {error:#}"))
    }

    pub fn try_pod(&self, handler: &str, name: &str, change: Value) -> Result<Pod<'_>> {
        Pod::run(self, handler, name, change)
    }

    /// What containerd logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn supervisors() -> Vec<u32> {
        leaks::descendants(std::process::id())
            .unwrap_or_default()
            .into_iter()
            .filter(|pid| leaks::command_line(*pid).contains("containerd-shim-"))
            .collect()
    }
}

/// The section of a handler in containerd's configuration.
fn handler(name: &str, config: Option<&Path>) -> String {
    let section = format!("{CRI}.containerd.runtimes.{name}");
    let options = config.map(|path| format!("[{section}.options]\nConfigPath = {path:?}\n"));
    format!(
        "[{section}]\nruntime_type = \"io.containerd.coffer.v2\"\npod_annotations = [\"io.coffer.*\"]\n\
         privileged_without_host_devices = true\n{}",
        options.unwrap_or_default()
    )
}

/// The state directory of a pod's sandbox.
pub fn state_dir(sandbox: &str) -> PathBuf {
    Path::new("/run/coffer").join(NAMESPACE).join(sandbox)
}

/// A copy of the busybox layout with a second manifest, for the pause image, whose configuration has an entry point.
fn write_layout(layout: &Path) -> Result<()> {
    host(
        "cp",
        &[
            "-r",
            asset("busybox-layout").to_str().context("UTF-8")?,
            layout.to_str().context("UTF-8")?,
        ],
    )?;
    let read = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let blob = |descriptor: &Value| -> Result<PathBuf> {
        let digest = descriptor["digest"].as_str().context("a digest")?;
        Ok(layout.join("blobs").join(digest.replace(':', "/")))
    };
    let put = |descriptor: &mut Value, content: &Value| -> Result<()> {
        let file = layout.join("new-blob");
        let text = content.to_string();
        fs::write(&file, &text)?;
        let digest = sha256_of(&file)?;
        fs::rename(&file, layout.join("blobs/sha256").join(&digest))?;
        descriptor["digest"] = json!(format!("sha256:{digest}"));
        descriptor["size"] = json!(text.len());
        Ok(())
    };
    let mut index = read(layout.join("index.json"))?;
    let mut busybox = index["manifests"][0].clone();
    let mut manifest = read(blob(&busybox)?)?;
    let mut config = read(blob(&manifest["config"])?)?;
    config["config"]["Entrypoint"] = json!(["/bin/sh", "-c", PAUSE]);
    put(&mut manifest["config"], &config)?;
    let mut pause = busybox.clone();
    put(&mut pause, &manifest)?;
    busybox["annotations"] = json!({"io.containerd.image.name": IMAGE});
    pause["annotations"] = json!({"io.containerd.image.name": PAUSE_IMAGE});
    index["manifests"] = json!([busybox, pause]);
    Ok(fs::write(layout.join("index.json"), index.to_string())?)
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- containerd\n{}", self.log());
        } else {
            wait_for("the supervisors to end", || Self::supervisors().is_empty());
        }
        self.kill();
        // The pods' parent cgroup is the kubelet's, that is ours.
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::remove_dir(hierarchy.path().join(&self.cgroup));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.cgroup));
    }
}
