//! The host's side: initrd, QEMU, report.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};

use crate::initrd::Initrd;
use crate::pid1::{CASES, DONE, FAILED, PASSED};

/// The longest case takes twenty seconds under emulation on an idle machine, and machines are not always idle.
const SILENCE: Duration = Duration::from_secs(180);
const BUSYBOX: &str = "/bin/busybox";

pub fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--list") {
        // What cargo-nextest asks a test executable.
        if !args.iter().any(|arg| arg == "--ignored") {
            println!("containers_in_a_guest: test");
        }
        return;
    }
    let filter = args
        .iter()
        .find(|arg| !arg.starts_with('-') && *arg != "containers_in_a_guest");
    match run(filter.map_or("", String::as_str)) {
        Ok(()) => {}
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::exit(1);
        }
    }
}

fn run(filter: &str) -> anyhow::Result<()> {
    let kernel = kernel()?;
    let directory = tempfile::tempdir()?;
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, build_initrd()?).context("write the initrd")?;
    let mut qemu = start_qemu(&kernel, &initrd, filter)?;
    let outcome = follow(&mut qemu);
    let _ = qemu.kill();
    qemu.wait()?;
    let failed: Vec<String> = outcome?;
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("failed: {}", failed.join(", "))
    }
}

fn kernel() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("COFFER_GUEST_KERNEL") {
        return Ok(path.into());
    }
    let home = std::env::var_os("HOME").context("HOME is not set")?;
    let cache = Path::new(&home).join(".cache/coffer");
    let built = |path: &PathBuf| -> Option<SystemTime> {
        let name = path.file_name()?.to_str()?;
        let is_kernel = name.starts_with("kernel-") || name.starts_with("guest-kernel-");
        is_kernel
            .then(|| path.join("vmlinux").metadata().ok()?.modified().ok())
            .flatten()
    };
    let entries = std::fs::read_dir(&cache)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path());
    let newest = entries
        .filter(|path| built(path).is_some())
        .max_by_key(built);
    match newest {
        Some(path) => Ok(path.join("vmlinux")),
        None => bail!(
            "no guest kernel in {}: run `cargo xtask setup`, or set COFFER_GUEST_KERNEL",
            cache.display()
        ),
    }
}

/// This executable with the libraries it is linked to, and busybox for the containers.
fn build_initrd() -> anyhow::Result<Vec<u8>> {
    let mut initrd = Initrd::default();
    let own = std::env::current_exe()?;
    initrd.add_file(&own, "init")?;
    for library in libraries(&own)? {
        initrd.add_file(Path::new(&library), &library)?;
    }
    initrd
        .add_file(Path::new(BUSYBOX), "busybox")
        .context("busybox-static is needed")?;
    initrd.add_directory("root");
    Ok(initrd.finish())
}

fn libraries(executable: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("ldd")
        .arg(executable)
        .output()
        .context("run ldd")?;
    let text = String::from_utf8(output.stdout)?;
    let path = |line: &str| {
        line.split_whitespace()
            .find(|word| word.starts_with('/'))
            .map(str::to_owned)
    };
    Ok(text.lines().filter_map(path).collect())
}

fn start_qemu(kernel: &Path, initrd: &Path, filter: &str) -> anyhow::Result<Child> {
    // The emulated machine has no clock that its kernel could measure the TSC with.
    let khz = tsc_khz()?;
    let command_line = format!(
        "reboot=t panic=-1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd quiet \
         console=hvc0 random.trust_cpu=on tsc_early_khz={khz} {CASES}{filter}"
    );
    Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,acpi=off,isa-serial=off,x-option-roms=off"])
        .args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "512"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .args([
            "-device",
            "virtio-serial-device",
            "-device",
            "virtconsole,chardev=console",
        ])
        .args(["-chardev", "stdio,id=console,signal=off"])
        .args(["-device", "virtio-rng-device"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", &command_line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("run qemu-system-x86_64")
}

fn tsc_khz() -> anyhow::Result<u64> {
    let info = std::fs::read_to_string("/proc/cpuinfo")?;
    let line = info
        .lines()
        .find(|line| line.starts_with("cpu MHz"))
        .context("no cpu MHz")?;
    let mhz: f64 = line.rsplit(':').next().unwrap_or_default().trim().parse()?;
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a clock rate"
    )]
    Ok((mhz * 1000.0) as u64)
}

/// Prints the guest's console and collects the cases that failed.
fn follow(qemu: &mut Child) -> anyhow::Result<Vec<String>> {
    let output = qemu.stdout.take().context("the console is a pipe")?;
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    let mut cases: BTreeMap<String, bool> = BTreeMap::new();
    loop {
        let line = lines
            .recv_timeout(SILENCE)
            .context("the guest stopped before it was done")?;
        println!("{line}");
        std::io::stdout().flush()?;
        if let Some(case) = line.strip_prefix(PASSED) {
            cases.insert(case.to_owned(), true);
        } else if let Some(case) = line.strip_prefix(FAILED) {
            let name = case.split(": ").next().unwrap_or(case);
            cases.insert(name.to_owned(), false);
        } else if let Some(count) = line.strip_prefix(DONE) {
            if count.trim().parse() != Ok(cases.len()) || cases.is_empty() {
                bail!("{count} cases ran and {} were seen", cases.len());
            }
            println!(
                "{} cases, {} passed",
                cases.len(),
                cases.values().filter(|ok| **ok).count()
            );
            return Ok(cases
                .into_iter()
                .filter(|(_, ok)| !ok)
                .map(|(name, _)| name)
                .collect());
        }
    }
}
