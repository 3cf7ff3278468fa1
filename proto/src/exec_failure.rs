//! A program that can't be executed, as a detail of the `ABORTED` status that says so.
//!
//! It goes from the agent through the supervisor's Task API to whoever has to exit with the status that a shell would give.
//! The message beside it is for people, and for engines that look for runc's words in it.

use protobuf::Message;
use ttrpc::Status;
use ttrpc::proto::Any;

use crate::agent::ExecFailure;

const TYPE_URL: &str = "coffer.agent.v1.ExecFailure";

/// Why the user's program does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unexecutable {
    /// There is no such file, or its interpreter is missing.
    NotFound,
    /// It is there, and the kernel or its permissions refuse to execute it.
    NotExecutable,
}

impl Unexecutable {
    /// The exit status of a shell in this case.
    pub fn exit_status(self) -> u8 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable => 126,
        }
    }

    /// The inverse of [`Unexecutable::exit_status`].
    pub fn of_exit_status(status: u32) -> Option<Self> {
        [Self::NotFound, Self::NotExecutable]
            .into_iter()
            .find(|kind| u32::from(kind.exit_status()) == status)
    }

    /// Adds it to a status.
    pub fn attach(self, status: &mut Status) {
        let failure = ExecFailure {
            exit_status: self.exit_status().into(),
            ..Default::default()
        };
        status.details.push(Any {
            type_url: TYPE_URL.to_owned(),
            value: failure.write_to_bytes().unwrap_or_default(),
            ..Default::default()
        });
    }

    /// Finds it in a status, whose sender may be hostile.
    pub fn find(status: &Status) -> Option<Self> {
        let detail = status.details.iter().find(|d| d.type_url == TYPE_URL)?;
        let failure = ExecFailure::parse_from_bytes(&detail.value).ok()?;
        Self::of_exit_status(failure.exit_status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_survives_the_wire_and_nothing_else_is_one() {
        for kind in [Unexecutable::NotFound, Unexecutable::NotExecutable] {
            let mut status = ttrpc::get_status(ttrpc::Code::ABORTED, "no");
            assert_eq!(Unexecutable::find(&status), None);
            kind.attach(&mut status);
            let bytes = status.write_to_bytes().unwrap();
            let status = Status::parse_from_bytes(&bytes).unwrap();
            assert_eq!(Unexecutable::find(&status), Some(kind));
        }
        assert_eq!(Unexecutable::of_exit_status(0), None);
        assert_eq!(Unexecutable::of_exit_status(u32::MAX), None);
    }
}
