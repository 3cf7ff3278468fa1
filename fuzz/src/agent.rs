//! An agent that answers the supervisor's calls as the input says, and a supervisor that must not be impressed.
//!
//! A ttrpc answer is a frame (u32 length, u32 stream id, u8 type, u8 flags, big endian) around a `Response`, a protobuf
//! message of `status` (field 1) and `payload` (field 2), the answer proper.

use crate::input::Input;
use coffer::agent::{Agent, AgentError, NewContainer};
use coffer::sandbox::process::ProcessKey;
use coffer_proto::agent::{StartSandboxRequest, Stdio};
use coffer_proto::ids::ContainerId;
use coffer_proto::limits::MAX_LISTED_PROCESSES;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Calls of one input; the fuzzer gains nothing from more.
const MAX_CALLS: usize = 64;
/// No call may last longer: the agent has said all it will say.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest text that may come from the guest in one piece, with room for our own words around it.
const MAX_TEXT: usize = 16 << 10;

const RESPONSE: u8 = 2;
const STATUS: u8 = 1 << 3 | 2;
const PAYLOAD: u8 = 2 << 3 | 2;

/// Calls and their answers, until the input ends or the connection does.
pub fn agent(input: &[u8]) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(converse(Input(input)));
}

async fn converse(mut input: Input<'_>) {
    let (near, far) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    far.set_nonblocking(true).expect("a socket");
    let mut far = UnixStream::from_std(far).expect("a socket");
    let agent = Agent::new(near, 1).expect("a client");
    for _ in 0..MAX_CALLS {
        let Some(operation) = input.byte() else {
            return;
        };
        let both = async { tokio::join!(call(&agent, operation), reply(&mut far, &mut input)) };
        let (outcome, goes_on) = tokio::time::timeout(PATIENCE, both)
            .await
            .expect("a call hangs though its agent has spoken");
        if let Err(error) = outcome {
            proper(&error.to_string());
        }
        if !goes_on {
            return;
        }
    }
}

/// One call, and what its answer must be like if it is taken.
async fn call(agent: &Agent, operation: u8) -> Result<(), AgentError> {
    let id = ContainerId::new("c").expect("an id");
    let key = ProcessKey::init(id.clone());
    match operation % 10 {
        0 => {
            let request = StartSandboxRequest::default();
            let guest = agent.start_sandbox(&request, PATIENCE).await?;
            proper(&guest.kernel_release);
            guest.phases.iter().for_each(|(name, _)| proper(name));
        }
        1 => assert!(agent.wait_process(&key).await?.status <= 255),
        2 => {
            let processes = agent.list_processes(&id).await?;
            assert!(processes.len() <= MAX_LISTED_PROCESSES);
            for process in processes {
                assert!(process.pid > 0);
                proper(&process.exec_id);
                proper(&process.command);
            }
        }
        3 => drop(agent.stat_container(&id).await?),
        4 => drop(agent.stat_guest().await?),
        5 => proper(agent.next_oom().await?.as_str()),
        6 => {
            let container = NewContainer {
                id: &id,
                spec: Vec::new(),
                stdio: Stdio::default(),
                beside: None,
                shared_memory: 0,
            };
            let pid = agent.create_container(container);
            assert!(i32::try_from(pid.await?).is_ok_and(|pid| pid > 0));
        }
        7 => {
            let pid = agent.start_process(&key).await?;
            assert!(i32::try_from(pid).is_ok_and(|pid| pid > 0));
        }
        8 => agent.signal_process(&key, 15, true).await?,
        _ => agent.shutdown().await?,
    }
    Ok(())
}

/// Text of the guest, as it may be printed.
fn proper(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
    assert!(text.len() <= MAX_TEXT, "{} bytes of text", text.len());
}

/// Reads one request and answers it as the input says. False: the agent has hung up.
async fn reply(far: &mut UnixStream, input: &mut Input<'_>) -> bool {
    let mut header = [0; 10];
    if far.read_exact(&mut header).await.is_err() {
        return false;
    }
    let [l0, l1, l2, l3, s0, s1, s2, s3, ..] = header;
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if far.read_exact(&mut vec![0; length]).await.is_err() {
        return false;
    }
    let stream = u32::from_be_bytes([s0, s1, s2, s3]);
    // Without an answer: nothing, and the end.
    let (bytes, goes_on) = answer(stream, input).unwrap_or_default();
    // The client may have hung up in the middle of it.
    let written = far.write_all(&bytes).await.is_ok();
    if !goes_on {
        let _ = far.shutdown().await;
    }
    goes_on && written
}

/// The bytes of an answer to the call on `stream`, and whether the connection goes on afterwards.
fn answer(stream: u32, input: &mut Input<'_>) -> Option<(Vec<u8>, bool)> {
    let shape = input.byte()? % 8;
    let length = usize::from(input.word()?).min(input.0.len());
    let content = input.take(length)?;
    Some(match shape {
        0 | 1 => (frame(stream, &field(PAYLOAD, content)), true),
        2 => (frame(stream, &field(STATUS, content)), true),
        3 => (frame(stream, content), true),
        4 => (
            frame(stream.wrapping_add(2), &field(PAYLOAD, content)),
            false,
        ),
        5 => (frame(stream, &field(PAYLOAD, content)).repeat(2), false),
        6 => {
            let header = [
                &input.long()?.to_le_bytes()[..],
                &input.word()?.to_le_bytes(),
            ]
            .concat();
            ([&header, content].concat(), false)
        }
        _ => (content.to_vec(), false),
    })
}

fn frame(stream: u32, response: &[u8]) -> Vec<u8> {
    let length = response.len() as u32;
    [
        &length.to_be_bytes()[..],
        &stream.to_be_bytes(),
        &[RESPONSE, 0],
        response,
    ]
    .concat()
}

/// A field of protobuf with a length before its content.
fn field(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    let mut length = content.len();
    while length >= 0x80 {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend(content);
    bytes
}
