//! `-info`: what containerd 2 asks a runtime about itself, before it makes a sandbox with it.

use super::bootstrap::BootstrapError;
use super::bootstrap::MAX_STDIN_BYTES;
use crate::features::features;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

/// The name that makes containerd look for `containerd-shim-coffer-v2`.
const NAME: &str = "io.containerd.coffer.v2";
/// The type under which containerd registers the features structure, whose encoding is JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The RuntimeInfo to print. `stdin` holds the handler's options, if it has any, and they come back in the answer.
///
/// The annotation `containerd.io/runtime-allow-mounts` is left out on purpose: containerd then mounts by itself what
/// the kernel alone can't (its `format/…` and `mkfs/…` types), and hands over plain mounts.
pub fn info(stdin: &[u8]) -> Result<Vec<u8>, BootstrapError> {
    if stdin.len() > MAX_STDIN_BYTES {
        return Err(BootstrapError::TooLong);
    }
    let options = Any::parse_from_bytes(stdin)
        .ok()
        .filter(|any| !any.type_url.is_empty());
    let version = RuntimeVersion {
        version: coffer_proto::VERSION.to_owned(),
        ..Default::default()
    };
    let features = Any {
        type_url: FEATURES_TYPE.to_owned(),
        value: features().to_string().into_bytes(),
        ..Default::default()
    };
    let info = RuntimeInfo {
        name: NAME.to_owned(),
        version: Some(version).into(),
        options: options.into(),
        features: Some(features).into(),
        ..Default::default()
    };
    Ok(info
        .write_to_bytes()
        .expect("a message in memory can be written"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_names_the_runtime_and_holds_its_features_as_json() {
        let any = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            ..Default::default()
        };
        let info = RuntimeInfo::parse_from_bytes(&info(&any.write_to_bytes().unwrap()).unwrap());
        let info = info.unwrap();
        assert_eq!(info.name, "io.containerd.coffer.v2");
        assert_eq!(info.options.as_ref(), Some(&any));
        let told = info.features.unwrap();
        assert_eq!(told.type_url, FEATURES_TYPE);
        assert_eq!(
            serde_json::from_slice::<serde_json::Value>(&told.value).unwrap(),
            features()
        );
    }

    #[test]
    fn no_options_are_no_options() {
        let info = RuntimeInfo::parse_from_bytes(&info(b"").unwrap()).unwrap();
        assert!(info.options.is_none());
    }
}
