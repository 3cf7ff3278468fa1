//! The end-to-end tests' harness: every test drives the built `coffer` with real guests, under nextest, which gives each
//! test a process of its own.
//!
//! A [`Test`] owns a state root, a prefix for names and a scratch directory. When it is dropped it looks for anything
//! its sandboxes left: processes, mounts, cgroups, sockets, directories. A leak fails the test ([`leaks`]).
//!
//! Where to find things comes from the environment, which `cargo xtask test` sets:
//! `COFFER_TEST_PRODUCT` (directory of the binaries and the guest image), `COFFER_TEST_ASSETS` (root file systems and
//! image layouts), `COFFER_TEST_HYPERVISOR` (`qemu` or `coffer-vmm`). A test never skips itself for want of them.
//!
//! The callers that tests take the place of: [`cri`] a kubelet, [`shim`] and [`task`] containerd, [`conmon`] and [`oci`] an engine or its
//! monitor; [`podman`], [`docker`] and [`systemd`] run the real ones. [`bundle`] is what they run, [`loop_device`] a disk for it, [`pod`] a sandbox
//! with several of them, [`schema`] the form of what they get. [`evidence`] is what is printed of a test that fails.

pub mod bundle;
pub mod conmon;
pub mod containerd;
pub mod cri;
pub mod docker;
pub mod evidence;
pub mod leaks;
pub mod loop_device;
pub mod memory_cgroup;
pub mod mounted;
pub mod oci;
pub mod pod;
pub mod podman;
pub mod schema;
pub mod shim;
pub mod systemd;
pub mod task;

use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest a guest may take for anything here: emulation in emulation is slow, and the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(200);

/// One test and all it owns.
#[derive(Debug)]
pub struct Test {
    name: String,
    scratch: tempfile::TempDir,
    hypervisor: String,
    sandboxes: AtomicU32,
    before: leaks::Before,
}

/// What a finished command did.
#[derive(Debug)]
pub struct Finished {
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Finished {
    /// Standard output as text without the last newline.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout)
            .expect("output is text")
            .trim_end_matches('\n')
    }
}

fn required(name: &str) -> PathBuf {
    PathBuf::from(
        std::env::var_os(name)
            .unwrap_or_else(|| panic!("{name} is not set; run `cargo xtask test`")),
    )
}

/// A directory of the test assets: "busybox", "debian", "busybox-layout".
pub fn asset(name: &str) -> PathBuf {
    let path = required("COFFER_TEST_ASSETS").join(name);
    assert!(
        path.exists(),
        "{} is missing; run `cargo xtask setup`",
        path.display()
    );
    path
}

/// A program or file of the product.
pub fn product(name: &str) -> PathBuf {
    required("COFFER_TEST_PRODUCT").join(name)
}

impl Test {
    /// Begins a test. `name` is short and unique in the suite.
    pub fn new(name: &str) -> Self {
        leaks::adopt_orphans();
        // Short, as the path of a socket has 107 bytes at most, and a podman container's id alone takes 64.
        let scratch = tempfile::Builder::new()
            .prefix(&format!("cfr-{name}-"))
            .rand_bytes(4)
            .tempdir()
            .expect("a scratch directory");
        fs::create_dir(scratch.path().join("root")).expect("scratch is ours");
        Self {
            name: format!("{name}-{}", std::process::id()),
            scratch,
            hypervisor: required("COFFER_TEST_HYPERVISOR")
                .into_os_string()
                .into_string()
                .expect("UTF-8"),
            sandboxes: AtomicU32::new(0),
            before: leaks::Before::take(),
        }
    }

    /// A scratch directory for files of the test.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// The state root of all sandboxes of the test.
    pub fn root(&self) -> PathBuf {
        self.dir().join("root")
    }

    pub fn hypervisor(&self) -> &str {
        &self.hypervisor
    }

    /// A name for a sandbox that no other test uses.
    pub fn id(&self) -> String {
        format!(
            "{}-{}",
            self.name,
            self.sandboxes.fetch_add(1, Ordering::Relaxed)
        )
    }

    /// `coffer` with the test's state root.
    pub fn coffer(&self, args: &[&str]) -> Command {
        let mut command = Command::new(product("coffer"));
        command
            .arg("--root")
            .arg(self.root())
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// `coffer run` with the test's hypervisor; `args` are its further arguments.
    pub fn run_command(&self, args: &[&str]) -> Command {
        self.coffer(&[&["run", "--hypervisor", &self.hypervisor], args].concat())
    }

    /// Runs `coffer` to its end.
    pub fn call(&self, args: &[&str]) -> Finished {
        finish(self.coffer(args))
    }

    /// Runs `coffer`, which must succeed, and gives its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let done = self.call(args);
        assert_eq!(done.code, 0, "coffer {args:?} failed: {}", done.stderr);
        done.text().to_owned()
    }

    /// Runs a shell script in a fresh sandbox on busybox.
    pub fn shell(&self, options: &[&str], script: &str) -> Finished {
        let rootfs = asset("busybox");
        let rootfs = rootfs.to_str().expect("UTF-8");
        finish(
            self.run_command(
                &[
                    options,
                    &["--rootfs", rootfs, "--", "/bin/sh", "-c", script],
                ]
                .concat(),
            ),
        )
    }

