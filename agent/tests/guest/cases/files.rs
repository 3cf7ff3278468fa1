//! Mounts, devices, masked paths, and root file systems that mean harm.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use serde_json::json;

use crate::fixture::{Draft, Guest, same};

pub fn mounts_of_the_spec(guest: &Guest) -> anyhow::Result<()> {
    let output = Draft::new(
        "mounts",
        "cat /proc/self/mountinfo; ls /dev/mqueue /sys/kernel > /dev/null",
    )?
    .run(guest)?
    .good()?;
    // mountinfo: id parent device root mount-point options … - type source super-options
    let seen: Vec<(&str, &str, &str)> = output
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let fields: Vec<&str> = left.split(' ').collect();
            Some((fields[4], right.split(' ').next()?, fields[5]))
        })
        .collect();
    for expected in [
        ("/", "tmpfs", "rw,relatime"),
        ("/proc", "proc", "rw,relatime"),
        ("/dev", "tmpfs", "rw,nosuid"),
        ("/dev/pts", "devpts", "rw,nosuid,noexec,relatime"),
        ("/dev/shm", "tmpfs", "rw,nosuid,nodev,noexec,relatime"),
        ("/dev/mqueue", "mqueue", "rw,nosuid,nodev,noexec,relatime"),
        ("/sys", "sysfs", "ro,nosuid,nodev,noexec,relatime"),
        (
            "/sys/fs/cgroup",
            "cgroup2",
            "ro,nosuid,nodev,noexec,relatime",
        ),
    ] {
        ensure!(seen.contains(&expected), "no {expected:?} in {output}");
    }
    ensure!(
        !output.contains("/run/coffer ") && !output.contains("devtmpfs"),
        "mounts of the guest: {output}"
    );
    Ok(())
}

pub fn mount_options(guest: &Guest) -> anyhow::Result<()> {
    let script = "grep ' /mnt' /proc/self/mountinfo; stat -c %a /mnt /mnt2; cp /bin/busybox /mnt/echo; /mnt/echo hi; \
        dd if=/dev/zero of=/mnt/big bs=1M count=9 2>&1 | grep -o 'No space'";
    let output = Draft::new("options", script)?
        .mount(
            "tmpfs",
            "/mnt",
            "tmpfs",
            &[
                "noexec", "nodev", "noatime", "size=8m", "mode=700", "rslave",
            ],
        )
        .mount("tmpfs", "/mnt2", "tmpfs", &["ro"])
        .run(guest)?;
    let text = format!("{}{}", output.stdout, output.stderr);
    for part in [
        "/mnt rw,nodev,noexec,noatime",
        "size=8192k",
        "/mnt2 ro,relatime",
        "700\n755\n",
        "Permission denied",
        "No space",
    ] {
        ensure!(text.contains(part), "no {part:?} in {text}");
    }
    Ok(())
}

pub fn bind_mounts(guest: &Guest) -> anyhow::Result<()> {
    let script = "cat /vol/file /etc/motd; echo new > /vol/new; echo no > /ro/new; echo no >> /etc/motd; ls /ro; ls -d /made/by/us";
    let draft = Draft::new("bind", script)?;
    let volume = draft.volume(0)?;
    fs::write(volume.join("file"), "in the volume\n")?;
    fs::write(draft.share().join("mounts/1"), "a message\n")?;
    let share = draft.share();
    let source = |n: u32| format!("{}/mounts/{n}", share.display());
    let draft = draft
        .mount("bind", "/vol", &source(0), &["rbind", "rw"])
        .mount("bind", "/ro", &source(0), &["rbind", "ro", "nosuid"])
        .mount("bind", "/etc/motd", &source(1), &["bind", "ro"])
        .mount("none", "/made/by/us", &source(0), &["bind"]);
    let output = draft.run(guest)?;
    for part in [
        "in the volume\n",
        "a message\n",
        "file\nnew\n",
        "/made/by/us",
    ] {
        ensure!(output.stdout.contains(part), "no {part:?} in {output:?}");
    }
    same(
        "refusals",
        output.stderr.matches("Read-only file system").count(),
        2,
    )?;
    same(
        "the file",
        fs::read_to_string(volume.join("new"))?.as_str(),
        "new\n",
    )?;
    same(
        "the message",
        fs::read_to_string(draft.share().join("mounts/1"))?.as_str(),
        "a message\n",
    )
}

