//! Running other programs.

use std::io::{Read, Seek, SeekFrom};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Lines of a failed program's output that are shown.
const SHOWN_LINES: usize = 40;

/// Runs a program quietly; its output is shown only when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let mut log = tempfile::tempfile().context("create a log file")?;
    let status = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .status()
        .with_context(|| format!("start {}", describe(command)))?;
    if status.success() {
        return Ok(());
    }
    let mut output = Vec::new();
    log.seek(SeekFrom::Start(0))?;
    log.read_to_end(&mut output)?;
    let output = String::from_utf8_lossy(&output);
    let lines: Vec<_> = output.lines().collect();
    let shown = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n");
    bail!("{} ended with {status}:\n{shown}", describe(command))
}

/// Runs a program whose output the user wants to see as it comes.
pub fn run_shown(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("start {}", describe(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", describe(command));
    }
    Ok(())
}

/// What a program prints, without the white space around it.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", describe(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{} ended with {}:\n{}",
            describe(command),
            output.status,
            said.trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
