//! containerd with the CRI plugin as a node of a cluster has it: handlers `runc` and `coffer`, a bridge CNI, two images. A third handler
//! wires its pods with several interfaces.
//!
//! It runs in a network namespace of the test's own, so bridge, port mappings and the streaming server's port are nobody else's, and
//! whatever a CNI plugin leaves goes with the namespace. The test's thread is in it too: it is "outside" for the pods.

use super::grpc::Client;
use super::pod::Pod;
use super::snapshotter::Snapshotter;
use crate::containerd::{self, NEXT};
use crate::{Test, asset, finish, host, leaks, sha256_of, wait_for};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

/// busybox, with no entry point of its own.
pub const IMAGE: &str = "docker.io/library/busybox:test";
/// busybox as the pod's first process: reaps, and ends on SIGTERM.
const PAUSE_IMAGE: &str = "docker.io/library/pause:test";
const PAUSE: &str = "trap exit TERM INT; while :; do sleep 3600 & wait; done";
/// The handler whose pods are sandboxes of the Sandbox API, with no pause container.
pub const WITHOUT_PAUSE: &str = "coffer-without-pause";
/// The handler of Coffer's whose pods have several interfaces.
pub const WIRED: &str = "coffer-wired";
/// Where Debian's package puts the CNI plugins.
const CNI_PLUGINS: &str = "/usr/lib/cni";
/// The bridge's address, as pods see it.
pub const GATEWAY: &str = "10.77.0.1";
/// A link of the node's, whose other end is the world for pods with a macvlan interface.
pub const WIRE: [&str; 2] = ["wire0", "wire1"];
/// The plugin's section of containerd's configuration, version 2.
const CRI: &str = r#"plugins."io.containerd.grpc.v1.cri""#;
/// containerd's name of the test's own snapshotter.
const SNAPSHOTTER: &str = "odd";
/// All that the CRI makes is in this namespace of containerd.
const NAMESPACE: &str = "k8s.io";

/// A further handler of Coffer's.
#[derive(Debug, Clone, Copy)]
pub struct Handler<'a> {
    pub name: &'a str,
    pub config: Config<'a>,
}