pub fn recursive_read_only(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new(
        "rro",
        "echo x > /ro/below/f; echo x > /rro/below/f; ls /ro/below",
    )?;
    let below = draft.volume(0)?.join("below");
    fs::create_dir(&below)?;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("t"), &below, Some("tmpfs"), flags, None::<&str>)?;
    let source = format!("{}/mounts/0", draft.share().display());
    let output = draft
        .mount("bind", "/ro", &source, &["rbind", "ro"])
        .mount("bind", "/rro", &source, &["rbind", "rro"])
        .run(guest);
    nix::mount::umount(&below)?;
    let output = output?;
    // Plain ro is for the one mount.
    same("below", output.stdout.trim(), "f")?;
    same(
        "refusals",
        output.stderr.matches("Read-only file system").count(),
        1,
    )
}

pub fn tmpcopyup(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("copyup", "cat /etc/deep/file; readlink /etc/link; stat -c '%a %u' /etc/deep/file; echo x > /etc/passwd && echo written")?
        .mount("tmpfs", "/etc", "tmpfs", &["tmpcopyup"]);
    let etc = draft.rootfs().join("etc");
    fs::create_dir(etc.join("deep"))?;
    fs::write(etc.join("deep/file"), "content\n")?;
    std::os::unix::fs::chown(etc.join("deep/file"), Some(33), Some(33))?;
    symlink("/nowhere", etc.join("link"))?;
    let output = draft.run(guest)?.good()?;
    same(
        "copy",
        output.as_str(),
        "content\n/nowhere\n644 33\nwritten\n",
    )?;
    ensure!(
        fs::read_to_string(etc.join("passwd"))?.contains("root"),
        "the image was written to"
    );
    Ok(())
}

pub fn masked_and_read_only(guest: &Guest) -> anyhow::Result<()> {
    let script = "wc -c < /proc/timer_list; wc -c < /etc/secret; ls /etc/hidden; echo x > /etc/hidden/y; \
        echo 99999 > /proc/sys/kernel/pid_max; echo 1 > /proc/irq/default_smp_affinity; echo x > /etc/fixed; echo x > /tmp/ok && echo done";
    let draft = Draft::new("masked", script)?
        .set(
            "/linux/maskedPaths",
            json!(["/proc/timer_list", "/etc/secret", "/etc/hidden", "/no/such"]),
        )
        .set(
            "/linux/readonlyPaths",
            json!(["/proc/sys", "/proc/irq", "/etc/fixed", "/no/such"]),
        );
    let etc = draft.rootfs().join("etc");
    fs::write(etc.join("secret"), "secret")?;
    fs::write(etc.join("fixed"), "fixed")?;
    fs::create_dir(etc.join("hidden"))?;
    fs::write(etc.join("hidden/secret"), "secret")?;
    let output = draft.run(guest)?;
    same(
        "output",
        output.stdout.split_whitespace().collect::<Vec<_>>(),
        vec!["0", "0", "done"],
    )?;
    same(
        "refusals",
        output.stderr.matches("Read-only file system").count(),
        4,
    )
    .with_context(|| format!("{output:?}"))?;
    same(
        "file",
        fs::read_to_string(etc.join("fixed"))?.as_str(),
        "fixed",
    )
}

pub fn read_only_root(guest: &Guest) -> anyhow::Result<()> {
    let script = "echo x > /etc/new; mkdir /new; echo x > /dev/shm/ok && echo shm; echo x > /dev/null && echo null";
    let draft = Draft::new("roroot", script)?.set("/root/readonly", json!(true));
    let output = draft.run(guest)?;
    same("output", output.stdout.as_str(), "shm\nnull\n")?;
    same(
        "refusals",
        output.stderr.matches("Read-only file system").count(),
        2,
    )?;
    ensure!(
        !draft.rootfs().join("new").exists(),
        "the image was written to"
    );
    Ok(())
}

