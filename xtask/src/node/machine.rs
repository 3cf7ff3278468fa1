//! One run of the node's QEMU: booted to be saved, or restored to run a command.

use std::fs;
use std::io::{BufRead, BufReader, Write, stdout};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::node::output::EndMark;
use crate::node::{Files, UnnamedFile};

pub const QEMU: &str = "qemu-system-x86_64";

/// Two CPUs, as races between CPUs are what tests in the node are for. Memory for two sandboxes at a time.
const MACHINE: &[&str] = &[
    "-M",
    "q35,hpet=off,smbus=off,sata=off,usb=off,vmport=off",
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-display",
    "none",
    "-accel",
    "tcg,thread=multi,tb-size=512",
    "-cpu",
    "max",
    "-smp",
    "2",
    "-m",
    "3072",
    "-device",
    "virtio-rng-pci",
    "-device",
    "virtio-serial-pci",
    "-chardev",
    "socket,id=control,fd=0",
    "-device",
    "virtserialport,chardev=control,name=node.control",
    "-chardev",
    "socket,id=output,fd=1",
    "-device",
    "virtserialport,chardev=output,name=node.output",
];
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet mitigations=off panic=-1";

/// A node that is not ready after this long hangs. Booting takes 10 to 15 s on an idle machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(240);
const SAVE_DEADLINE: Duration = Duration::from_secs(120);
/// How often QEMU is asked whether it has saved the state.
const SAVE_POLL: Duration = Duration::from_millis(100);
/// Lines of the node's console that are shown when it dies.
const SHOWN_LINES: usize = 20;

/// What a saved state fits to, besides the files.
pub fn identity() -> String {
    format!("{} {KERNEL_COMMAND_LINE}", MACHINE.join(" "))
}

/// The disks that differ between runs.
#[derive(Debug)]
pub struct Disks {
    pub share: PathBuf,
    pub scratch: PathBuf,
}

#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    /// The guest's port `node.control`: takes the command.
    control: UnixStream,
    /// The guest's port `node.output`: gives what the command prints.
    output: UnixStream,
    /// The log of the guest's serial console.
    console: UnnamedFile,
}

impl Machine {
    /// Starts a node and waits until it is ready for a command. QEMU's monitor listens at `monitor`.
    pub fn boot(files: &Files, disks: &Disks, monitor: &Path) -> Result<Self> {
        let monitor = format!("unix:{},server=on,wait=off", monitor.display());
        let machine = Self::start(files, disks, &["-qmp", &monitor])?;
        machine.output.set_read_timeout(Some(BOOT_DEADLINE))?;
        let mut line = String::new();
        let read = BufReader::new(&machine.output).read_line(&mut line);
        match read {
            Ok(_) if line == "ready\n" => Ok(machine),
            Ok(0) => bail!("the node died while it booted: {}", machine.end_of_qemu()),
            Ok(_) => bail!("the node said {line:?} instead of being ready"),
            Err(e) => Err(e).with_context(|| {
                format!(
                    "the node does not boot; its console:\n{}",
                    machine.console()
                )
            }),
        }
    }

    /// Starts a node from a saved state; it is ready at once.
    pub fn restore(files: &Files, disks: &Disks, state: &Path) -> Result<Self> {
        Self::start(
            files,
            disks,
            &["-incoming", &format!("file:{}", state.display())],
        )
    }

