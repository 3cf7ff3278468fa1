//! A sandbox that stays, and containers that come and go in it, as a pod's do.

use crate::bundle::Bundle;
use crate::task::Task;
use crate::{Background, Test};
use std::fs;
use std::path::PathBuf;

/// A sandbox whose first container sleeps, and a client of its Task API for further ones.
#[derive(Debug)]
pub struct Pod<'t> {
    test: &'t Test,
    pub sandbox: Background<'t>,
    pub task: Task,
    /// The root of all containers but the first: a copy, for mount points are made in it.
    pub rootfs: PathBuf,
}

impl<'t> Pod<'t> {
    pub fn new(test: &'t Test) -> Self {
        let sandbox = test.background(&[], &["sleep", "600"]);
        let task = Task::connect(&test.root(), &sandbox.id).expect("its supervisor listens");
        Self {
            test,
            sandbox,
            task,
            rootfs: test.copy_of("busybox"),
        }
    }

    /// The bundle of a further container that runs a shell script.
    pub fn bundle(&self, script: &str) -> Bundle {
        let bundle = Bundle::on(self.test, &self.rootfs, &["/bin/sh", "-c", script]);
        bundle.in_sandbox(&self.sandbox.id)
    }

    /// Creates and starts a container; gives the file that its output goes to.
    pub fn start(&self, id: &str, bundle: &Bundle) -> ttrpc::Result<PathBuf> {
        let out = self.test.dir().join(format!("{id}.out"));
        fs::write(&out, "").expect("scratch is ours");
        let path = out.to_str().expect("UTF-8");
        self.task.create(id, bundle.write(), path)?;
        self.task.start(id, "")?;
        Ok(out)
    }

    /// Waits for the end of a container and deletes it; gives its exit status.
    pub fn end(&self, id: &str) -> u32 {
        let status = self.task.wait(id, "").expect("it was started");
        self.task.delete(id, "").expect("it has ended");
        status
    }

    /// Runs a container from start to end; gives its exit status and its output.
    pub fn run(&self, id: &str, bundle: &Bundle) -> (u32, String) {
        let out = self.start(id, bundle).expect("the container starts");
        let status = self.end(id);
        (status, fs::read_to_string(out).expect("output is text"))
    }

    /// Kills a container, waits for its end and deletes it.
    pub fn kill(&self, id: &str) {
        self.task.kill(id, 9).expect("it runs");
        assert_eq!(self.end(id), 137);
    }
}
