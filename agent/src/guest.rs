//! The guest as a machine: its names and clock, the pod's share, its figures, its end.

use crate::init;
use coffer_proto::agent::{self, Resync, StatGuestResponse};
use coffer_proto::limits::SHARE_DIR;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::ClockId;
use nix::unistd::Pid;
use std::collections::HashMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::time::Duration;

/// Why the guest could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error(
        "the host's build is {host} and the agent's {agent}: they must have the same MAJOR.MINOR"
    )]
    Version { host: String, agent: String },
    #[error("can't set the host name {name:?}")]
    Hostname {
        name: String,
        #[source]
        cause: nix::Error,
    },
    #[error("can't write {path}")]
    Write {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("can't mount the pod's share {tag:?} at {SHARE_DIR}")]
    Share {
        tag: String,
        #[source]
        cause: std::io::Error,
    },
    #[error("can't make the pod's shared memory {bytes} bytes large")]
    SharedMemory {
        bytes: u64,
        #[source]
        cause: nix::Error,
    },
    #[error("{0:?} is no sysctl of a pod")]
    SysctlName(String),
    #[error("can't set sysctl {name} to {value:?}")]
    Sysctl {
        name: String,
        value: String,
        #[source]
        cause: std::io::Error,
    },
    #[error("can't set the clock to {unix_ns} ns")]
    Clock {
        unix_ns: i64,
        #[source]
        cause: nix::Error,
    },
    #[error("{0} bytes of entropy are not between 32 and 512")]
    EntropyLength(usize),
    #[error("can't stir in entropy")]
    Entropy(#[source] std::io::Error),
    #[error("can't read {path}")]
    Read {
        path: &'static str,
        #[source]
        cause: std::io::Error,
    },
}

/// Refuses a host of another MAJOR.MINOR: the protocol may differ.
pub fn check_version(host: &str, agent: &str) -> Result<(), GuestError> {
    let line = |version: &str| {
        let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
        Some((parts.next()??, parts.next()??))
    };
    if line(host).is_some() && line(host) == line(agent) {
        return Ok(());
    }
    Err(GuestError::Version {
        host: host.to_owned(),
        agent: agent.to_owned(),
    })
}

/// Sets the host name, and the files by which containers that bind the guest's learn names.
pub fn set_names(hostname: &str, resolv_conf: &str, own: &[IpAddr]) -> Result<(), GuestError> {
    if !hostname.is_empty() {
        let failed = |cause| GuestError::Hostname {
            name: hostname.to_owned(),
            cause,
        };
        nix::unistd::sethostname(hostname).map_err(failed)?;
        write("/etc/hostname", &format!("{hostname}\n"))?;
    }
    write("/etc/hosts", &hosts(hostname, own))?;
    if resolv_conf.is_empty() {
        Ok(())
    } else {
        write("/etc/resolv.conf", resolv_conf)
    }
}

/// hosts(5) of the pod: the loopback, and its own addresses with its name.
fn hosts(hostname: &str, own: &[IpAddr]) -> String {
    let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    if !hostname.is_empty() {
        hosts.extend(own.iter().map(|ip| format!("{ip}\t{hostname}\n")));
    }
    hosts
}

fn write(path: &str, content: &str) -> Result<(), GuestError> {
    let path = PathBuf::from(path);
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&path, content));
    written.map_err(|cause| GuestError::Write { path, cause })
}

/// Mounts the pod's share. Device files in it are never devices; set-user-id programs of images have to work.
pub fn mount_share(tag: &str) -> Result<(), GuestError> {
    let failed = |cause| GuestError::Share {
        tag: tag.to_owned(),
        cause,
    };
    std::fs::create_dir_all(SHARE_DIR).map_err(failed)?;
    mount(
        Some(tag),
        SHARE_DIR,
        Some("virtiofs"),
        MsFlags::MS_NODEV,
        None::<&str>,
    )
    .map_err(|cause| failed(cause.into()))
}

