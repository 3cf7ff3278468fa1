//! Containers whose names an engine resolves for them.

use super::{Error, Sandbox, on_host};
use crate::machine::Machine;
use crate::network::DockersNames;
use crate::spec::Bundle;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::ContainerId;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// More than any of these has; C libraries read the first three servers and some options.
const MAX_RESOLV_CONF: u64 = 64 << 10;

impl Sandbox {
    /// Lets a container that is about to start ask docker's resolver, where its resolv.conf names that. docker writes the file when it has
    /// wired the network. Nothing else of a container depends on it: what goes wrong is in the log.
    pub(super) async fn serve_names(&self, machine: &Machine, id: &ContainerId) {
        match self.dockers_names(id).await {
            Ok(Some(names)) => machine.serve_names(names).await,
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(container = %id, error = chain(&error), "its resolv.conf can't be read");
            }
        }
    }

    /// What the engine's resolv.conf for the container says of docker's resolver.
    async fn dockers_names(&self, id: &ContainerId) -> Result<Option<DockersNames>, Error> {
        let target = id.clone();
        let bundle = self
            .apply(move |pod| Ok(pod.container(&target)?.bundle.clone()))
            .await?;
        on_host(move || {
            let bundle = Bundle::load(&bundle)?;
            let mut mounts = bundle.spec().mounts().iter().flatten();
            let mount = mounts.find(|mount| mount.destination() == Path::new(RESOLV_CONF));
            let source = mount.and_then(|mount| mount.source().as_deref());
            let Some(containers) = source.and_then(|source| read(source).ok()) else {
                return Ok(None);
            };
            let hosts = read(Path::new(RESOLV_CONF)).unwrap_or_default();
            Ok(DockersNames::in_file(&containers, &hosts))
        })
        .await
    }
}

/// Reads a regular file. A user may have mounted anything there, and a fifo has no writer.
fn read(path: &Path) -> io::Result<String> {
    let mut options = File::options();
    let file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut text = String::new();
    file.take(MAX_RESOLV_CONF).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;

    #[test]
    fn a_fifo_in_place_of_a_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (file, fifo) = (dir.path().join("file"), dir.path().join("fifo"));
        std::fs::write(&file, "nameserver 127.0.0.11\n").unwrap();
        assert_eq!(read(&file).unwrap(), "nameserver 127.0.0.11\n");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        assert!(read(&fifo).is_err());
        assert!(read(dir.path()).is_err());
    }
}