/// How a handler says what is to be other than by default.
#[derive(Debug, Clone, Copy)]
pub enum Config<'a> {
    /// A `coffer.toml` of its own, which its options name.
    File(&'a str),
    /// Keys of `coffer.toml` in its options, from containerd 1.7 on.
    Inline(&'a str),
    /// A directory with CNI configurations.
    Network(&'a Path),
    /// The test's own snapshotter, from containerd 1.7 on.
    Snapshotter,
    Default,
}

/// One node.
#[derive(Debug)]
pub struct Node<'t> {
    pub test: &'t Test,
    pub cri: Client,
    daemon: Mutex<Option<Child>>,
    _snapshotter: Snapshotter,
    /// What goes before PATH for containerd and its shims, with a colon at its end.
    programs: &'static str,
    /// Name of the test's parent cgroup.
    pub cgroup: String,
    /// How many pods there have been.
    pub(super) pods: AtomicU32,
}

impl<'t> Node<'t> {
    pub fn start(test: &'t Test) -> Self {
        Self::with_handlers(test, &[])
    }

    /// A node with further handlers.
    pub fn with_handlers(test: &'t Test, handlers: &[Handler<'_>]) -> Self {
        Self::make(test, "", handlers)
    }

    /// A node with the next major version of containerd, and the handler [`WITHOUT_PAUSE`]. Only the test node has it.
    pub fn next(test: &'t Test, handlers: &[Handler<'_>]) -> Self {
        Self::make(test, NEXT, handlers)
    }

    fn make(test: &'t Test, programs: &'static str, handlers: &[Handler<'_>]) -> Self {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("root may have a network namespace");
        host("ip", &["link", "set", "lo", "up"]).expect("ip is installed");
        let path = |name: &str| test.dir().join(format!("containerd.{name}"));
        let snapshotter = Snapshotter::start(&path("snapshotter"), path("snapshots"));
        let node = Self {
            test,
            _snapshotter: snapshotter.expect("scratch is ours"),
            cri: Client::new(&path("sock")),
            daemon: Mutex::new(None),
            programs,
            cgroup: test.id(),
            pods: AtomicU32::new(0),
        };
        node.configure(handlers).expect("scratch is ours");
        node.launch();
        node.import().expect("the images are imported");
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.test.dir().join(format!("containerd.{name}"))
    }

    fn configure(&self, handlers: &[Handler<'_>]) -> Result<()> {
        let (cni, wired) = (self.path("cni"), self.path("wired"));
        for dir in [&cni, &wired] {
            fs::create_dir(dir)?;
        }
        let subnet = json!([{"subnet": "10.77.0.0/16", "gateway": GATEWAY}]);
        let list = json!({
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true,
                    "ipam": self.ipam(&json!([subnet]), &json!([{"dst": "0.0.0.0/0"}])),
                },
                {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
            ],
        });
        fs::write(cni.join("10-pods.conflist"), list.to_string())?;
        for (name, network) in self.interfaces() {
            fs::write(wired.join(format!("{name}.conf")), network.to_string())?;
        }
        let own = |name, config| self.handler(&Handler { name, config });
        let mut toml = self.toml() + &own("coffer", Config::Default)?;
        toml += &own(WIRED, Config::Network(&wired))?;
        if self.programs == NEXT {
            toml = toml + &own(WITHOUT_PAUSE, Config::Default)? + "sandboxer = \"shim\"\n";
        }
        for handler in handlers {
            toml += &self.handler(handler)?;
        }
        Ok(fs::write(self.path("toml"), toml)?)
    }

    fn ipam(&self, ranges: &Value, routes: &Value) -> Value {
        let dir = self.path("addresses");
        json!({"type": "host-local", "ranges": ranges, "routes": routes, "dataDir": dir})
    }

    /// The networks of [`WIRED`]: a bridge with both families, a point-to-point link, a macvlan on [`WIRE`]; no two with the same MTU.
    fn interfaces(&self) -> [(&'static str, Value); 3] {
        let both = json!([[{"subnet": "10.78.0.0/16"}], [{"subnet": "fd78::/64"}]]);
        let routes = json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}, {"dst": "172.30.0.0/16"}]);
        let bridge = json!({
            "cniVersion": "0.4.0", "name": "wired-bridge", "type": "bridge",
            "bridge": "pods1", "isGateway": true, "mtu": 1430, "ipam": self.ipam(&both, &routes),
        });
        let four = json!([[{"subnet": "10.79.0.0/24"}]]);
        let routes = json!([{"dst": "172.31.0.0/16"}]);
        let ptp = json!({
            "cniVersion": "0.4.0", "name": "wired-ptp", "type": "ptp", "mtu": 1400, "ipam": self.ipam(&four, &routes),
        });
        let addresses = json!([{"address": "10.80.0.2/24"}]);
        let routes = json!([{"dst": "172.32.0.0/16", "gw": "10.80.0.1"}]);
        let macvlan = json!({
            "cniVersion": "0.4.0", "name": "wired-macvlan", "type": "macvlan", "master": WIRE[0], "mode": "bridge", "mtu": 1380,
            "ipam": {"type": "static", "addresses": addresses, "routes": routes},
        });
        [("1", bridge), ("2", ptp), ("3", macvlan)]
    }

    /// A handler's section of containerd's configuration.
    fn handler(&self, handler: &Handler<'_>) -> Result<String> {
        let section = format!("{CRI}.containerd.runtimes.{}", handler.name);
        let rest = match handler.config {
            Config::Default => String::new(),
            Config::Snapshotter => format!("snapshotter = {SNAPSHOTTER:?}\n"),
            Config::Network(dir) => format!("cni_conf_dir = {dir:?}\ncni_max_conf_num = 3\n"),
            Config::Inline(keys) => format!("[{section}.options]\n{keys}\n"),
            Config::File(keys) => {
                let file = self.path(&format!("{}.toml", handler.name));
                fs::write(&file, keys)?;
                format!("[{section}.options]\nConfigPath = {file:?}\n")
            }
        };
        Ok(format!(
            "[{section}]\nruntime_type = \"io.containerd.coffer.v2\"\npod_annotations = [\"io.coffer.*\"]\n\
             privileged_without_host_devices = true\n{rest}"
        ))
    }

    fn toml(&self) -> String {
        let (root, state) = (self.path("root"), self.path("state"));
        let (sock, cni) = (self.path("sock"), self.path("cni"));
        let snapshotter = self.path("snapshotter");
        format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n[grpc]\naddress = {sock:?}\n\
             [proxy_plugins.{SNAPSHOTTER}]\ntype = \"snapshot\"\naddress = {snapshotter:?}\n\
             [{CRI}]\nsandbox_image = {PAUSE_IMAGE:?}\nstream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n\
             restrict_oom_score_adj = true\ndisable_hugetlb_controller = false\n\
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
        let mut command = containerd::program(self.programs, "containerd");
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
        let mut ctr = containerd::program(self.programs, "ctr");
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

    /// containerd's version, as the CRI tells it.
    pub fn version(&self) -> String {
        let answer = self.cri.call("Version", &json!({}));
        let version = answer.expect("containerd runs")["runtime_version"].take();
        let version = version.as_str().expect("a version");
        version.trim_start_matches('v').to_owned()
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