pub fn root_propagation(guest: &Guest) -> anyhow::Result<()> {
    for (name, expected) in [
        ("rshared", "shared:"),
        ("private", " - tmpfs"),
        ("rslave", " - tmpfs"),
        ("unbindable", "unbindable"),
    ] {
        let output = Draft::new(
            "propagation",
            "grep ' / / \\|rootfs / ' /proc/self/mountinfo",
        )?
        .set("/linux/rootfsPropagation", json!(name))
        .run(guest)?
        .good()?;
        let is_private = !output.contains("shared:") && !output.contains("unbindable");
        ensure!(
            output.contains(expected) && (expected != " - tmpfs" || is_private),
            "{name}: {output}"
        );
    }
    Ok(())
}

pub fn default_devices(guest: &Guest) -> anyhow::Result<()> {
    let script = "for d in null zero full random urandom tty; do stat -c '%n %t:%T %a' /dev/$d; done; \
        for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; \
        head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; echo x > /dev/full; echo out > /dev/stdout";
    let output = Draft::new("devices", script)?.run(guest)?;
    let expected = "/dev/null 1:3 666\n/dev/zero 1:5 666\n/dev/full 1:7 666\n/dev/random 1:8 666\n\
        /dev/urandom 1:9 666\n/dev/tty 5:0 666\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n\
        /proc/self/fd/2\npts/ptmx\n4\n4\nout\n";
    same("devices", output.stdout.as_str(), expected)?;
    ensure!(output.stderr.contains("No space left"), "{}", output.stderr);
    Ok(())
}

pub fn devices_of_the_spec(guest: &Guest) -> anyhow::Result<()> {
    let device = |path: &str, kind: &str, major: u32, minor: u32| json!({"path": path, "type": kind, "major": major, "minor": minor, "fileMode": 0o640, "uid": 3, "gid": 4});
    let script = "stat -c '%n %t:%T %a %u %g %F' /dev/net/mine /dev/block /dev/pipe";
    let output = Draft::new("specdev", script)?
        .set(
            "/linux/devices",
            json!([
                device("/dev/net/mine", "c", 10, 200),
                device("/dev/block", "b", 7, 1),
                device("/dev/pipe", "p", 0, 0)
            ]),
        )
        .run(guest)?
        .good()?;
    let expected = "/dev/net/mine a:c8 640 3 4 character special file\n/dev/block 7:1 640 3 4 block special file\n\
        /dev/pipe 0:0 640 3 4 fifo\n";
    same("devices", output.as_str(), expected)
}

/// Whatever an image's symlinks say, mounts and devices land inside the root.
pub fn symlinks_in_the_image(guest: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new(
        "links",
        "ls -d /tmp/trap/inner /etc/real/sub; cat /etc/real/sub/f; ls /dev/null",
    )?;
    let root = draft.rootfs();
    fs::create_dir_all("/tmp/trap")?;
    fs::create_dir_all(root.join("etc/real"))?;
    // Absolute, with dots, and through another one.
    symlink("/tmp/trap", root.join("escape"))?;
    symlink("../../../../../../etc/real", root.join("dots"))?;
    symlink("escape", root.join("again"))?;
    fs::remove_dir(root.join("dev"))?;
    symlink("../../../../../../../../tmp/dev", root.join("dev"))?;
    fs::create_dir(root.join("tmp/dev"))?;
    fs::create_dir(root.join("tmp/trap"))?;
    fs::write(draft.volume(0)?.join("f"), "from the volume\n")?;
    let source = format!("{}/mounts/0", draft.share().display());
    let draft = draft
        .mount("bind", "/again/inner", &source, &["bind"])
        .mount("bind", "/dots/sub", &source, &["bind"])
        .mount("tmpfs", "/escape/made", "tmpfs", &[]);
    let output = draft.run(guest)?.good()?;
    ensure!(
        output.contains("/tmp/trap/inner") && output.contains("from the volume"),
        "{output}"
    );
    same(
        "the guest's /tmp/trap",
        fs::read_dir("/tmp/trap")?.count(),
        0,
    )?;
    ensure!(!fs::exists("/tmp/dev")?, "a device was made outside");
    // A file is made through no dangling symlink.
    let draft = Draft::new("links", "true")?;
    fs::write(draft.share().join("mounts/0"), "x")?;
    symlink("/tmp/trap/file", draft.rootfs().join("etc/dangling"))?;
    let message = draft
        .mount("bind", "/etc/dangling", &source, &["bind"])
        .refused()?;
    ensure!(
        message.contains("mounts[7]") && message.contains("mount point"),
        "{message}"
    );
    same(
        "the guest's /tmp/trap",
        fs::read_dir("/tmp/trap")?.count(),
        0,
    )
}

