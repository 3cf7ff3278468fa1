//! PID 1 of the guest: what the agent does around its containers, in small.

use std::fs;
use std::os::unix::fs::symlink;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::Instant;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use crate::cases;
use crate::fixture::Guest;

// Lines on the console which the host understands.
pub const PASSED: &str = "PASSED ";
pub const FAILED: &str = "FAILED ";
pub const DONE: &str = "DONE ";
/// On the kernel command line: only cases with this in their name.
pub const CASES: &str = "coffer.cases=";

pub fn main() -> ! {
    if let Err(error) = run() {
        println!("the guest can't run the cases: {error:#}");
    }
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    loop {
        nix::unistd::pause();
    }
}

fn run() -> anyhow::Result<()> {
    leave_initramfs()?;
    mount_all()?;
    let command_line = fs::read_to_string("/proc/cmdline")?;
    let filter = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(CASES))
        .unwrap_or("");
    let guest = Guest::start()?;
    let mut count = 0;
    for (name, case) in cases::ALL.iter().filter(|(name, _)| name.contains(filter)) {
        count += 1;
        let start = Instant::now();
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| case(&guest)));
        let millis = start.elapsed().as_millis();
        match outcome {
            Ok(Ok(())) => println!("{PASSED}{name}"),
            Ok(Err(error)) => println!("{FAILED}{name}: {error:#}"),
            Err(_) => println!("{FAILED}{name}: it panicked"),
        }
        println!("       {millis} ms");
    }
    println!("{DONE}{count}");
    Ok(())
}

/// As the agent: `pivot_root` can't leave an initramfs, so the guest's root is a tmpfs with the files of the initramfs.
fn leave_initramfs() -> anyhow::Result<()> {
    fs::create_dir_all("/new")?;
    mount(
        Some("root"),
        "/new",
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    for name in ["busybox", "lib", "lib64", "usr"] {
        let from = Path::new("/").join(name);
        if from.exists() {
            copy(&from, &Path::new("/new").join(name))?;
        }
    }
    std::env::set_current_dir("/new")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    nix::unistd::chroot(".")?;
    Ok(std::env::set_current_dir("/")?)
}

/// Copies a file or a directory with all in it.
pub fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    if !from.is_dir() {
        fs::copy(from, to)?;
        return Ok(());
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

fn mount_all() -> anyhow::Result<()> {
    for (kind, target, data) in [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", "mode=0755"),
        ("devpts", "/dev/pts", "mode=0620,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("tmpfs", "/run", "mode=0755"),
        ("tmpfs", "/tmp", "mode=1777"),
        (
            "cgroup2",
            "/sys/fs/cgroup",
            "nsdelegate,memory_recursiveprot",
        ),
    ] {
        fs::create_dir_all(target)?;
        let flags = MsFlags::MS_NOSUID.difference(MsFlags::MS_NOSUID);
        mount(Some(kind), target, Some(kind), flags, Some(data))?;
    }
    fs::copy("/busybox", "/run/busybox")?;
    fs::create_dir_all("/etc")?;
    symlink("/proc/self/mounts", "/etc/mtab")?;
    fs::create_dir("/sys/fs/cgroup/.agent")?;
    fs::write("/sys/fs/cgroup/.agent/cgroup.procs", "0")?;
    fs::write("/proc/self/oom_score_adj", "-1000")?;
    nix::unistd::sethostname("pod")?;
    Ok(())
}
