//! QMP, QEMU's control protocol: JSON objects, one on each line, over a stream socket.
//!
//! ```text
//! QEMU ── {"QMP": {…}} ─────────────────────►  greeting
//!      ◄── {"execute": "qmp_capabilities"} ──  answered with {"return": {}}
//!      ◄── {"execute": "cont"} ──────────────  {"return": …} or {"error": {"desc": …}}
//!      ── {"event": "SHUTDOWN", …} ──────────►  at any time
//! ```
//!
//! A file descriptor travels as SCM_RIGHTS beside the `getfd` command and has a name from then on.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// QEMU answers in milliseconds. Long enough for its start on a machine with all CPUs busy.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// No answer of ours is near that long.
const MAX_LINE: usize = 1 << 20;

/// A command that QEMU did not carry out.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QEMU is gone")]
    Closed,
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        command: &'static str,
        reason: String,
    },
    #[error("QEMU did not answer {command} within {} s", ANSWER_TIMEOUT.as_secs())]
    Timeout { command: &'static str },
    #[error("QEMU sent no QMP")]
    Malformed(#[source] Option<serde_json::Error>),
    #[error("the QMP socket failed")]
    Io(#[source] io::Error),
}

/// An event that matters to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpEvent {
    pub name: String,
    /// The field "reason" of its data, where it has one.
    pub reason: String,
}

/// One QMP connection.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    unread: Vec<u8>,
    events: VecDeque<QmpEvent>,
}

impl Qmp {
    /// Waits for QEMU to greet, and enters command mode.
    pub fn connect(socket: UnixStream) -> Result<Self, QmpError> {
        socket.set_nonblocking(true).map_err(QmpError::Io)?;
        let mut qmp = Self {
            socket,
            unread: Vec::new(),
            events: VecDeque::new(),
        };
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Carries out one command. Events that come meanwhile are kept.
    pub fn execute(&mut self, command: &'static str, arguments: &Value) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, None)
    }

    /// Gives QEMU an open file, which further commands know by `name`.
    pub fn give_file(&mut self, name: &str, file: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.execute_with("getfd", &json!({"fdname": name}), Some(file))
            .map(drop)
    }

    fn execute_with(
        &mut self,
        command: &'static str,
        arguments: &Value,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        let raw: Vec<_> = file.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        // A command fits the socket's buffer many times, and QEMU reads it before it answers.
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(line.as_bytes())],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Ok(count) if count == line.len() => {}
            Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => return Err(QmpError::Closed),
            Err(error) => return Err(QmpError::Io(error.into())),
            Ok(_) => return Err(QmpError::Io(io::ErrorKind::WriteZero.into())),
        }
        self.answer(command)
    }

    fn answer(&mut self, command: &'static str) -> Result<Value, QmpError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            while let Some(mut message) = self.next_message()? {
                if let Some(result) = message.get_mut("return") {
                    return Ok(result.take());
                }
                if let Some(error) = message.get("error") {
                    let reason = error["desc"]
                        .as_str()
                        .unwrap_or("without a reason")
                        .to_owned();
                    return Err(QmpError::Refused { command, reason });
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)],
                timeout,
            ) {
                Ok(0) => return Err(QmpError::Timeout { command }),
                Ok(_) => self.read()?,
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(QmpError::Io(error.into())),
            }
        }
    }

    /// Takes the events that came, without waiting.
    pub fn take_events(&mut self) -> Result<VecDeque<QmpEvent>, QmpError> {
        let read = self.read();
        while self.next_message()?.is_some() {}
        // What came before the end still counts.
        if self.events.is_empty() {
            read?;
        }
        Ok(std::mem::take(&mut self.events))
    }

    /// Takes what is there. The end is told when nothing came before it.
    fn read(&mut self) -> Result<(), QmpError> {
        let mut buffer = [0; 8 << 10];
        let before = self.unread.len();
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) if self.unread.len() > before => return Ok(()),
                Ok(0) => return Err(QmpError::Closed),
                Ok(count) if self.unread.len() + count <= MAX_LINE => {
                    self.unread.extend(&buffer[..count]);
                }
                Ok(_) => return Err(QmpError::Malformed(None)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(QmpError::Closed);
                }
                Err(error) => return Err(QmpError::Io(error)),
            }
        }
    }

    /// The next message that is whole. Events are kept for [`Self::take_events`] as well.
    fn next_message(&mut self) -> Result<Option<Value>, QmpError> {
        let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        let line: Vec<u8> = self.unread.drain(..=end).collect();
        let message: Value =
            serde_json::from_slice(&line).map_err(|error| QmpError::Malformed(Some(error)))?;
        if let Some(name) = message["event"].as_str() {
            let reason = message["data"]["reason"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            self.events.push_back(QmpEvent {
                name: name.to_owned(),
                reason,
            });
        }
        Ok(Some(message))
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::thread::{JoinHandle, spawn};

    /// A QEMU that greets and then says each line of `script` after one command.
    fn fake(script: &'static [&'static str]) -> (UnixStream, JoinHandle<Vec<Value>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = spawn(move || {
            writeln!(&theirs, "{}", json!({"QMP": {"capabilities": []}})).unwrap();
            let mut commands = BufReader::new(theirs.try_clone().unwrap()).lines();
            let mut seen = Vec::new();
            for answer in script {
                seen.push(serde_json::from_str(&commands.next().unwrap().unwrap()).unwrap());
                (&theirs).write_all(answer.as_bytes()).unwrap();
            }
            seen
        });
        (ours, thread)
    }

    #[test]
    fn an_answer_is_found_among_events_and_they_are_kept() {
        let (socket, qemu) = fake(&[
            "{\"return\": {}}\n",
            "{\"event\": \"STOP\"}\n{\"event\": \"SHUTDOWN\", \"data\": {\"reason\": \"guest-reset\"}}\n{\"return\": 7}\n",
        ]);
        let mut qmp = Qmp::connect(socket).unwrap();
        assert_eq!(qmp.execute("stop", &json!({"a": 1})).unwrap(), json!(7));
        let seen = qemu.join().unwrap();
        assert_eq!(seen[1], json!({"execute": "stop", "arguments": {"a": 1}}));
        let events = qmp.take_events().unwrap();
        assert_eq!(
            events[1],
            QmpEvent {
                name: "SHUTDOWN".into(),
                reason: "guest-reset".into()
            }
        );
        assert!(matches!(qmp.take_events(), Err(QmpError::Closed)));
    }

    #[test]
    fn a_refusal_names_command_and_reason() {
        let (socket, _qemu) = fake(&[
            "{\"return\": {}}\n",
            "{\"error\": {\"class\": \"x\", \"desc\": \"no such link\"}}\n",
        ]);
        let error = Qmp::connect(socket)
            .unwrap()
            .execute("set_link", &json!({}))
            .unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused set_link: no such link");
    }

    #[test]
    fn an_end_in_the_middle_is_no_answer() {
        for (script, name) in [
            (&["{\"ret"][..], "half a line"),
            (&["gar\n"], "garbage"),
            (&[""], "nothing"),
        ] {
            let (socket, _qemu) = fake(script);
            let error = Qmp::connect(socket).unwrap_err();
            assert!(
                matches!(error, QmpError::Closed | QmpError::Malformed(_)),
                "{name}: {error:?}"
            );
        }
    }
}
