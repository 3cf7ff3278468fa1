//! How a failed step travels from the new process over the stage's socket to the agent.

use std::io;

use serde::{Deserialize, Serialize};

use super::Error;

/// Exit status of a program that was not found, as in a shell.
pub const NOT_FOUND: u8 = 127;
/// Exit status of a program that was found and can't be executed.
pub const NOT_EXECUTABLE: u8 = 126;

/// A step of the set-up that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was attempted, with the value.
    pub step: String,
    pub message: String,
    pub errno: Option<i32>,
    /// Set when it was the user's program that can't be executed: [`NOT_FOUND`] or [`NOT_EXECUTABLE`].
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

    /// The user's program can't be executed.
    pub fn exec(program: &str, status: u8, message: &str) -> Self {
        Self {
            step: "exec".into(),
            message: format!("exec {program:?}: {message}"),
            errno: None,
            status: Some(status),
        }
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
        match failure.status {
            Some(status) => Self::Exec {
                status,
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
