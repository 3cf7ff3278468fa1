//! Whom the host's kernel ends when memory runs out, in the sandbox's cgroup or on the whole host: the VM, whose memory it is, and not
//! the supervisor that has to tell of it. The kernel adds `oom_score_adj` (proc(5)), in thousandths of the memory there is, to what a
//! process uses.

use std::fs;

/// Next to containerd, which has −999 and gives its other shims one more than that.
const SUPERVISOR: i32 = -998;
/// What a process has of which nobody says anything.
const MACHINE: i32 = 0;

/// Lowers that of this process. Without CAP_SYS_RESOURCE it stays.
pub fn spare_this_process() {
    set("self", SUPERVISOR);
}

/// Gives a process of the VM its own, instead of the supervisor's that it has inherited.
pub fn offer(pid: i32) {
    set(&pid.to_string(), MACHINE);
}

fn set(process: &str, score: i32) {
    if let Err(error) = fs::write(format!("/proc/{process}/oom_score_adj"), score.to_string()) {
        tracing::debug!(process, score, %error, "the OOM score stays");
    }
}