/// Sets the size of /dev/shm, the pod's shared memory; 0 leaves it as it is.
pub fn size_shared_memory(bytes: u64) -> Result<(), GuestError> {
    if bytes == 0 {
        return Ok(());
    }
    let size = format!("size={bytes}");
    let flags = MsFlags::MS_REMOUNT | init::NO_EXEC;
    mount(
        None::<&str>,
        init::SHARED_MEMORY,
        None::<&str>,
        flags,
        Some(&*size),
    )
    .map_err(|cause| GuestError::SharedMemory { bytes, cause })
}

/// Sets the sysctls of the namespaces that the pod shares; the shim decides which those are.
pub fn set_sysctls(sysctls: &HashMap<String, String>) -> Result<(), GuestError> {
    for (name, value) in sysctls {
        let path = sysctl_path(name)?;
        let failed = |cause| GuestError::Sysctl {
            name: name.clone(),
            value: value.clone(),
            cause,
        };
        std::fs::write(path, value).map_err(failed)?;
    }
    Ok(())
}

/// The file of a sysctl. As sysctl(8) has it, '.' parts the name, and where it was '/' it is part of it ("eth0/1").
fn sysctl_path(name: &str) -> Result<PathBuf, GuestError> {
    let part = |part: &str| {
        let part = part.replace('/', ".");
        let plain = !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
        (plain && !part.starts_with('.')).then_some(part)
    };
    let parts: Option<Vec<String>> = name.split('.').map(part).collect();
    let parts = parts
        .filter(|parts| parts.len() > 1)
        .ok_or_else(|| GuestError::SysctlName(name.to_owned()))?;
    Ok(["/proc/sys".to_owned()].into_iter().chain(parts).collect())
}

/// Sets the wall clock and gives the kernel's random generator the host's entropy.
pub fn resync(wanted: &Resync) -> Result<(), GuestError> {
    if wanted.unix_ns != 0 {
        let unix_ns = wanted.unix_ns;
        let time = TimeSpec::new(
            unix_ns.div_euclid(1_000_000_000),
            unix_ns.rem_euclid(1_000_000_000),
        );
        ClockId::CLOCK_REALTIME
            .set_time(time)
            .map_err(|cause| GuestError::Clock { unix_ns, cause })?;
    }
    if wanted.entropy.is_empty() {
        Ok(())
    } else {
        add_entropy(&wanted.entropy)
    }
}

/// Longest entropy taken at once: far more than the generator's state of 32 bytes.
const MAX_ENTROPY: usize = 512;

/// `struct rand_pool_info` of <linux/random.h>.
#[repr(C)]
struct PoolInfo {
    /// In bits.
    entropy_count: libc::c_int,
    /// In bytes.
    length: libc::c_int,
    bytes: [u8; MAX_ENTROPY],
}

/// ioctls of <linux/random.h>, which libc leaves out.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

#[allow(unsafe_code)]
fn add_entropy(entropy: &[u8]) -> Result<(), GuestError> {
    let length = i32::try_from(entropy.len())
        .ok()
        .filter(|_| (32..=MAX_ENTROPY).contains(&entropy.len()));
    let length = length.ok_or(GuestError::EntropyLength(entropy.len()))?;
    let mut info = PoolInfo {
        entropy_count: length * 8,
        length,
        bytes: [0; MAX_ENTROPY],
    };
    info.bytes[..entropy.len()].copy_from_slice(entropy);
    let device = File::options()
        .write(true)
        .open("/dev/urandom")
        .map_err(GuestError::Entropy)?;
    // SAFETY: RNDADDENTROPY reads a rand_pool_info with `length` bytes behind it, which `info` is. RNDRESEEDCRNG takes
    // no argument; it makes the generator use what was added now and not minutes later.
    let done = unsafe {
        libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const info) == 0
            && libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) == 0
    };
    if done {
        Ok(())
    } else {
        Err(GuestError::Entropy(std::io::Error::last_os_error()))
    }
}

