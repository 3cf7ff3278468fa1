//! OCI hooks of the runtime namespace: programs of the host that are told the container's state on standard input.

use oci_spec::runtime::Hook;
use serde_json::Value;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

/// A hook without a timeout of its own may take as long as it wants, as with runc; this only bounds arithmetic.
const NO_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);
/// What is quoted of a failed hook's stderr.
const QUOTED_CHARACTERS: usize = 500;

/// Which hook failed, and how.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("the {kind} hook {path:?} can't be run")]
    Spawn {
        kind: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("the {kind} hook {path:?} failed with {status}{stderr}")]
    Failed {
        kind: &'static str,
        path: PathBuf,
        status: ExitStatus,
        stderr: String,
    },
    #[error("the {kind} hook {path:?} took longer than {limit:?}")]
    Timeout {
        kind: &'static str,
        path: PathBuf,
        limit: Duration,
    },
}

/// Runs hooks in their order until one fails.
pub async fn run(kind: &'static str, hooks: &[Hook], state: &Value) -> Result<(), HookError> {
    for hook in hooks {
        run_one(kind, hook, state).await?;
    }
    Ok(())
}

/// The same where a failure only is to be told: the container has ended, or runs already.
pub async fn run_all(kind: &'static str, hooks: &[Hook], state: &Value) {
    for hook in hooks {
        if let Err(error) = run_one(kind, hook, state).await {
            tracing::warn!(
                error = coffer_proto::error_chain::chain(&error),
                "a hook failed"
            );
        }
    }
}

async fn run_one(kind: &'static str, hook: &Hook, state: &Value) -> Result<(), HookError> {
    let path = hook.path().clone();
    let seconds = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    let limit = seconds.map_or(NO_TIMEOUT, Duration::from_secs);
    let done = match timeout(limit, execute(hook, state)).await {
        Ok(done) => done,
        Err(_) => return Err(HookError::Timeout { kind, path, limit }),
    };
    let Output { status, stderr, .. } = done.map_err(|source| HookError::Spawn {
        kind,
        path: path.clone(),
        source,
    })?;
    if status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&stderr);
    let stderr = match stderr.trim() {
        "" => String::new(),
        text => format!(
            ": {}",
            text.chars().take(QUOTED_CHARACTERS).collect::<String>()
        ),
    };
    Err(HookError::Failed {
        kind,
        path,
        status,
        stderr,
    })
}

async fn execute(hook: &Hook, state: &Value) -> io::Result<Output> {
    let mut command = Command::new(hook.path());
    let args = hook.args().clone().unwrap_or_default();
    if let Some((name, rest)) = args.split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for entry in hook.env().iter().flatten() {
        if let Some((name, value)) = entry.split_once('=') {
            command.env(name, value);
        }
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn()?;
    let mut stdin = child.stdin.take().expect("piped");
    // A hook need not read its state, and one that has ended can't.
    let _ = stdin.write_all(state.to_string().as_bytes()).await;
    drop(stdin);
    child.wait_with_output().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::HookBuilder;
    use serde_json::json;

    fn shell(script: &str, timeout: Option<i64>) -> Hook {
        let args = ["name", "-c", script].map(str::to_owned).to_vec();
        let hook = HookBuilder::default()
            .path("/bin/sh")
            .args(args)
            .env(vec!["A=b".to_owned()]);
        match timeout {
            Some(seconds) => hook.timeout(seconds).build().unwrap(),
            None => hook.build().unwrap(),
        }
    }

    #[tokio::test]
    async fn a_hook_gets_the_state_and_its_own_environment() {
        let state = json!({"id": "c"});
        let good = shell(
            r#"test "$(cat)" = '{"id":"c"}' && test "$A" = b && test -z "$HOME""#,
            None,
        );
        run("createRuntime", &[good], &state).await.unwrap();
    }

    #[tokio::test]
    async fn a_hook_that_fails_or_hangs_is_named() {
        let state = json!({});
        let failed = run("prestart", &[shell("echo why >&2; exit 3", None)], &state).await;
        let text = failed.unwrap_err().to_string();
        assert!(
            text.contains("prestart") && text.contains("/bin/sh") && text.contains("why"),
            "{text}"
        );
        let hung = run("poststop", &[shell("sleep 60", Some(0))], &state).await;
        assert!(matches!(hung, Err(HookError::Timeout { .. })));
        let missing = HookBuilder::default().path("/no/such").build().unwrap();
        assert!(matches!(
            run("x", &[missing], &state).await,
            Err(HookError::Spawn { .. })
        ));
    }
}
