//! A container of Coffer against the same container under runc.

use std::fs;
use std::io::copy;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bench::report::{Report, Samples};
use crate::bench::{Place, timed};
use crate::process;

const NAME: &str = "bench";
/// Bytes that go through standard output.
const STREAM_MIB: u64 = 32;

/// What runs in both containers. Names, and what a shell does.
const LOADS: [(&str, &str); 4] = [
    ("exec of a program that does nothing", "true"),
    (
        "write a 32 MiB file and sync",
        "dd if=/dev/zero of=/bench-large bs=1M count=32 conv=fsync 2> /dev/null",
    ),
    (
        "read a 32 MiB file",
        "dd if=/bench-large of=/dev/null bs=1M 2> /dev/null",
    ),
    (
        "make and remove 200 small files",
        "mkdir /bench-small && cd /bench-small && for i in $(seq 200); do echo $i > $i; done && cd / && rm -r /bench-small",
    ),
];

#[derive(Debug, Clone, Copy)]
enum Side {
    Coffer,
    Runc,
}

pub fn measure(place: &Place, report: &mut Report) -> Result<()> {
    place.start_sandbox(NAME, "coffer-vmm")?;
    start_runc(place)?;
    for (what, script) in LOADS {
        eprintln!("--> {what}");
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for _ in 0..place.runs {
            ours.add(timed(|| {
                process::run(&mut exec(place, Side::Coffer, script))
            })?);
            theirs.add(timed(|| {
                process::run(&mut exec(place, Side::Runc, script))
            })?);
        }
        report.add(what, "ms", ours, "runc", theirs);
    }
    eprintln!("--> standard output");
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for _ in 0..place.runs {
        ours.add(timed(|| {
            stream(exec(place, Side::Coffer, &stream_script()))
        })?);
        theirs.add(timed(|| stream(exec(place, Side::Runc, &stream_script())))?);
    }
    report.add("32 MiB through standard output", "ms", ours, "runc", theirs);
    place.delete_sandbox(NAME)?;
    process::run(runc(place).args(["delete", "--force", NAME]))
}

fn stream_script() -> String {
    format!(
        "dd if=/dev/zero bs=64k count={} 2> /dev/null",
        STREAM_MIB * 16
    )
}

fn stream(mut command: Command) -> Result<()> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("start exec")?;
    let mut output = child.stdout.take().context("no output")?;
    let bytes = copy(&mut output, &mut std::io::sink())?;
    let status = child.wait()?;
    ensure!(
        status.success() && bytes == STREAM_MIB << 20,
        "{bytes} bytes of output, {status}"
    );
    Ok(())
}

fn exec(place: &Place, side: Side, script: &str) -> Command {
    let mut command = match side {
        Side::Coffer => {
            let mut coffer = place.coffer();
            coffer.args(["exec", NAME, "--"]);
            coffer
        }
        Side::Runc => {
            let mut runc = runc(place);
            runc.args(["exec", NAME]);
            runc
        }
    };
    // The shell is part of neither when the program alone is the load.
    match script {
        "true" => command.arg("true"),
        script => command.args(["sh", "-c", script]),
    };
    command
}

fn runc(place: &Place) -> Command {
    let mut runc = Command::new("runc");
    runc.arg("--root")
        .arg(place.scratch.join("runc"))
        .stdin(Stdio::null());
    runc
}

/// Starts a container that sleeps, from runc's own default bundle and the same root.
fn start_runc(place: &Place) -> Result<()> {
    let bundle = place.scratch.join("bundle");
    fs::create_dir(&bundle)?;
    process::run(Command::new("runc").arg("spec").current_dir(&bundle))?;
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(["sleep", "100000"]);
    config["root"] = json!({ "path": place.rootfs, "readonly": false });
    fs::write(&path, serde_json::to_vec(&config)?)?;
    let mut run = runc(place);
    run.args(["run", "--detach", "--bundle"])
        .arg(&bundle)
        .arg(NAME);
    let status = run
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("start runc")?;
    ensure!(status.success(), "runc run ended with {status}");
    Ok(())
}
