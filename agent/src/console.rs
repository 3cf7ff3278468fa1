//! What the agent has to say goes to the guest's console, one line at a time; the VMM keeps it in a bounded ring.

use crate::boot::since_boot;
use std::fmt::{self, Write as _};
use std::io::Write as _;

/// Prints one line, with the time since boot in the kernel's form. Newlines in a message that quotes the shim or a
/// container are escaped, so nobody can fake a line.
pub fn line(message: fmt::Arguments<'_>) {
    let mut text = String::new();
    let now = since_boot();
    let _ = write!(
        text,
        "[{:5}.{:06}] coffer-agent: ",
        now.as_secs(),
        now.subsec_micros()
    );
    let _ = write!(Escaped(&mut text), "{message}");
    text.push('\n');
    // Stderr is /dev/console, which the kernel opened for PID 1. When it is broken nobody is left to be told.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            if character.is_control() {
                self.0.extend(character.escape_default());
            } else {
                self.0.push(character);
            }
        }
        Ok(())
    }
}

/// Makes a panic of any thread one line on the console and the end of the machine: a guest without its agent serves
/// nobody, and the shim learns it at once.
pub fn end_machine_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        line(format_args!("{panic}"));
        crate::guest::end_machine();
    }));
}

/// Sends `tracing` events of level INFO and above to the console.
#[derive(Debug)]
pub struct ConsoleSubscriber;

impl tracing::Subscriber for ConsoleSubscriber {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= tracing::Level::INFO
    }

    fn event(&self, event: &tracing::Event<'_>) {
        let mut text = String::new();
        event.record(&mut Fields(&mut text));
        line(format_args!("{}", text.trim_end()));
    }

    // Spans are never enabled.
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

struct Fields<'a>(&'a mut String);

impl tracing::field::Visit for Fields<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_message_stays_one_line() {
        let mut text = String::new();
        write!(Escaped(&mut text), "a\nb\x1b[2J").unwrap();
        assert_eq!(text, "a\\nb\\u{1b}[2J");
    }
}
