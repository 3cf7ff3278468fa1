//! The caller's ends of a process's streams, as containerd names them in `stdin`, `stdout` and `stderr`:
//!
//! ```text
//! ""                       /dev/null in the guest
//! /path, fifo:///path      a fifo, or a file where there is none
//! file:///path             a file that is appended to; directories above it are made
//! binary:///path?key=value a program that gets both outputs (logger.rs); only as stdout, and then stderr does not count
//! ```
//!
//! containerd's rules for fifos:
//!
//! - stdout and stderr are held open for reading and writing, so a reader may come late, leave and come back: what
//!   was written meanwhile waits in the fifo. They close when the process and all who inherited its stream are done.
//! - stdin is also held open for writing until CloseIO, so a client that detaches does not end the process's input.

use super::logger::{Logger, LoggerCommand, LoggerError};
use crate::sandbox::process::{ProcessKey, StdioPaths};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tokio::net::unix::pipe;

/// Size asked for a fifo: fewer wake-ups than with the default 64 KiB.
const FIFO_BYTES: i32 = 256 << 10;

/// Why an end could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error("{stream} {uri:?}: {scheme}:// is not supported there")]
    Scheme {
        stream: &'static str,
        uri: String,
        scheme: String,
    },
    #[error("{stream} {uri:?} has no absolute path")]
    Path { stream: &'static str, uri: String },
    #[error("can't open {stream} {path}")]
    Open {
        stream: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Logger(#[from] LoggerError),
}

impl EndpointError {
    /// Whether the caller asked for something that makes no sense.
    pub fn is_bad_request(&self) -> bool {
        matches!(self, Self::Scheme { .. } | Self::Path { .. })
    }
}

/// The host's ends, opened before the agent is asked for anything.
#[derive(Debug)]
pub struct Endpoints {
    pub(super) stdin: Option<Source>,
    pub(super) stdout: Option<Sink>,
    pub(super) stderr: Option<Sink>,
    /// The program that reads both outputs.
    pub(super) logger: Option<Logger>,
}

#[derive(Debug)]
pub(super) enum Source {
    /// The reading end, and the writing end that keeps it from ending before CloseIO.
    Fifo {
        reader: pipe::Receiver,
        hold: OwnedFd,
    },
    File(tokio::fs::File),
}

#[derive(Debug)]
pub(super) enum Sink {
    Fifo(pipe::Sender),
    File(tokio::fs::File),
}

/// What one of the three names means.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Null,
    /// A fifo if there is one.
    Path(PathBuf),
    File(PathBuf),
    Logger(LoggerCommand),
}

impl Endpoints {
    /// Opens what the caller named. `namespace` is containerd's, which a logger is told.
    pub async fn open(
        paths: &StdioPaths,
        key: &ProcessKey,
        namespace: &str,
    ) -> Result<Self, EndpointError> {
        let stdin = match target("stdin", &paths.stdin)? {
            Target::Null => None,
            Target::Path(path) | Target::File(path) => Some(open_source(&path)?),
            Target::Logger(_) => return Err(unsupported("stdin", &paths.stdin)),
        };
        let mut ends = Self {
            stdin,
            stdout: None,
            stderr: None,
            logger: None,
        };
        match target("stdout", &paths.stdout)? {
            Target::Logger(command) => {
                let (logger, stdout, stderr) = Logger::start(&command, key, namespace).await?;
                ends.logger = Some(logger);
                ends.stdout = Some(Sink::Fifo(stdout));
                ends.stderr = (!paths.terminal).then_some(Sink::Fifo(stderr));
                return Ok(ends);
            }
            other => ends.stdout = open_sink("stdout", other, &paths.stdout)?,
        }
        if !paths.terminal {
            let stderr = target("stderr", &paths.stderr)?;
            ends.stderr = open_sink("stderr", stderr, &paths.stderr)?;
        }
        Ok(ends)
    }

    /// What the agent is told of them.
    pub fn for_agent(&self, terminal: bool) -> coffer_proto::agent::Stdio {
        coffer_proto::agent::Stdio {
            terminal,
            stdin: self.stdin.is_some(),
            stdout: self.stdout.is_some(),
            stderr: self.stderr.is_some(),
            ..Default::default()
        }
    }
}

fn unsupported(stream: &'static str, uri: &str) -> EndpointError {
    let scheme = uri.split_once("://").map_or("", |(scheme, _)| scheme);
    EndpointError::Scheme {
        stream,
        uri: uri.to_owned(),
        scheme: scheme.to_owned(),
    }
}

fn target(stream: &'static str, uri: &str) -> Result<Target, EndpointError> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        let path = PathBuf::from(uri);
        return Ok(if uri.is_empty() {
            Target::Null
        } else {
            Target::Path(path)
        });
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = PathBuf::from(unescape(path, false));
    let found = match scheme {
        "fifo" => Target::Path(path.clone()),
        "file" => Target::File(path.clone()),
        "binary" => Target::Logger(LoggerCommand {
            program: path.clone(),
            args: arguments(query),
        }),
        _ => return Err(unsupported(stream, uri)),
    };
    if !path.is_absolute() {
        return Err(EndpointError::Path {
            stream,
            uri: uri.to_owned(),
        });
    }
    Ok(found)
}

/// "k=v&x" is `k v x`, as in containerd's own shim.
fn arguments(query: &str) -> Vec<OsString> {
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        args.push(unescape(key, true));
        if !value.is_empty() {
            args.push(unescape(value, true));
        }
    }
    args
}

