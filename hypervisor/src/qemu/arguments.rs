//! QEMU's command line.

use super::Error;
use super::process::reopenable;
use coffer_proto::vmm::{DiskConfig, Files, FsConfig, NicConfig, VmConfig};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;

/// virtio-mmio slots that microvm has without ACPI.
const SLOTS: usize = 8;

/// Kernel parameters of every guest under QEMU. As in coffer-vmm, but the reset is a triple fault: microvm has no
/// keyboard controller.
const KERNEL_PARAMETERS: &str = "reboot=t panic=-1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd \
    quiet console=hvc0 random.trust_cpu=on dummy.numdummies=0";

/// Arguments, and the open files they name by number.
#[derive(Debug, Default)]
pub struct CommandLine {
    pub arguments: Vec<OsString>,
    pub files: Vec<OwnedFd>,
    next_set: u32,
}

/// QEMU's end of each socket; at the other are we and, for virtio-fs, coffer-fsd.
#[derive(Debug)]
pub struct Sockets {
    pub qmp: OwnedFd,
    pub console: OwnedFd,
    pub vsock: OwnedFd,
    pub fs: Option<OwnedFd>,
}

impl CommandLine {
    /// The command line for `config`.
    pub fn new(config: &VmConfig, files: &mut Files, sockets: Sockets) -> Result<Self, Error> {
        // Console, rng and vsock are always there.
        let want = 3 + usize::from(config.fs.is_some()) + config.nics.len() + config.disks.len();
        let want = want + usize::from(config.balloon);
        if want > SLOTS {
            return Err(Error::TooManyDevices { want, have: SLOTS });
        }
        let mut line = Self::default();
        line.machine(config, files)?;
        if let (Some(fs), Some(socket)) = (&config.fs, sockets.fs) {
            line.file_share(fs, socket);
        }
        line.constant_devices(sockets.qmp, sockets.console, sockets.vsock);
        for (slot, nic) in config.nics.iter().enumerate() {
            line.network(slot, nic, files)?;
        }
        for (slot, disk) in config.disks.iter().enumerate() {
            line.disk(slot, disk, files)?;
        }
        if config.balloon {
            line.add(
                "-device",
                "virtio-balloon-device,free-page-reporting=on,deflate-on-oom=on",
            );
        }
        Ok(line)
    }

