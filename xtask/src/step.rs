//! What the user sees of work that takes a while.

use std::io::{IsTerminal, stderr};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How often a running step says so: often on a terminal, where the line is overwritten, seldom in a log.
const TICK_TERMINAL: Duration = Duration::from_secs(1);
const TICK_LOG: Duration = Duration::from_secs(30);

/// Does `work`, saying what it is, that it is still running, and how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let terminal = stderr().is_terminal();
    eprintln!("--> {what}");
    let (done, running) = channel::<()>();
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            let tick = if terminal { TICK_TERMINAL } else { TICK_LOG };
            while running.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
                let seconds = begin.elapsed().as_secs();
                match terminal {
                    true => eprint!("\r    {seconds} s "),
                    false => eprintln!("    still running after {seconds} s"),
                }
            }
        });
        let result = work();
        drop(done);
        result
    });
    if terminal {
        eprint!("\r");
    }
    let seconds = begin.elapsed().as_secs_f64();
    match &result {
        Ok(_) => eprintln!("    done in {seconds:.1} s"),
        Err(_) => eprintln!("    failed after {seconds:.1} s"),
    }
    result.with_context(|| what.to_owned())
}
