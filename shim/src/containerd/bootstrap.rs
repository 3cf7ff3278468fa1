//! The words that containerd and CRI-O exchange with a shim binary before the Task API takes over.
//!
//! ```text
//! caller                 argv                                       stdin               answer on stdout
//! containerd 1.6, 1.7    -namespace N -address A … -id I start      Any (options)       unix:///path
//! containerd 2.0 to 2.2  the same                                   the same            unix:///path (means API v2)
//! containerd 2.3 and up  the same                                   BootstrapParams     BootstrapResult, API v3
//! CRI-O "vm"             -namespace default -address "" …           empty               unix:///path
//! ```
//!
//! All callers run the binary in the bundle directory, and read standard output and error as one, so nothing else may be
//! printed. Which dialect a caller speaks is told by its stdin alone: a BootstrapParams that names the same
//! id and namespace as argv can only come from containerd 2.3 or later, since an Any has a type URL and bytes in those fields.

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

/// Options of a runtime are a TOML section; nobody has one this large.
pub const MAX_STDIN_BYTES: usize = 1 << 20;
/// The Task API that we announce to those who ask for it.
const TASK_API_VERSION: i32 = 3;

/// Extensions of BootstrapParams that are runtime options; the others are for shims that know them.
const OPTIONS: [&str; 2] = ["runtimeoptions.v1.Options", "containerd.runc.v1.Options"];
/// Levels of BootstrapParams from here down are more verbose than "info".
const LOG_LEVEL_DEBUG: i32 = -4;

/// Why a command line or its input is not one of ours.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootstrapError {
    #[error("the flag {0} needs a value")]
    NoValue(String),
    #[error("there is no flag {0}")]
    UnknownFlag(String),
    #[error("there is no action {0:?}; containerd knows start and delete")]
    UnknownAction(String),
    #[error("the flag -{0} is required")]
    Missing(&'static str),
    #[error("standard input is longer than {MAX_STDIN_BYTES} bytes")]
    TooLong,
}

/// What the caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a supervisor, or name the one that the container's pod has.
    Start,
    /// Clean up after a supervisor that is gone.
    Delete,
    /// Describe the runtime.
    Info,
    /// Print the version.
    Version,
}

/// The command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    pub action: Action,
    pub namespace: String,
    pub id: String,
    /// containerd's gRPC socket; empty under CRI-O, which takes no events.
    pub address: String,
    pub publish_binary: String,
    /// Only with `delete`; `start` runs in the bundle.
    pub bundle: String,
    pub debug: bool,
}

impl Args {
    /// Parses Go's flag syntax: one dash or two, value after `=` or as the next word.
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, BootstrapError> {
        let mut args = Self {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            publish_binary: String::new(),
            bundle: String::new(),
            debug: false,
        };
        let mut action = None;
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                action = Some(match word.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    _ => return Err(BootstrapError::UnknownAction(word)),
                });
                continue;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => args.debug = inline.as_deref() != Some("false"),
                "info" => action = Some(Action::Info),
                "v" | "version" => action = Some(Action::Version),
                _ => {
                    let field = args
                        .value_of(name)
                        .ok_or_else(|| BootstrapError::UnknownFlag(word.clone()))?;
                    *field = inline
                        .or_else(|| words.next())
                        .ok_or_else(|| BootstrapError::NoValue(word.clone()))?;
                }
            }
        }
        args.action = action.ok_or_else(|| BootstrapError::UnknownAction(String::new()))?;
        args.check()
    }

    fn value_of(&mut self, name: &str) -> Option<&mut String> {
        match name {
            "namespace" => Some(&mut self.namespace),
            "id" => Some(&mut self.id),
            "address" => Some(&mut self.address),
            "publish-binary" => Some(&mut self.publish_binary),
            "bundle" => Some(&mut self.bundle),
            _ => None,
        }
    }

    fn check(self) -> Result<Self, BootstrapError> {
        if matches!(self.action, Action::Start | Action::Delete) {
            if self.namespace.is_empty() {
                return Err(BootstrapError::Missing("namespace"));
            }
            if self.id.is_empty() {
                return Err(BootstrapError::Missing("id"));
            }
        }
        Ok(self)
    }
}

