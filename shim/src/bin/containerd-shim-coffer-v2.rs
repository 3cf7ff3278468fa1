//! What containerd and CRI-O run for a pod: `start`, `delete`, `-info`, `-v`. See `coffer::containerd`.

use anyhow::{Context, Result};
use coffer::containerd::bootstrap::{Action, Args, MAX_STDIN_BYTES};
use coffer::containerd::{info, start};
use std::io::{self, IsTerminal, Read, Write};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Callers read standard error as the reason.
            let _ = writeln!(io::stderr(), "containerd-shim-coffer-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == start::SUPERVISE) {
        return supervise();
    }
    let args = Args::parse(words)?;
    let answer = match args.action {
        Action::Version => {
            format!("containerd-shim-coffer-v2 {}\n", env!("CARGO_PKG_VERSION")).into_bytes()
        }
        Action::Info => info::info(&stdin()?)?,
        Action::Start => start::start(&args, &stdin()?, &variable("TTRPC_ADDRESS"))?,
        Action::Delete => start::delete(&args)?,
    };
    io::stdout()
        .write_all(&answer)
        .context("can't print the answer")
}

/// The runtime's options: nothing at all from some callers, and from a person who tries `-info`.
fn stdin() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if io::stdin().is_terminal() {
        return Ok(bytes);
    }
    let limit = MAX_STDIN_BYTES as u64 + 1;
    io::stdin()
        .take(limit)
        .read_to_end(&mut bytes)
        .context("can't read standard input")?;
    Ok(bytes)
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn supervise() -> Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(io::stderr)
        .init();
    nix::unistd::setsid().context("can't leave the caller's session")?;
    let runtime = tokio::runtime::Runtime::new().context("can't start the runtime")?;
    Ok(runtime.block_on(start::serve())?)
}
