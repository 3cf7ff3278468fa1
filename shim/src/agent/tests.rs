//! Replies of a hostile agent, byte by byte.

use super::*;
use std::io::{Read, Write};

fn key() -> ProcessKey {
    ProcessKey {
        container: ContainerId::new("c").unwrap(),
        exec: None,
    }
}

/// A client of a fake agent that gives these answers, one to each call. The thread counts the calls.
pub fn answering(answers: Vec<Vec<u8>>) -> (Agent, std::thread::JoinHandle<usize>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let agent = Agent::new(ours, 1).unwrap();
    let thread = std::thread::spawn(move || {
        let mut answers = answers.into_iter();
        for calls in 0.. {
            let Some(stream) = request(&mut theirs) else {
                return calls;
            };
            let answer = answers.next().unwrap_or_default();
            theirs.write_all(&frame(stream, 2, &answer)).unwrap();
        }
        unreachable!("nobody calls that often")
    });
    (agent, thread)
}

/// Takes a request from the connection; gives its stream id, or None at the end.
fn request(from: &mut UnixStream) -> Option<u32> {
    let mut header = [0; 10];
    from.read_exact(&mut header).ok()?;
    let length = u32::from_be_bytes(header[..4].try_into().unwrap());
    from.read_exact(&mut vec![0; length as usize]).unwrap();
    Some(u32::from_be_bytes(header[4..8].try_into().unwrap()))
}

/// A client, and what the fake agent gets to see and say: `reply` maps the stream id of the request to raw bytes.
fn hostile(
    reply: impl FnOnce(u32) -> Vec<u8> + Send + 'static,
) -> (Agent, std::thread::JoinHandle<UnixStream>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let agent = Agent::new(ours, 1).unwrap();
    let thread = std::thread::spawn(move || {
        let stream = request(&mut theirs).unwrap();
        // The client may hang up in the middle of an endless answer.
        let _ = theirs.write_all(&reply(stream));
        theirs
    });
    (agent, thread)
}

fn frame(stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    [
        &length.to_be_bytes()[..],
        &stream.to_be_bytes(),
        &[kind, 0],
        payload,
    ]
    .concat()
}

/// A ttrpc Response that refuses.
pub fn refusal(message: &str) -> Vec<u8> {
    let mut response = ttrpc::Response::new();
    response.set_status(ttrpc::get_status(ttrpc::Code::INTERNAL, message));
    protobuf::Message::write_to_bytes(&response).unwrap()
}

/// A ttrpc Response with this message in its payload field.
pub fn response(message: &impl protobuf::Message) -> Vec<u8> {
    let mut response = ttrpc::Response::new();
    response.payload = message.write_to_bytes().unwrap();
    protobuf::Message::write_to_bytes(&response).unwrap()
}

fn ended(exit_status: u32) -> Vec<u8> {
    response(&coffer_proto::agent::WaitProcessResponse {
        exit_status,
        ..Default::default()
    })
}

#[tokio::test]
async fn an_honest_answer_is_taken() {
    let (agent, _peer) = hostile(|stream| frame(stream, 2, &ended(42)));
    assert_eq!(
        agent.wait_process(&key()).await.unwrap(),
        Ended {
            status: 42,
            oom_killed: false
        }
    );
}

#[tokio::test]
async fn exit_codes_that_no_process_has_are_refused() {
    for status in [256, u32::MAX] {
        let (agent, _peer) = hostile(move |stream| frame(stream, 2, &ended(status)));
        assert!(
            matches!(
                agent.wait_process(&key()).await,
                Err(AgentError::Invalid { .. })
            ),
            "{status} was taken"
        );
    }
}

/// From the stream id of a request to the bytes that answer it.
type Reply = fn(u32) -> Vec<u8>;

#[tokio::test]
async fn frames_out_of_turn_end_the_connection() {
    let cases: [(&str, Reply); 4] = [
        ("a frame of", |stream| {
            [&u32::MAX.to_be_bytes()[..], &stream.to_be_bytes(), &[2, 0]].concat()
        }),
        ("which is not open", |stream| {
            frame(stream + 2, 2, &ended(0))
        }),
        ("a frame of type 1", |stream| frame(stream, 1, &ended(0))),
        ("which is not open", |stream| {
            frame(stream, 2, &ended(0)).repeat(100_000)[10 + ended(0).len()..].to_vec()
        }),
    ];
    for (expected, reply) in cases {
        let (agent, _peer) = hostile(reply);
        let first = agent.wait_process(&key()).await;
        let error = match first {
            Err(error) => error,
            // The flood began with one legal answer.
            Ok(_) => agent.wait_process(&key()).await.unwrap_err(),
        };
        assert!(
            matches!(error, AgentError::Broken { .. }),
            "{expected}: {error}"
        );
        // Nothing works after it.
        assert!(agent.shutdown().await.is_err());
    }
}

#[tokio::test]
async fn rubbish_and_truncated_answers_fail_the_call() {
    let (agent, _peer) = hostile(|stream| frame(stream, 2, b"\xff\xff\xff"));
    assert!(agent.wait_process(&key()).await.is_err());
    let (agent, peer) = hostile(|stream| frame(stream, 2, &ended(1))[..12].to_vec());
    let wait = tokio::spawn(async move { agent.wait_process(&key()).await });
    let peer = tokio::task::spawn_blocking(move || peer.join().unwrap());
    drop(peer.await.unwrap());
    assert!(matches!(
        wait.await.unwrap(),
        Err(AgentError::Broken { .. })
    ));
}

#[tokio::test]
async fn an_agent_that_never_answers_meets_the_deadline() {
    let (agent, _peer) = hostile(|_| Vec::new());
    let deadline = Duration::from_millis(50);
    let request = Empty::new();
    let call = agent.client.shutdown(context(deadline), &request);
    assert!(matches!(
        answer("Shutdown", deadline, call).await,
        Err(AgentError::Deadline { .. })
    ));
}

#[tokio::test]
async fn the_guests_words_are_made_printable() {
    let (agent, _peer) = hostile(|stream| {
        let mut response = ttrpc::Response::new();
        response.set_status(ttrpc::get_status(
            ttrpc::Code::NOT_FOUND,
            format!("no\n\x1b[2J{}", "x".repeat(1 << 20)),
        ));
        frame(
            stream,
            2,
            &protobuf::Message::write_to_bytes(&response).unwrap(),
        )
    });
    let error = agent.shutdown().await.unwrap_err().to_string();
    assert!(
        error.starts_with("no  [2Jxxx") && error.len() <= MAX_TEXT,
        "{} bytes",
        error.len()
    );
}

#[tokio::test]
async fn a_program_that_cannot_run_is_told_by_kind() {
    let mut status = ttrpc::get_status(ttrpc::Code::ABORTED, "exec: \"x\": permission denied");
    Unexecutable::NotExecutable.attach(&mut status);
    let mut answer = ttrpc::Response::new();
    answer.set_status(status);
    let (agent, _calls) = answering(vec![protobuf::Message::write_to_bytes(&answer).unwrap()]);
    match agent.start_process(&key()).await.unwrap_err() {
        AgentError::Exec { kind, message } => {
            assert_eq!(kind, Unexecutable::NotExecutable);
            assert_eq!(message, "exec: \"x\": permission denied");
        }
        other => panic!("{other:?}"),
    }
}