    fn machine(&mut self, config: &VmConfig, files: &mut Files) -> Result<(), Error> {
        self.flag("-nodefaults");
        self.flag("-no-user-config");
        self.flag("-no-reboot");
        // Stopped until the network slots have the link state they should have.
        self.flag("-S");
        self.add("-display", "none");
        self.add(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
        self.add("-name", format!("coffer-{}", config.id));
        // Without ACPI the devices are announced on the kernel command line, which QEMU extends.
        self.add(
            "-machine",
            "microvm,acpi=off,isa-serial=off,x-option-roms=off,memory-backend=ram",
        );
        self.add("-global", "virtio-mmio.force-legacy=false");
        self.add("-m", format!("{}M", config.memory_mib));
        self.add(
            "-object",
            format!(
                "memory-backend-memfd,id=ram,size={}M,share=on",
                config.memory_mib
            ),
        );
        self.add("-smp", config.vcpus.to_string());
        let mut parameters = KERNEL_PARAMETERS.to_owned();
        if let Some(kvm) = config.kvm {
            let device = self.file_set(files.take(kvm)?);
            self.add("-accel", format!("kvm,device={device}"));
            self.add("-cpu", "host");
        } else {
            self.add("-accel", "tcg,thread=multi");
            self.add("-cpu", "max");
            // Emulation keeps translated code by guest-physical page and drops it when a guest CPU writes there, but it
            // does not see coffer-fsd write: a page that held a program and is reused for another file's would run the
            // old code. Zeroing pages when the guest allocates them is such a write by the CPU.
            parameters += " init_on_alloc=1";
            // microvm has nothing to calibrate the clock with but the PIT, which fails on a busy host.
            if let Some(khz) = host_tsc_khz() {
                // On a busy host the kernel's watchdog would then distrust that clock and fall back to ticks of 10 ms.
                parameters += &format!(" tsc_early_khz={khz} tsc=reliable");
            }
        }
        let kernel = self.inherit(reopenable(files.take(config.kernel)?)?);
        let initrd = self.inherit(reopenable(files.take(config.initrd)?)?);
        self.add("-kernel", format!("/proc/self/fd/{kernel}"));
        self.add("-initrd", format!("/proc/self/fd/{initrd}"));
        self.add("-append", format!("{parameters} {}", config.cmdline));
        Ok(())
    }

    fn constant_devices(&mut self, qmp: OwnedFd, console: OwnedFd, vsock: OwnedFd) {
        let qmp = self.inherit(qmp);
        self.add("-chardev", format!("socket,id=qmp,fd={qmp}"));
        self.add("-mon", "chardev=qmp,mode=control");
        let console = self.inherit(console);
        self.add("-chardev", format!("socket,id=console,fd={console}"));
        self.add("-device", "virtio-serial-device,max_ports=1");
        self.add("-device", "virtconsole,chardev=console");
        self.add("-object", "rng-builtin,id=rng");
        self.add("-device", "virtio-rng-device,rng=rng");
        let vsock = self.inherit(vsock);
        self.add("-chardev", format!("socket,id=vsock,fd={vsock}"));
        self.add("-device", "vhost-user-vsock-device,chardev=vsock");
    }

    fn file_share(&mut self, fs: &FsConfig, socket: OwnedFd) {
        let socket = self.inherit(socket);
        self.add("-chardev", format!("socket,id=fs,fd={socket}"));
        self.add_json(
            "-device",
            &json!({"driver": "vhost-user-fs-device", "chardev": "fs", "tag": fs.tag}),
        );
    }

    /// A slot with a tap is connected to it directly and has its offloads. One without is connected to a hub, to
    /// which a tap can be added later.
    fn network(&mut self, slot: usize, nic: &NicConfig, files: &mut Files) -> Result<(), Error> {
        match nic.tap {
            Some(tap) => {
                let tap = files.take(tap)?;
                let tap = self.inherit(tap);
                self.add("-netdev", format!("tap,id=net{slot},fd={tap},vhost=off"));
            }
            None => self.add("-netdev", format!("hubport,id=net{slot},hubid={slot}")),
        }
        let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
        self.add(
            "-device",
            format!("virtio-net-device,id=nic{slot},netdev=net{slot},mac={mac}"),
        );
        Ok(())
    }

    fn disk(&mut self, slot: usize, disk: &DiskConfig, files: &mut Files) -> Result<(), Error> {
        let file = File::from(files.take(disk.file.ok_or(Error::EmptyDisk)?)?);
        let kind = file.metadata().map_err(Error::host("look at a disk"))?;
        let driver = if kind.file_type().is_block_device() {
            "host_device"
        } else {
            "file"
        };
        let path = self.file_set(file.into());
        let node = format!("disk{slot}");
        let file = json!({
            "driver": driver, "filename": path, "read-only": disk.read_only, "locking": "off", "discard": "unmap",
        });
        self.add_json(
            "-blockdev",
            &json!({"driver": "raw", "node-name": node, "read-only": disk.read_only, "file": file, "discard": "unmap"}),
        );
        self.add_json(
            "-device",
            &json!({"driver": "virtio-blk-device", "drive": node, "serial": disk.serial}),
        );
        Ok(())
    }

    /// Hands a file over as a set of one, for options that want a path.
    fn file_set(&mut self, file: OwnedFd) -> String {
        let set = self.next_set;
        self.next_set += 1;
        let fd = self.inherit(file);
        self.add("-add-fd", format!("fd={fd},set={set}"));
        format!("/dev/fdset/{set}")
    }

    fn inherit(&mut self, file: OwnedFd) -> RawFd {
        let fd = file.as_raw_fd();
        self.files.push(file);
        fd
    }

    fn flag(&mut self, name: &str) {
        self.arguments.push(name.into());
    }

    fn add(&mut self, name: &str, value: impl Into<OsString>) {
        self.arguments.push(name.into());
        self.arguments.push(value.into());
    }

    /// For values that hold text of the configuration: JSON has no separators to escape.
    fn add_json(&mut self, name: &str, value: &Value) {
        self.add(name, value.to_string());
    }
}

/// The rate of the host's time stamp counter, which QEMU gives to the guest unchanged.
fn host_tsc_khz() -> Option<u64> {
    tsc_khz(&std::fs::read_to_string("/proc/cpuinfo").ok()?)
}

fn tsc_khz(cpuinfo: &str) -> Option<u64> {
    let line = cpuinfo.lines().find(|line| line.starts_with("cpu MHz"))?;
    let mhz: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    (mhz >= 1.0).then_some((mhz * 1000.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_proto::vmm::{self, FdIndex, Request, VsockConfig};
    use std::os::fd::AsFd;

    /// `count` open files, as they come with a request.
    fn files(count: usize) -> Files {
        let (a, b) = vmm::control_pair().unwrap();
        vmm::send(a.as_fd(), &Request::Metrics, &vec![a.as_fd(); count]).unwrap();
        vmm::receive::<Request>(b.as_fd()).unwrap().1
    }

    fn file() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn sockets() -> Sockets {
        Sockets {
            qmp: file(),
            console: file(),
            vsock: file(),
            fs: Some(file()),
        }
    }

    fn config() -> VmConfig {
        VmConfig {
            id: "a".parse().unwrap(),
            vcpus: 2,
            memory_mib: 256,
            max_memory_mib: 0,
            kernel: FdIndex(0),
            initrd: FdIndex(1),
            cmdline: "one two".into(),
            kvm: None,
            vsock: VsockConfig {
                guest_cid: 3,
                listener: FdIndex(2),
                ports: Vec::new(),
            },
            console: FdIndex(3),
            fs: Some(FsConfig {
                tag: "a,cache-size=1G".into(),
                socket: FdIndex(4),
            }),
            nics: vec![NicConfig {
                mac: [2, 0, 0, 0, 0, 10],
                tap: None,
            }],
            disks: Vec::new(),
            balloon: true,
            uid: 1000,
        }
    }

    fn value_after<'a>(line: &'a CommandLine, name: &str, part: &str) -> &'a str {
        let mut pairs = line.arguments.windows(2);
        let found = pairs.find(|pair| pair[0] == name && pair[1].to_str().unwrap().contains(part));
        found.unwrap_or_else(|| panic!("no {name} with {part}"))[1]
            .to_str()
            .unwrap()
    }

    #[test]
    fn text_of_the_configuration_can_add_no_options() {
        let disk = DiskConfig {
            serial: "s,drive=x".into(),
            file: Some(FdIndex(5)),
            read_only: true,
        };
        let config = VmConfig {
            disks: vec![disk],
            ..config()
        };
        let line = CommandLine::new(&config, &mut files(6), sockets()).unwrap();
        let fs: Value =
            serde_json::from_str(value_after(&line, "-device", "vhost-user-fs")).unwrap();
        assert_eq!(fs["tag"], "a,cache-size=1G");
        let disk: Value =
            serde_json::from_str(value_after(&line, "-device", "virtio-blk")).unwrap();
        assert_eq!(disk["serial"], "s,drive=x");
        let node: Value = serde_json::from_str(value_after(&line, "-blockdev", "raw")).unwrap();
        assert_eq!(
            (&node["read-only"], &node["file"]["read-only"]),
            (&json!(true), &json!(true))
        );
    }

    #[test]
    fn a_slot_without_tap_waits_at_a_hub() {
        let line = CommandLine::new(&config(), &mut files(6), sockets()).unwrap();
        assert_eq!(
            value_after(&line, "-netdev", "net0"),
            "hubport,id=net0,hubid=0"
        );
        assert!(value_after(&line, "-device", "virtio-net").ends_with("mac=02:00:00:00:00:0a"));
        assert!(value_after(&line, "-append", "one").ends_with(" one two"));
        assert_eq!(line.files.len(), 6, "kernel, initrd and four sockets");
    }

    #[test]
    fn more_devices_than_slots_are_refused() {
        let disk = DiskConfig {
            serial: "s".into(),
            file: Some(FdIndex(5)),
            read_only: true,
        };
        let config = VmConfig {
            disks: vec![disk; 3],
            ..config()
        };
        let refused = CommandLine::new(&config, &mut files(9), sockets());
        assert!(matches!(
            refused,
            Err(Error::TooManyDevices { want: 9, have: 8 })
        ));
    }

    #[test]
    fn the_tsc_rate_is_read_where_the_cpu_tells_it() {
        let intel = "processor\t: 0\ncpu MHz\t\t: 2249.998\ncache size\t: 512 KB\n";
        assert_eq!(tsc_khz(intel), Some(2_249_998));
        assert_eq!(tsc_khz("cpu MHz : 0.000\n"), None);
        assert_eq!(tsc_khz("model name : ARM\n"), None);
    }
}
