//! `coffer`: runs containers in microVMs of their own.

use std::process::ExitCode;

fn main() -> ExitCode {
    coffer::cli::main()
}
