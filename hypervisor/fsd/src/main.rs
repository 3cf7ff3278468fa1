//! `coffer-fsd --share DIR`: the virtio-fs server of one sandbox.
//!
//! It hosts virtiofsd's passthrough file system behind a vhost-user socket and serves what is below DIR, and nothing
//! else: before the first byte of the guest is read, the process has moved into namespaces of its own with DIR as
//! its root, and has given up every privilege that serving files does not need (see [`jail`]).
//!
//! File descriptor 3 is a listening unix socket on which the connection of the VMM is already pending. One connection
//! is served; the process ends with it.

mod jail;
mod messages;
mod serve;

use anyhow::{Context, bail};
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("coffer-fsd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<ExitCode> {
    let share = share_argument()?;
    let listener = serve::inherited_listener()?;
    messages::to_stderr();
    let descriptors = virtiofsd::limits::setup_rlimit_nofile(None)
        .map_err(anyhow::Error::msg)
        .context("can't raise the limit of open files")?;

    if let jail::Role::Parent(child) = jail::fork_into_pid_namespace()? {
        drop(listener);
        return Ok(jail::wait(child));
    }
    let proc_self_fd =
        jail::enter(&share).with_context(|| format!("can't lock up in {}", share.display()))?;
    let files = serve::open(proc_self_fd, descriptors)?;
    jail::drop_privileges()?;
    serve::serve(files, listener)?;
    Ok(ExitCode::SUCCESS)
}

fn share_argument() -> anyhow::Result<PathBuf> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [option, share] = &arguments[..] else {
        bail!("usage: coffer-fsd --share DIR, with a listening socket on fd 3")
    };
    if option != "--share" {
        bail!("unknown argument {option:?}; usage: coffer-fsd --share DIR");
    }
    Ok(share.into())
}