/// How the answer to `start` has to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// The bare address: everyone before containerd 2.3, and CRI-O.
    Address,
    /// A protobuf BootstrapResult.
    Result,
}

/// What came on standard input.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    pub dialect: Dialect,
    /// Runtime options of the handler's configuration.
    pub options: Option<Any>,
    /// Where events go; empty where nobody takes them.
    pub events_address: String,
    /// The parameters ask for debug lines. Before them there was only a flag.
    pub debug: bool,
}

impl Input {
    /// Understands the bytes of standard input; `ttrpc_address` is the environment's TTRPC_ADDRESS.
    pub fn read(args: &Args, stdin: &[u8], ttrpc_address: &str) -> Result<Self, BootstrapError> {
        if stdin.len() > MAX_STDIN_BYTES {
            return Err(BootstrapError::TooLong);
        }
        if let Ok(params) = BootstrapParams::parse_from_bytes(stdin)
            && params.instance_id == args.id
            && params.namespace == args.namespace
        {
            let mut values = params
                .extensions
                .iter()
                .filter_map(|extension| extension.value.as_ref());
            let options = values
                .find(|any| OPTIONS.iter().any(|name| any.type_url.ends_with(name)))
                .cloned();
            let given = [ttrpc_address, &params.containerd_ttrpc_address];
            let events_address = given
                .into_iter()
                .find(|a| !a.is_empty())
                .unwrap_or_default()
                .to_owned();
            return Ok(Self {
                dialect: Dialect::Result,
                options,
                events_address,
                debug: params.log_level.value() <= LOG_LEVEL_DEBUG,
            });
        }
        let options = Any::parse_from_bytes(stdin)
            .ok()
            .filter(|any| !any.type_url.is_empty());
        Ok(Self {
            dialect: Dialect::Address,
            options,
            events_address: ttrpc_address.to_owned(),
            debug: false,
        })
    }
}