pub fn symlinked_proc(_: &Guest) -> anyhow::Result<()> {
    for name in ["proc", "sys"] {
        let draft = Draft::new("linkedproc", "true")?;
        fs::remove_dir(draft.rootfs().join(name))?;
        fs::create_dir(draft.rootfs().join("tmp/x"))?;
        symlink("/tmp/x", draft.rootfs().join(name))?;
        let message = draft.refused()?;
        ensure!(message.contains(&format!("on /{name}")), "{message}");
    }
    Ok(())
}

/// An image whose /dev is its own, with something else under the name null: nothing is masked with it.
pub fn image_without_null(_: &Guest) -> anyhow::Result<()> {
    let draft = Draft::new("nonull", "true")?
        .remove_mount("/dev")
        .remove_mount("/dev/pts")
        .remove_mount("/dev/shm");
    let draft = draft.remove_mount("/dev/mqueue");
    symlink("/proc/sysrq-trigger", draft.rootfs().join("dev/null"))?;
    let message = draft.refused()?;
    ensure!(message.contains("/dev/null"), "{message}");
    Ok(())
}

/// Another container of the pod swaps a directory of a common volume for a symlink, in a loop, while containers are
/// created that mount below it.
pub fn swapped_symlinks(guest: &Guest) -> anyhow::Result<()> {
    let _ = fs::remove_dir_all("/tmp/outside");
    fs::create_dir("/tmp/outside")?;
    let draft = Draft::new("swap", "true")?;
    let volume = draft.volume(0)?;
    fs::create_dir(volume.join("a"))?;
    symlink("../../../../../../../../tmp/outside", volume.join("b"))?;
    let source = |n: u32| format!("{}/mounts/{n}", draft.share().display());
    draft.volume(1)?;
    let sources = (source(0), source(1));
    let draft = draft
        .mount("bind", "/vol", &sources.0, &["rbind"])
        .mount("bind", "/vol/a/x/y", &sources.1, &["bind"])
        .mount("tmpfs", "/vol/a/z", "tmpfs", &[]);
    let stop = AtomicBool::new(false);
    let mut created = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (a, b, c) = (volume.join("a"), volume.join("b"), volume.join("c"));
            while !stop.load(Ordering::Relaxed) {
                let swap = || -> std::io::Result<()> {
                    fs::rename(&a, &c)?;
                    fs::rename(&b, &a)?;
                    fs::rename(&c, &b)
                };
                let _ = swap();
            }
        });
        for _ in 0..25 {
            // Whether it succeeds depends on the moment.
            if let Ok(mut running) = draft.create() {
                created += 1;
                let _ = running.kill_and_delete(guest);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    same("entries outside", fs::read_dir("/tmp/outside")?.count(), 0)?;
    draft.check_gone()?;
    println!("       {created} of 25 were created");
    Ok(())
}

/// Neither the working directory nor anything else leads through /proc to what the stage has open.
pub fn links_of_proc(guest: &Guest) -> anyhow::Result<()> {
    for fd in [3, 4, 5, 6, 7, 8] {
        let draft =
            Draft::new("procfd", "pwd")?.set("/process/cwd", json!(format!("/proc/self/fd/{fd}")));
        let error = match draft.create() {
            Err(error) => error,
            Ok(mut running) => {
                let error = running.start().err().context("it entered a descriptor")?;
                running.finish(guest)?;
                running.container.delete()?;
                error
            }
        };
        ensure!(error.to_string().contains("process.cwd"), "{error}");
    }
    Ok(())
}
