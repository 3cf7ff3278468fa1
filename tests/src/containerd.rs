//! containerd's programs, with the product's shim in their PATH.

use crate::product;
use std::process::Command;

/// Part of PATH with the containerd of Debian's development branch, which only the test node has.
pub const NEXT: &str = "/opt/containerd-next/usr/bin:";

/// `containerd` or `ctr`; `programs` goes before PATH, with a colon at its end.
pub fn program(programs: &str, name: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{programs}{}:{path}", product("").display());
    // env(1) looks it up in the PATH that it sets, and becomes it.
    let mut command = Command::new("env");
    command.arg(format!("PATH={path}")).arg(name);
    command
}
