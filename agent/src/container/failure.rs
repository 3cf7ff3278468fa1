//! How a failed step travels from the new process over the stage's socket to the agent.

use std::io;

use coffer_proto::exec_failure::Unexecutable;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::Error;

/// A step of the set-up that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was attempted, with the value.
    pub step: String,
    pub message: String,
    pub errno: Option<i32>,
    /// Set when it was the user's program that can't be executed: 126 or 127, as [`Unexecutable`] has it.
    pub status: Option<u8>,
}

impl Failure {
    /// A step that failed for a reason which is no system error.
    pub fn new(step: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            step: step.into(),
            message: message.into(),
            errno: None,
            status: None,
        }
    }

    /// The user's program can't be executed. The words are runc's, in which engines look for the kind of failure.
    pub fn exec(program: &str, kind: Unexecutable, message: &str) -> Self {
        Self {
            step: "exec".into(),
            message: format!("exec: {program:?}: {message}"),
            errno: None,
            status: Some(kind.exit_status()),
        }
    }

    /// The same, for the error of a system call.
    pub fn exec_errno(program: &str, errno: Errno) -> Self {
        let kind = match errno {
            Errno::ENOENT | Errno::ENOTDIR => Unexecutable::NotFound,
            _ => Unexecutable::NotExecutable,
        };
        // Go, and so every engine, writes system errors in lower case.
        Self::exec(program, kind, &errno.desc().to_ascii_lowercase())
    }
}

/// For `map_err`: the system error of this step.
pub fn at<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Failure {
    let step = step.into();
    move |error| {
        let error = error.into();
        Failure {
            step,
            message: error.to_string(),
            errno: error.raw_os_error(),
            status: None,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let kind = failure.status.map(u32::from);
        match kind.and_then(Unexecutable::of_exit_status) {
            Some(kind) => Self::Exec {
                kind,
                message: failure.message,
            },
            None => Self::Step {
                step: failure.step,
                message: failure.message,
                errno: failure.errno.map(nix::Error::from_raw),
            },
        }
    }
}