    fn start(files: &Files, disks: &Disks, more: &[&str]) -> Result<Self> {
        let console = UnnamedFile::new(0)?;
        let (control, qemu_control) = UnixStream::pair()?;
        let (output, qemu_output) = UnixStream::pair()?;
        let mut qemu = Command::new(QEMU);
        qemu.args(MACHINE);
        for (name, path, read_only) in [
            ("root", files.root.as_path(), true),
            ("assets", files.assets.as_path(), true),
            ("share", disks.share.as_path(), true),
            ("scratch", disks.scratch.as_path(), false),
        ] {
            let read_only = if read_only { "on" } else { "off" };
            let cache = "cache.no-flush=on";
            let path = path.display();
            qemu.arg("-blockdev").arg(format!(
                "driver=file,filename={path},node-name={name},read-only={read_only},{cache}"
            ));
            qemu.arg("-device")
                .arg(format!("virtio-blk-pci,drive={name}"));
        }
        qemu.arg("-kernel")
            .arg(&files.vmlinuz)
            .arg("-initrd")
            .arg(&files.initrd);
        qemu.args(["-append", KERNEL_COMMAND_LINE]);
        qemu.arg("-serial")
            .arg(format!("file:{}", console.path().display()));
        qemu.args(more);
        qemu.stdin(OwnedFd::from(qemu_control))
            .stdout(OwnedFd::from(qemu_output));
        let qemu = qemu
            .spawn()
            .with_context(|| format!("start {QEMU}: run `cargo xtask setup`"))?;
        Ok(Self {
            qemu,
            control,
            output,
            console,
        })
    }

    /// Writes the state of a ready node to a file and ends the node.
    pub fn save(mut self, monitor: &Path, state: &Path) -> Result<()> {
        let mut monitor = Monitor::connect(monitor)?;
        // The default bandwidth is meant for networks.
        monitor.execute("migrate-set-parameters", &json!({ "max-bandwidth": 0 }))?;
        monitor.execute(
            "migrate",
            &json!({ "uri": format!("file:{}", state.display()) }),
        )?;
        let begin = Instant::now();
        loop {
            let answer = monitor.execute("query-migrate", &json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => break,
                Some("failed") => bail!("QEMU could not save the node: {answer}"),
                _ => ensure!(
                    begin.elapsed() < SAVE_DEADLINE,
                    "QEMU does not finish saving the node: {answer}"
                ),
            }
            std::thread::sleep(SAVE_POLL);
        }
        monitor.execute("quit", &json!({}))?;
        self.qemu.wait().context("wait for QEMU")?;
        Ok(())
    }

    /// Runs a shell script; its output goes to ours. Returns its exit status.
    pub fn run(mut self, script: &[u8]) -> Result<u8> {
        let word = format!("end-of-node-{}", process::id());
        let header = format!("{word} {}\n", script.len());
        let sent = self
            .control
            .write_all(header.as_bytes())
            .and_then(|()| self.control.write_all(script));
        let status = EndMark::new(&word).copy(&self.output, stdout().lock())?;
        match status {
            Some(status) => Ok(status),
            None => {
                sent.ok();
                bail!(
                    "the test node died, this says nothing about the command: {}",
                    self.end_of_qemu()
                )
            }
        }
    }

    /// How QEMU ended. Called when its sockets are closed, so it does not wait long.
    fn end_of_qemu(mut self) -> String {
        let status = match self.qemu.wait() {
            Ok(status) => status.to_string(),
            Err(e) => e.to_string(),
        };
        format!(
            "QEMU ended with {status}; the node's console:\n{}",
            self.console()
        )
    }

    fn console(&self) -> String {
        let text = fs::read(self.console.path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nothing in the node is worth a shutdown. Errors mean that QEMU has ended already.
        self.control.shutdown(Shutdown::Both).ok();
        self.qemu.kill().ok();
        self.qemu.wait().ok();
    }
}

/// QEMU's monitor: one JSON object per line each way, events between the answers.
struct Monitor {
    read: BufReader<UnixStream>,
    write: UnixStream,
}

impl Monitor {
    fn connect(path: &Path) -> Result<Self> {
        let write =
            UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        let mut monitor = Self {
            read: BufReader::new(write.try_clone()?),
            write,
        };
        let mut greeting = String::new();
        monitor.read.read_line(&mut greeting)?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.write, "{request}").with_context(|| format!("send {command} to QEMU"))?;
        loop {
            let mut line = String::new();
            ensure!(
                self.read.read_line(&mut line)? > 0,
                "QEMU ended at {command}"
            );
            let mut answer: Value = serde_json::from_str(&line)?;
            ensure!(
                answer.get("error").is_none(),
                "QEMU refuses {command}: {line}"
            );
            if let Some(answer) = answer.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }
}