/// Percent-encoding of RFC 3986; a "+" is a space in a query only. A lone "%" stays as it is.
fn unescape(text: &str, query: bool) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let hex = tail
            .first_chunk::<2>()
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (first, hex) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            (b'+', _) if query => {
                bytes.push(b' ');
                rest = tail;
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

fn is_fifo(path: &Path) -> io::Result<bool> {
    Ok(fs::metadata(path)?.file_type().is_fifo())
}

fn open_source(path: &Path) -> Result<Source, EndpointError> {
    let open = || {
        if !is_fifo(path)? {
            return Ok(Source::File(tokio::fs::File::from_std(fs::File::open(
                path,
            )?)));
        }
        let reader = pipe::OpenOptions::new().open_receiver(path)?;
        let hold = fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        Ok(Source::Fifo {
            reader,
            hold: hold.into(),
        })
    };
    open().map_err(|source| EndpointError::Open {
        stream: "stdin",
        path: path.to_owned(),
        source,
    })
}

fn open_sink(
    stream: &'static str,
    target: Target,
    uri: &str,
) -> Result<Option<Sink>, EndpointError> {
    let (path, opened) = match target {
        Target::Null => return Ok(None),
        Target::Logger(_) => return Err(unsupported(stream, uri)),
        Target::Path(path) => {
            let opened = open_path(&path);
            (path, opened)
        }
        Target::File(path) => {
            let made = path.parent().map_or(Ok(()), fs::create_dir_all);
            let opened = made.and_then(|()| open_file(&path));
            (path, opened)
        }
    };
    match opened {
        Ok(sink) => Ok(Some(sink)),
        Err(source) => Err(EndpointError::Open {
            stream,
            path,
            source,
        }),
    }
}

fn open_path(path: &Path) -> io::Result<Sink> {
    if !path.exists() || !is_fifo(path)? {
        return open_file(path);
    }
    let sender = pipe::OpenOptions::new()
        .read_write(true)
        .open_sender(path)?;
    enlarge(&sender);
    Ok(Sink::Fifo(sender))
}

fn open_file(path: &Path) -> io::Result<Sink> {
    let file = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    Ok(Sink::File(tokio::fs::File::from_std(file)))
}

/// Without it the fifo works as well, so a refusal (a user's limit) is nothing to report.
pub(super) fn enlarge(fifo: &pipe::Sender) {
    let _ = nix::fcntl::fcntl(fifo.as_fd(), nix::fcntl::FcntlArg::F_SETPIPE_SZ(FIFO_BYTES));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(uri: &str) -> Target {
        target("stdout", uri).unwrap()
    }

    #[test]
    fn every_kind_of_name_means_what_containerd_means_by_it() {
        assert_eq!(of(""), Target::Null);
        assert_eq!(of("/run/x%20"), Target::Path("/run/x%20".into()));
        assert_eq!(of("fifo:///run/x"), Target::Path("/run/x".into()));
        assert_eq!(
            of("file:///var/log/a%20b.log"),
            Target::File("/var/log/a b.log".into())
        );
        let logger = LoggerCommand {
            program: "/usr/bin/nerdctl".into(),
            args: ["_NERDCTL_INTERNAL_LOGGING", "/var/lib/x y", "flag"]
                .map(OsString::from)
                .to_vec(),
        };
        assert_eq!(
            of("binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2Fx+y&flag"),
            Target::Logger(logger)
        );
    }

    #[test]
    fn what_is_none_of_them_is_named() {
        let error = |uri: &str| target("stderr", uri).unwrap_err();
        assert_eq!(
            error("ttrpc+unix:///x").to_string(),
            "stderr \"ttrpc+unix:///x\": ttrpc+unix:// is not supported there"
        );
        assert!(error("file://relative").to_string().contains("relative"));
        assert!(error("binary://").is_bad_request());
    }

    #[test]
    fn an_odd_percent_sign_stays() {
        assert_eq!(unescape("100%", false), "100%");
        assert_eq!(unescape("%zz+", false), "%zz+");
        assert_eq!(unescape("%+1", true), "% 1");
    }
}