/// The bytes to print for `start`.
pub fn answer(dialect: Dialect, address: &str) -> Vec<u8> {
    match dialect {
        Dialect::Address => address.as_bytes().to_vec(),
        Dialect::Result => {
            let result = BootstrapResult {
                version: TASK_API_VERSION,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            };
            result
                .write_to_bytes()
                .expect("three short fields always encode")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::Extension;

    const ADDRESS: &str = "unix:///run/coffer/k8s.io/p1/task.sock";

    fn words(line: &str) -> Vec<String> {
        line.split(' ')
            .map(|w| {
                if w == "''" {
                    String::new()
                } else {
                    w.to_owned()
                }
            })
            .collect()
    }

    fn options() -> Any {
        Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: vec![10, 1, b'x'],
            ..Default::default()
        }
    }

    fn params() -> Vec<u8> {
        let extension = Extension {
            value: Some(options()).into(),
            ..Default::default()
        };
        BootstrapParams {
            instance_id: "p1".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/run/containerd/containerd.sock.ttrpc".into(),
            extensions: vec![extension],
            ..Default::default()
        }
        .write_to_bytes()
        .unwrap()
    }

    /// Each caller's exact words, and the exact bytes that it takes for an answer.
    #[test]
    fn every_caller_is_answered_in_its_dialect() {
        let containerd = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id p1 start";
        let debug = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id p1 -debug start";
        let crio = "-namespace default -address '' -publish-binary /usr/bin/crio -id p1 start";
        let any = options().write_to_bytes().unwrap();
        let ttrpc = "/run/containerd/containerd.sock.ttrpc";
        let plain = ADDRESS.as_bytes().to_vec();
        let result = [
            &b"\x08\x03\x12\x26"[..],
            ADDRESS.as_bytes(),
            b"\x1a\x05ttrpc",
        ]
        .concat();
        let cases = [
            (
                "containerd 1.6 without options",
                containerd,
                vec![],
                ttrpc,
                &plain,
                false,
                ttrpc,
            ),
            (
                "containerd 1.7 with options",
                debug,
                any.clone(),
                ttrpc,
                &plain,
                true,
                ttrpc,
            ),
            (
                "containerd 2.1",
                containerd,
                any,
                ttrpc,
                &plain,
                true,
                ttrpc,
            ),
            (
                "containerd 2.3",
                containerd,
                params(),
                ttrpc,
                &result,
                true,
                ttrpc,
            ),
            (
                "containerd 2.3 without the variable",
                containerd,
                params(),
                "",
                &result,
                true,
                ttrpc,
            ),
            ("CRI-O", crio, vec![], "", &plain, false, ""),
        ];
        for (caller, line, stdin, variable, bytes, has_options, events) in cases {
            let args = Args::parse(words(line)).unwrap();
            assert_eq!(
                (args.action, args.id.as_str()),
                (Action::Start, "p1"),
                "{caller}"
            );
            let input = Input::read(&args, &stdin, variable).unwrap();
            assert_eq!(input.options, has_options.then(options), "{caller}");
            assert_eq!(input.events_address, events, "{caller}");
            assert_eq!(&answer(input.dialect, ADDRESS), bytes, "{caller}");
        }
    }

    #[test]
    fn parameters_ask_for_debug_lines_and_bring_options_among_other_extensions() {
        let extension = |any: Any| Extension {
            value: Some(any).into(),
            ..Default::default()
        };
        let other = Any {
            type_url: "containerd.io/nri.v1.PluginConfig".into(),
            ..Default::default()
        };
        let params = BootstrapParams {
            instance_id: "p1".into(),
            namespace: "k8s.io".into(),
            log_level: containerd_shim_protos::bootstrap_api::LogLevel::LOG_LEVEL_DEBUG.into(),
            extensions: vec![extension(other), extension(options())],
            ..Default::default()
        };
        let args = Args::parse(words("-namespace k8s.io -id p1 start")).unwrap();
        let input = Input::read(&args, &params.write_to_bytes().unwrap(), "").unwrap();
        assert_eq!((input.debug, input.options), (true, Some(options())));
    }

    #[test]
    fn parameters_of_another_instance_are_no_parameters() {
        let args = Args::parse(words("-namespace k8s.io -id other start")).unwrap();
        let input = Input::read(&args, &params(), "").unwrap();
        assert_eq!(input.dialect, Dialect::Address);
    }

    #[test]
    fn go_flags_in_all_their_forms() {
        let args =
            Args::parse(words("--namespace=a -id=b --bundle /x -debug=false delete")).unwrap();
        assert_eq!(
            (
                args.namespace.as_str(),
                args.id.as_str(),
                args.bundle.as_str()
            ),
            ("a", "b", "/x")
        );
        assert_eq!((args.action, args.debug), (Action::Delete, false));
        assert_eq!(Args::parse(words("-info")).unwrap().action, Action::Info);
        assert_eq!(Args::parse(words("-v")).unwrap().action, Action::Version);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |line: &str| Args::parse(words(line)).unwrap_err();
        assert_eq!(error("-namespace a start"), BootstrapError::Missing("id"));
        assert_eq!(
            error("-fly high start"),
            BootstrapError::UnknownFlag("-fly".into())
        );
        assert_eq!(error("-id"), BootstrapError::NoValue("-id".into()));
        assert_eq!(
            error("-id x -namespace y stop"),
            BootstrapError::UnknownAction("stop".into())
        );
        assert_eq!(error("-id x"), BootstrapError::UnknownAction(String::new()));
        let args = Args::parse(words("-namespace a -id b start")).unwrap();
        assert_eq!(
            Input::read(&args, &vec![0; MAX_STDIN_BYTES + 1], ""),
            Err(BootstrapError::TooLong)
        );
    }
}
