//! Named points of a sandbox's life at which a test build ends as if by SIGKILL, to see what `delete` makes of what is left.
//!
//! Only the feature `crash-points` compiles them in. `COFFER_CRASH_AT` names the one, and `tests/tests/crash_points.rs` knows all.

/// Ends the process if this point was named.
#[cfg(feature = "crash-points")]
pub fn point(name: &str) {
    use nix::sys::signal::{Signal, kill};
    if std::env::var_os("COFFER_CRASH_AT").is_some_and(|at| at == name) {
        let _ = kill(nix::unistd::Pid::this(), Signal::SIGKILL);
    }
}

/// Nothing, in what users run.
#[cfg(not(feature = "crash-points"))]
pub fn point(_: &str) {}