    /// A sandbox that runs in the background until it is dropped.
    pub fn background(&self, options: &[&str], command: &[&str]) -> Background<'_> {
        let rootfs = asset("busybox");
        self.background_on(
            &["--rootfs", rootfs.to_str().expect("UTF-8")],
            options,
            command,
        )
    }

    /// The same on another root: `["--rootfs", DIR]`, `["--bundle", DIR]` or `[LAYOUT]`.
    pub fn background_on(
        &self,
        root: &[&str],
        options: &[&str],
        command: &[&str],
    ) -> Background<'_> {
        let id = self.id();
        let tail: &[&str] = if command.is_empty() { &[] } else { &["--"] };
        let done = finish(
            self.run_command(&[&["-d", "--id", &id], options, root, tail, command].concat()),
        );
        assert_eq!(done.code, 0, "coffer run -d failed: {}", done.stderr);
        Background { test: self, id }
    }

    /// A writable copy of an asset.
    pub fn copy_of(&self, name: &str) -> PathBuf {
        let to = self.dir().join(format!(
            "copy-{}",
            self.sandboxes.fetch_add(1, Ordering::Relaxed)
        ));
        let status = Command::new("cp")
            .arg("-a")
            .arg(asset(name))
            .arg(&to)
            .status()
            .expect("cp runs");
        assert!(status.success(), "can't copy {name}");
        to
    }

    /// Fails if a sandbox left anything behind. Runs by itself at the end of a test.
    pub fn check_leaks(&self) -> Result<()> {
        leaks::check(&self.before, &self.name, &self.root())
    }
}

impl Drop for Test {
    fn drop(&mut self) {
        let found = self.check_leaks();
        if found.is_err() || std::thread::panicking() {
            evidence::print(&self.root());
            leaks::kill_descendants();
        }
        if let Err(leak) = found
            && !std::thread::panicking()
        {
            panic!("{leak:?}");
        }
    }
}

/// A detached sandbox with one container of the same name.
#[derive(Debug)]
pub struct Background<'t> {
    test: &'t Test,
    pub id: String,
}

impl Background<'_> {
    /// `coffer exec` with options.
    pub fn exec_command(&self, options: &[&str], command: &[&str]) -> Command {
        self.test
            .coffer(&[&["exec"], options, &[&self.id, "--"], command].concat())
    }

    /// Runs a command in the container to its end.
    pub fn exec(&self, command: &[&str]) -> Finished {
        finish(self.exec_command(&[], command))
    }

    /// Runs a shell script in the container, which must succeed, and gives its output.
    pub fn sh(&self, script: &str) -> String {
        let done = self.exec(&["/bin/sh", "-c", script]);
        assert_eq!(done.code, 0, "{script}: {}", done.stderr);
        done.text().to_owned()
    }

    /// `coffer state`, parsed.
    pub fn state(&self) -> serde_json::Value {
        serde_json::from_str(&self.test.ok(&["state", &self.id])).expect("state is JSON")
    }

    pub fn status(&self) -> String {
        self.state()["status"]
            .as_str()
            .expect("a status")
            .to_owned()
    }

    /// Waits until the container has this OCI status.
    pub fn wait_status(&self, status: &str) {
        wait_for(&format!("{} to be {status}", self.id), || {
            self.status() == status
        });
    }
}

impl Drop for Background<'_> {
    fn drop(&mut self) {
        let done = self.test.call(&["delete", "--force", &self.id]);
        if done.code != 0 && !std::thread::panicking() && self.test.root().join(&self.id).exists() {
            panic!("coffer delete --force failed: {}", done.stderr);
        }
    }
}

/// Runs a command to its end, or fails the test when it takes longer than [`PATIENCE`].
pub fn finish(command: Command) -> Finished {
    finish_with_input(command, Vec::new())
}

/// The same with bytes on standard input; none means that the command's own stdin stays.
pub fn finish_with_input(mut command: Command, input: Vec<u8>) -> Finished {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let shown = format!("{command:?}");
    let mut child = command
        .spawn()
        .unwrap_or_else(|e| panic!("can't run {shown}: {e}"));
    if let Some(mut stdin) = child.stdin.take() {
        // A child that ends early closes its stdin; its exit code tells the rest.
        std::thread::spawn(move || stdin.write_all(&input));
    }
    let output = wait_with_output(child, &shown).expect("the command ends in time");
    Finished {
        code: exit_code(output.status),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        stdout: output.stdout,
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn wait_with_output(child: Child, shown: &str) -> Result<Output> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    let (done, waiting) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    match waiting.recv_timeout(PATIENCE) {
        Ok(output) => output.with_context(|| format!("can't wait for {shown}")),
        Err(_) => {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
            let output = waiting.recv_timeout(Duration::from_secs(5));
            anyhow::bail!("{shown} did not end in {PATIENCE:?}; so far: {output:?}")
        }
    }
}

/// Waits until something is true, or fails the test.
pub fn wait_for(what: &str, mut truth: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !truth() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// SHA-256 of a file, in hex.
pub fn sha256_of(path: &Path) -> Result<String> {
    use sha2::{Digest, Sha256};
    let mut hasher = Sha256::new();
    let mut file =
        fs::File::open(path).with_context(|| format!("can't open {}", path.display()))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = std::io::Read::read(&mut file, &mut buffer)?;
        if n == 0 {
            return Ok(hasher
                .finalize()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect());
        }
        hasher.update(&buffer[..n]);
    }
}

/// Bytes that look random and are the same every time.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Runs a tool of the host, which must succeed.
pub fn host(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("can't run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {args:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