/// "6.12.95"
pub fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// What the guest knows of itself now.
pub fn stat() -> Result<StatGuestResponse, GuestError> {
    let read =
        |path| std::fs::read_to_string(path).map_err(|cause| GuestError::Read { path, cause });
    let memory = read("/proc/meminfo")?;
    let status = read("/proc/self/status")?;
    Ok(StatGuestResponse {
        memory_total: kib_field(&memory, "MemTotal:") << 10,
        memory_available: kib_field(&memory, "MemAvailable:") << 10,
        agent_rss: kib_field(&status, "VmRSS:") << 10,
        uptime_us: u64::try_from(crate::boot::since_boot().as_micros()).unwrap_or(u64::MAX),
        ..Default::default()
    })
}

/// The number of a "Name:   123 kB" line; 0 where there is none.
fn kib_field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// What /proc says of a process; None when it has ended.
pub fn process(pid: Pid) -> Option<agent::Process> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim_start)
    };
    Some(agent::Process {
        pid: pid.as_raw().unsigned_abs(),
        // Real, effective, saved and file system uid.
        uid: field("Uid:")?.split_whitespace().next()?.parse().ok()?,
        // The kernel escapes newlines and backslashes in it.
        command: field("Name:")?.to_owned(),
        ..Default::default()
    })
}

/// A file system that does not answer must not keep the machine from its end.
const SYNC_DEADLINE: Duration = Duration::from_secs(2);

/// The orderly end: all processes die, what they wrote goes to the host, the share is let go, the machine restarts.
pub fn shut_down() -> ! {
    kill_everything();
    let (done, finished) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        nix::unistd::sync();
        let _ = umount2(SHARE_DIR, MntFlags::MNT_DETACH);
        let _ = done.send(());
    });
    let _ = finished.recv_timeout(SYNC_DEADLINE);
    end_machine()
}

/// The end, now. A restart is what both hypervisors take for it.
pub fn end_machine() -> ! {
    kill_everything();
    if std::process::id() == 1 {
        let _ = reboot(RebootMode::RB_AUTOBOOT);
    }
    // Not PID 1, or the kernel refused: ending PID 1 makes it panic, which restarts as well.
    std::process::exit(1)
}

/// SIGKILL to every process but this one, from PID 1 only.
fn kill_everything() {
    if std::process::id() == 1 {
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_agree_in_major_and_minor() {
        check_version("0.1.0", "0.1.9").unwrap();
        for (host, agent) in [
            ("0.2.0", "0.1.0"),
            ("1.1.0", "0.1.0"),
            ("", "0.1.0"),
            ("0", "0.1.0"),
            ("a.b", "a.b"),
        ] {
            let error = check_version(host, agent).unwrap_err().to_string();
            assert!(
                error.contains(&format!("is {host} and the agent's {agent}")),
                "{error}"
            );
        }
    }

    #[test]
    fn sysctls_stay_below_proc_sys() {
        let path = |name| sysctl_path(name).map(|path| path.to_str().unwrap().to_owned());
        assert_eq!(
            path("net.ipv4.ip_forward").unwrap(),
            "/proc/sys/net/ipv4/ip_forward"
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding").unwrap(),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        for bad in [
            "",
            ".",
            "net",
            "net..x",
            "net.//.//x",
            "net./../x",
            "net.a b",
            "net.a\0",
        ] {
            assert!(path(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn the_pod_knows_its_own_name() {
        let own = ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        assert!(hosts("web", &own).ends_with("\n10.0.0.2\tweb\nfd00::2\tweb\n"));
        assert!(!hosts("", &own).contains("10.0.0.2"));
    }

    #[test]
    fn the_figures_are_there() {
        let stat = stat().unwrap();
        let me = process(Pid::this()).unwrap();
        assert_eq!(
            (me.pid, me.uid),
            (std::process::id(), nix::unistd::getuid().as_raw())
        );
        assert!(
            stat.memory_total > stat.memory_available && stat.agent_rss > 0 && stat.uptime_us > 0
        );
    }
}
