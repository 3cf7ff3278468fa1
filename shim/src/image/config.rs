//! The part of an image's config that Coffer uses. The files of docker and of OCI differ in fields that are not read
//! here, and docker writes `null` where OCI leaves a field out.

use super::Error;
use oci_spec::image::Digest;
use serde::Deserialize;

/// What an image says about the program to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    /// Words before the arguments.
    pub entrypoint: Option<Vec<String>>,
    /// Arguments, unless the user gives others.
    pub cmd: Option<Vec<String>>,
    /// `KEY=value`.
    pub env: Option<Vec<String>>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty means root.
    #[serde(default)]
    pub user: String,
    pub working_dir: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ConfigFile {
    architecture: String,
    os: String,
    config: Option<RunConfig>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    /// Docker writes null for an image without layers.
    diff_ids: Option<Vec<Digest>>,
}

impl ConfigFile {
    /// A manifest without a platform may still be for another one.
    pub(super) fn check_platform(&self, name: &str) -> Result<(), Error> {
        if (self.os.as_str(), self.architecture.as_str()) == ("linux", "amd64") {
            return Ok(());
        }
        let reason = format!(
            "the image is for {}/{}, this machine is linux/amd64",
            self.os, self.architecture
        );
        Err(Error::Unsupported {
            name: name.into(),
            reason,
        })
    }

    /// Digests of the layers' plain tars, lowest first.
    pub(super) fn diff_ids(&self) -> &[Digest] {
        self.rootfs.diff_ids.as_deref().unwrap_or_default()
    }

    pub(super) fn into_run_config(self) -> RunConfig {
        self.config.unwrap_or_default()
    }
}
