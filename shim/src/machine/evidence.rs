//! What the processes of a machine and the guest's console said last.

use super::child::{Child, printable};
use std::fs::File;
use std::time::Duration;
use tokio::time::timeout;

/// Lines of the guest's console that an error quotes.
const CONSOLE_LINES: usize = 12;

/// What can explain a failed boot.
#[derive(Debug, Default)]
pub struct Evidence {
    pub console: Option<File>,
    pub vmm: Option<Child>,
    pub fsd: Option<Child>,
}

impl Evidence {
    /// What adds something to the cause.
    pub async fn collect(self, cause: &str) -> String {
        let mut text = String::new();
        for child in [self.vmm, self.fsd].into_iter().flatten() {
            // The cause may be the end of this child, of which we hear a moment later.
            let _ = timeout(Duration::from_millis(100), child.ended()).await;
            if let Some(ended) = child.has_ended().filter(|ended| !cause.contains(ended)) {
                text.push_str(&format!("; {ended}"));
            }
            for line in child.last_words() {
                text.push_str(&format!("\n  {line}"));
            }
        }
        let lines = self
            .console
            .map(|console| console_tail(&console, CONSOLE_LINES))
            .unwrap_or_default();
        if !lines.is_empty() {
            text.push_str(&format!(
                "\nthe guest's console ended with:\n  {}",
                lines.join("\n  ")
            ));
        }
        text
    }
}

/// The last lines of the guest's console, without control characters.
pub fn console_tail(console: &File, lines: usize) -> Vec<String> {
    let bytes = coffer_proto::vmm::console::read(console).unwrap_or_default();
    let mut tail: Vec<String> = bytes
        .rsplit(|b| *b == b'\n')
        .map(|line| printable(&line[line.len().saturating_sub(400)..]))
        .filter(|line| !line.trim().is_empty())
        .take(lines)
        .collect();
    tail.reverse();
    tail
}
