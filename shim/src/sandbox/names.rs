//! Containers whose names an engine resolves for them.

use super::{Error, Sandbox};
use crate::machine::Machine;
use crate::network::DockersNames;
use crate::spec::Bundle;
use coffer_proto::error_chain::chain;
use coffer_proto::ids::ContainerId;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// More than any of these has; C libraries read the first three servers and some options.
const MAX_RESOLV_CONF: u64 = 64 << 10;

impl Sandbox {
    /// Lets a container that is about to start ask docker's resolver, where its resolv.conf names that. docker writes the file when it has
    /// wired the network. Nothing else of a container depends on it: what goes wrong is in the log.
    pub(super) async fn serve_names(&self, machine: &Machine, id: &ContainerId) {
        match self.resolv_conf(id).await {
            Ok(Some(resolv_conf)) => {
                let hosts = read(Path::new(RESOLV_CONF)).unwrap_or_default();
                if let Some(names) = DockersNames::in_file(&resolv_conf, &hosts) {
                    machine.serve_names(names).await;
                }
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(container = %id, error = chain(&error), "its resolv.conf can't be read");
            }
        }
    }

    /// What the engine mounts there.
    async fn resolv_conf(&self, id: &ContainerId) -> Result<Option<String>, Error> {
        let target = id.clone();
        let bundle = self
            .apply(move |pod| Ok(pod.container(&target)?.bundle.clone()))
            .await?;
        let bundle = Bundle::load(&bundle)?;
        let mut mounts = bundle.spec().mounts().iter().flatten();
        let mount = mounts.find(|mount| mount.destination() == Path::new(RESOLV_CONF));
        let source = mount.and_then(|mount| mount.source().clone());
        Ok(source.and_then(|source| read(&source).ok()))
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(MAX_RESOLV_CONF)
        .read_to_string(&mut text)?;
    Ok(text)
}
