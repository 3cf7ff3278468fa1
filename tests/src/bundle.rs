//! OCI bundles made by `runc spec` and then changed, so that the tests start from what others write.

use crate::{Finished, Test, asset, finish, host};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A bundle directory with its config in memory until it is run.
#[derive(Debug)]
pub struct Bundle {
    pub dir: PathBuf,
    pub config: Value,
}

impl Bundle {
    /// A bundle on the busybox root that runs a shell script, without a terminal.
    pub fn new(test: &Test, script: &str) -> Self {
        Self::on(test, &asset("busybox"), &["/bin/sh", "-c", script])
    }

    /// A bundle on any root directory.
    pub fn on(test: &Test, rootfs: &Path, args: &[&str]) -> Self {
        let dir = test.dir().join(format!("bundle-{}", test.id()));
        fs::create_dir(&dir).expect("scratch is ours");
        host("runc", &["spec", "-b", dir.to_str().expect("UTF-8")]).expect("runc writes a spec");
        let text = fs::read(dir.join("config.json")).expect("runc wrote it");
        let mut config: Value = serde_json::from_slice(&text).expect("runc writes JSON");
        config["root"] = json!({"path": rootfs, "readonly": false});
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(args);
        Self { dir, config }
    }

    /// Makes it a further container of a sandbox, with the annotations that containerd's CRI plugin writes.
    pub fn in_sandbox(mut self, sandbox: &str) -> Self {
        self.config["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": sandbox,
        });
        self
    }

    /// Writes the config; gives the directory for `--bundle`.
    pub fn write(&self) -> &str {
        fs::write(self.dir.join("config.json"), self.config.to_string()).expect("scratch is ours");
        self.dir.to_str().expect("UTF-8")
    }

    /// Runs it in a sandbox.
    pub fn run(&self, test: &Test) -> Finished {
        finish(test.run_command(&["--id", &test.id(), "--bundle", self.write()]))
    }

    /// Runs the same bundle on the host, for comparison.
    pub fn run_with_runc(&self, test: &Test) -> Finished {
        let root = test.dir().join("runc");
        let mut command = Command::new("runc");
        command
            .arg("--root")
            .arg(root)
            .args(["run", "-b", self.write(), &test.id()])
            .stdin(std::process::Stdio::null());
        finish(command)
    }

    /// Appends to a list of the config, which is made if it is missing.
    pub fn push(&mut self, pointer: &str, value: Value) {
        let list = self
            .config
            .pointer_mut(pointer)
            .unwrap_or_else(|| panic!("{pointer} is not there"));
        match list {
            Value::Array(list) => list.push(value),
            other => *other = json!([value]),
        }
    }
}
