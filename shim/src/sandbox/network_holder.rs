//! A process that holds a pod's network namespace which nobody made before the pod.
//!
//! docker, nerdctl and `ctr run --cni` wire a container's network after it was created: they enter `/proc/<pid>/ns/net` of the pid that
//! Create gave them. For them a container that asks for a network namespace of its own gets one on the host, with this process
//! in it, whose pid stands for the container. What is wired there is carried into the VM at start, and later changes follow.
//!
//! ```text
//! supervisor ── spawns ──► this binary, holding ── unshare(CLONE_NEWNET)
//!            ◄── stdout ──   one byte when that is done
//!            ── stdin ───►   its end comes with the supervisor, however that ends
//! ```

use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Stdio;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

/// The hidden first word with which the shim's binary starts itself as the holder.
pub const HOLD: &str = "hold-network";

/// A new network namespace and the process in it. Both go when this is dropped.
#[derive(Debug)]
pub struct NetworkHolder {
    /// It waits for the end of its standard input, which we hold.
    process: Child,
    namespace: File,
}

impl NetworkHolder {
    /// Must be called within the runtime, and in a process whose binary knows [`HOLD`].
    pub async fn start() -> io::Result<Self> {
        let mut process = Command::new("/proc/self/exe")
            .arg(HOLD)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let mut ready = [0; 1];
        if let Some(mut stdout) = process.stdout.take() {
            stdout.read_exact(&mut ready).await?;
        }
        let pid = process.id().unwrap_or_default();
        let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
        Ok(Self { process, namespace })
    }

    /// The pid that stands for the pod.
    pub fn pid(&self) -> u32 {
        self.process.id().unwrap_or_default()
    }

    /// The namespace, by a path that is valid in this process.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.namespace.as_raw_fd()))
    }
}

/// The holder itself: returns when the supervisor is gone.
pub fn hold() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    io::stdout().write_all(b"\n")?;
    io::stdout().flush()?;
    let mut rest = Vec::new();
    io::stdin().read_to_end(&mut rest).map(drop)
}
