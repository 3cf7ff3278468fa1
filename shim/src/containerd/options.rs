//! The options of a runtime handler in containerd's or CRI-O's own configuration: which `coffer.toml` counts for its sandboxes.
//!
//! They come as an Any, and a handler of this runtime has `runtimeoptions.v1.Options` in it: the path of a file, or from
//! containerd 1.7 on the handler's `options` table itself. A caller that knows only runc may send runc's options, empty ones.

use crate::config::{Config, ConfigError};
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, rt};
use std::path::Path;

/// Ours, whatever a caller puts before it.
const OURS: &str = "runtimeoptions.v1.Options";
const RUNC: &str = "containerd.runc.v1.Options";
/// What errors in `config_body` name as their file.
const BODY: &str = "the runtime handler's options";

/// Why options can't be honoured.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    #[error("runtime options of type {0:?} are not for this runtime, which takes {OURS}")]
    Type(String),
    #[error("runtime options of type {RUNC} mean nothing here; this runtime takes {OURS}")]
    Runc,
    #[error("runtime options of type {OURS} can't be parsed")]
    Parse(#[source] protobuf::Error),
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The configuration that options name or hold; without options the file in its usual place.
pub fn config(options: Option<&Any>) -> Result<Config, OptionsError> {
    let Some(options) = options else {
        return Ok(Config::load(None)?);
    };
    let name = options
        .type_url
        .rsplit('/')
        .next()
        .unwrap_or(&options.type_url);
    if name == RUNC {
        return match RuncOptions::parse(&options.value).map_err(OptionsError::Parse)? {
            RuncOptions { others: false, .. } => Ok(Config::load(None)?),
            RuncOptions { others: true, .. } => Err(OptionsError::Runc),
        };
    }
    if !name.ends_with(OURS) {
        return Err(OptionsError::Type(options.type_url.clone()));
    }
    let RuntimeOptions { path, body } =
        RuntimeOptions::parse(&options.value).map_err(OptionsError::Parse)?;
    if !path.is_empty() {
        return Ok(Config::load(Some(Path::new(&path)))?);
    }
    if !body.is_empty() {
        return Ok(Config::parse(Path::new(BODY), &body)?);
    }
    Ok(Config::load(None)?)
}

/// The Task API of the sandbox that a container joins. containerd 2 tells it, for pods of the Sandbox API, in options of runc's,
/// whatever the runtime is; with the protocol in front of the address, which it does not take back.
pub fn sandbox_address(options: Option<&Any>) -> Option<String> {
    let options = options.filter(|any| any.type_url.ends_with(RUNC))?;
    let address = RuncOptions::parse(&options.value).ok()?.task_api_address;
    let address = address.strip_prefix("ttrpc+").unwrap_or(&address);
    (!address.is_empty()).then(|| address.to_owned())
}

/// `containerd.runc.v1.Options`: task_api_address = 12, task_api_version = 13, and what is meant for runc. Of that, io_uid = 4 and
/// io_gid = 5 come with every container that has a user namespace: who owns runc's pipes, of which there are none here.
#[derive(Debug, Default, PartialEq, Eq)]
struct RuncOptions {
    task_api_address: String,
    others: bool,
}

impl RuncOptions {
    fn parse(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut options = Self::default();
        let mut stream = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = stream.read_raw_tag_or_eof()? {
            match tag {
                0x62 => options.task_api_address = stream.read_string()?,
                0x20 | 0x28 | 0x68 => drop(stream.read_uint32()?),
                _ => {
                    options.others = true;
                    rt::skip_field_for_tag(tag, &mut stream)?;
                }
            }
        }
        Ok(options)
    }
}

/// `runtimeoptions.v1.Options`: type_url = 1, config_path = 2, config_body = 3.
#[derive(Debug, Default, PartialEq, Eq)]
struct RuntimeOptions {
    path: String,
    body: String,
}

impl RuntimeOptions {
    fn parse(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut options = Self::default();
        let mut stream = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = stream.read_raw_tag_or_eof()? {
            match tag {
                0x12 => options.path = stream.read_string()?,
                0x1a => options.body = String::from_utf8_lossy(&stream.read_bytes()?).into_owned(),
                _ => rt::skip_field_for_tag(tag, &mut stream)?,
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.into(),
            value: value.into(),
            ..Default::default()
        }
    }

    fn refusal(type_url: &str, value: &[u8]) -> String {
        let error = config(Some(&any(type_url, value))).unwrap_err();
        let cause = error.source().map(ToString::to_string).unwrap_or_default();
        format!("{error}: {cause}")
    }

    #[test]
    fn options_are_a_path_or_a_body() {
        let options = |bytes: &[u8]| RuntimeOptions::parse(bytes).unwrap();
        assert_eq!(options(b"\x0a\x01t\x12\x02/c").path, "/c");
        assert_eq!(options(b"\x1a\x09vcpus = 2").body, "vcpus = 2");
        let two = config(Some(&any(OURS, b"\x1a\x09vcpus = 2"))).unwrap();
        assert_eq!(two.vcpus, 2);
        let url = format!("type.googleapis.com/{OURS}");
        assert_eq!(config(Some(&any(&url, b"\x1a\x09vcpus = 2"))).unwrap(), two);
    }

    #[test]
    fn what_is_wrong_with_options_is_named() {
        assert!(refusal("containerd.linux.runc.CreateOptions", b"").contains("CreateOptions"));
        assert!(refusal(RUNC, b"\x30\x01").contains(RUNC));
        assert!(refusal(OURS, b"\x12\xff").contains(OURS));
        assert!(refusal(OURS, b"\x12\x0b/no/such/it").contains("/no/such/it"));
        let unknown = refusal(OURS, b"\x1a\x14SystemdCgroup = true");
        assert!(
            unknown.contains("SystemdCgroup") && unknown.contains(BODY),
            "{unknown}"
        );
        assert!(refusal(OURS, b"\x1a\x0avcpus = 99").contains("vcpus = 99"));
    }

    #[test]
    fn options_of_runc_that_say_nothing_of_a_vm_are_taken() {
        for bytes in [&b""[..], b"\x20\xa0\x8d\x06\x28\xa0\x8d\x06"] {
            assert!(config(Some(&any(RUNC, bytes))).is_ok());
        }
    }

    #[test]
    fn options_of_runc_may_tell_the_sandbox_of_a_container() {
        for joins in [&b"\x62\x05unix:\x68\x02"[..], b"\x62\x0bttrpc+unix:"] {
            let joins = any(RUNC, joins);
            assert_eq!(sandbox_address(Some(&joins)).as_deref(), Some("unix:"));
            assert!(config(Some(&joins)).is_ok());
        }
        assert_eq!(sandbox_address(Some(&any(RUNC, b"\x30\x01"))), None);
        assert_eq!(sandbox_address(Some(&any(OURS, b"\x62\x01x"))), None);
    }
}
