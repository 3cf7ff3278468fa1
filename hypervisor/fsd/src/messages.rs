//! virtiofsd's error messages on stderr, which the shim reads.

use log::{Level, LevelFilter, Metadata, Record};
use std::sync::atomic::{AtomicU32, Ordering};

/// Some messages can be provoked by the guest; more than these are not written.
const MAX_MESSAGES: u32 = 32;

struct Stderr {
    written: AtomicU32,
}

static STDERR: Stderr = Stderr {
    written: AtomicU32::new(0),
};

impl log::Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Error
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata())
            && self.written.fetch_add(1, Ordering::Relaxed) < MAX_MESSAGES
        {
            // One line per message whatever text it quotes.
            eprintln!("coffer-fsd: {}", record.args().to_string().escape_debug());
        }
    }

    fn flush(&self) {}
}

/// From here on errors of the virtiofsd crate go to stderr.
pub fn to_stderr() {
    if log::set_logger(&STDERR).is_ok() {
        log::set_max_level(LevelFilter::Error);
    }
}
