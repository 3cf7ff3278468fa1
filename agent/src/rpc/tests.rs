//! The service over a real ttrpc connection, with everything that needs no guest.

use super::*;
use crate::boot::Phases;
use crate::home::serve_stream;
use crate::reaper::Reaper;
use coffer_proto::agent_ttrpc::AgentClient;
use coffer_proto::exec_failure::Unexecutable;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

fn connect() -> (AgentClient, JoinHandle<()>) {
    let (host, guest) = UnixStream::pair().unwrap();
    let sandbox = Arc::new(Sandbox::new(Arc::new(Reaper::default()), Phases::default()));
    let served = tokio::spawn(async { serve_stream(guest, sandbox, || {}).await.unwrap() });
    (
        AgentClient::new(ttrpc::r#async::Client::new(Socket::new(host))),
        served,
    )
}

/// Code and message of a refusal.
fn refusal<T: std::fmt::Debug>(answer: RpcResult<T>) -> (Code, String) {
    match answer.unwrap_err() {
        RpcError::RpcStatus(status) => (status.code(), status.message().to_owned()),
        error => panic!("{error}"),
    }
}

fn process(container: &str, exec: &str) -> ProcessRef {
    ProcessRef {
        container_id: container.into(),
        exec_id: exec.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_host_of_another_version_is_refused_with_both() {
    let (client, _) = connect();
    let request = StartSandboxRequest {
        version: "99.1.2".into(),
        ..Default::default()
    };
    let (code, message) = refusal(client.start_sandbox(Context::default(), &request).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(
        message.contains("99.1.2") && message.contains(coffer_proto::VERSION),
        "{message}"
    );
}

#[tokio::test]
async fn nothing_is_created_before_the_sandbox_is_started() {
    let (client, _) = connect();
    let request = CreateContainerRequest {
        container_id: "c".into(),
        spec: br#"{"ociVersion":"1.2.0"}"#.into(),
        ..Default::default()
    };
    let (code, message) = refusal(client.create_container(Context::default(), &request).await);
    assert_eq!(
        (code, message.as_str()),
        (Code::FAILED_PRECONDITION, "the sandbox is not started")
    );
}

#[tokio::test]
async fn unknown_and_impossible_names_are_told_apart() {
    let (client, _) = connect();
    let context = Context::default;
    assert_eq!(
        refusal(client.wait_process(context(), &process("c", "e")).await),
        (Code::NOT_FOUND, "container c does not exist".into())
    );
    let (code, message) = refusal(client.delete_process(context(), &process("../c", "")).await);
    assert!(
        code == Code::INVALID_ARGUMENT && message.contains("../c"),
        "{message}"
    );
    let signal = SignalProcessRequest {
        container_id: "c".into(),
        signal: 65,
        ..Default::default()
    };
    let (code, message) = refusal(client.signal_process(context(), &signal).await);
    assert!(
        code == Code::INVALID_ARGUMENT && message.contains("65"),
        "{message}"
    );
}

#[tokio::test]
async fn the_agent_notices_the_end_of_the_connection() {
    let (client, served) = connect();
    assert!(
        client
            .stat_guest(Context::default(), &Empty::new())
            .await
            .unwrap()
            .memory_total
            > 0
    );
    let waiting = client.clone();
    let event =
        tokio::spawn(async move { waiting.next_event(Context::default(), &Empty::new()).await });
    tokio::task::yield_now().await;
    event.abort();
    let _ = event.await;
    drop(client);
    tokio::time::timeout(Duration::from_secs(5), served)
        .await
        .expect("it still serves")
        .unwrap();
}

#[test]
fn a_status_has_the_whole_chain() {
    let id = ProcessId::new("c", "e").unwrap();
    let cause = container::Error::Exec {
        kind: Unexecutable::NotFound,
        message: "exec: \"/x\": no such file or directory".into(),
    };
    let error = status(ProcessError::Start { id, cause });
    let RpcError::RpcStatus(sent) = &error else {
        panic!("{error:?}")
    };
    assert_eq!(Unexecutable::find(sent), Some(Unexecutable::NotFound));
    assert_eq!(
        refusal::<()>(Err(error)),
        (
            Code::ABORTED,
            "can't start exec e of container c: exec: \"/x\": no such file or directory".into()
        )
    );
}
