//! What is printed of a test that fails, before all that it started is killed: its sandboxes' own words, and where each thread is.
//!
//! It is meant for tests that hang. What the agent answers tells a guest that is dead from one that waits, two looks at the CPU times
//! tell a thread that spins from one that sleeps.

use crate::{leaks, product};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// A supervisor or guest that hangs must not keep the others from being heard.
const ANSWER_SECONDS: &str = "10";
/// Between two looks at the CPU times.
const LOOK: Duration = Duration::from_secs(1);

/// Prints what there is: of the sandboxes below a state root, and of this process's descendants.
pub fn print(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let log = entry.path().join("supervisor.log");
        if let Ok(text) = fs::read_to_string(&log) {
            eprintln!("--- {}\n{text}", log.display());
        }
        if let Some(id) = entry.file_name().to_str() {
            for verb in ["state", "ps", "console"] {
                print_answer(root, verb, id);
            }
        }
    }
    let first = threads();
    sleep(LOOK);
    eprintln!(
        "--- threads: name, state, where it waits, ticks of CPU time and how many more {LOOK:?} later"
    );
    for thread in threads() {
        let before = first.iter().find(|other| other.path == thread.path);
        let more = before.map_or(0, |before| thread.ticks.saturating_sub(before.ticks));
        let Thread {
            path,
            shown,
            waits,
            ticks,
        } = thread;
        eprintln!("{path} {shown} {waits} {ticks} +{more}");
    }
}

fn print_answer(root: &Path, verb: &str, id: &str) {
    let done = Command::new("timeout")
        .arg(ANSWER_SECONDS)
        .arg(product("coffer"))
        .arg("--root")
        .arg(root)
        .args([verb, id])
        .stdin(Stdio::null())
        .output();
    match done {
        Ok(done) => eprintln!(
            "--- coffer {verb} {id}: {}\n{}{}",
            done.status,
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        ),
        Err(error) => eprintln!("--- coffer {verb} {id}: {error}"),
    }
}

struct Thread {
    path: String,
    /// Its name and its state's letter.
    shown: String,
    /// The kernel function in which it sleeps, where the kernel tells.
    waits: String,
    /// Of its time in user and kernel mode.
    ticks: u64,
}

/// All threads of all descendants.
fn threads() -> Vec<Thread> {
    let descendants = leaks::descendants(std::process::id()).unwrap_or_default();
    let tasks = descendants
        .into_iter()
        .flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task")))
        .flatten()
        .flatten();
    tasks.filter_map(|task| thread(&task.path())).collect()
}

/// "pid (name) state ppid …": utime and stime are the fields 14 and 15 (proc(5)).
fn thread(task: &Path) -> Option<Thread> {
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    let (head, tail) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Thread {
        path: task.display().to_string(),
        shown: format!("{}) {}", head.split_once(' ')?.1, fields.first()?),
        waits: fs::read_to_string(task.join("wchan")).unwrap_or_default(),
        ticks: ticks(14)? + ticks(15)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_sleeps_is_shown_as_such() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mine = format!("/proc/{}/task/", child.id());
        let shown = || {
            let found = threads().into_iter().find(|t| t.path.starts_with(&mine));
            found.map(|thread| thread.shown)
        };
        crate::wait_for("the child to sleep", || {
            shown().as_deref() == Some("(sleep) S")
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(shown(), None);
    }
}
