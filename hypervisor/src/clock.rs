//! When the process began.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

static START: OnceLock<Instant> = OnceLock::new();

/// Notes the start of the process. The first thing `main` does; a second call changes nothing.
pub fn start() {
    START.get_or_init(Instant::now);
}

/// Wall time since [`start`].
pub fn since_start() -> Duration {
    START.get_or_init(Instant::now).elapsed()
}

/// CPU time of the whole process so far.
pub fn cpu_time() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID);
    time.map(Duration::from).unwrap_or_default()
}
