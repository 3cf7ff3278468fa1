//! A coffer-fsd that breaks the protocol. The good path is tested with the real one, in `fsd/tests/device.rs`.

use super::backend::Backend;
use super::{Fs, FsError};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::FrontendReq;

const WANTED: u64 = 1 << 32;
const PROTOCOL: u64 = 1 << 30;
const REPLY: u32 = 0x5;
const REPLY_ACK: u64 = 1 << 3;

fn message(request: FrontendReq, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = [u32::from(request), flags, payload.len() as u32];
    let header: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
    [header, payload.to_vec()].concat()
}

/// The conversation with a peer that has said `answers` before it is asked, and then is silent.
fn negotiate(answers: &[Vec<u8>]) -> (Result<(), FsError>, Duration) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&answers.concat()).unwrap();
    let begin = Instant::now();
    let mut backend = Backend::new(ours.into());
    backend.begin(Duration::from_millis(200));
    let result = backend.negotiate(WANTED, PROTOCOL);
    (result, begin.elapsed())
}

#[test]
fn silence_ends_at_the_deadline() {
    for answers in [
        vec![],
        vec![message(FrontendReq::GET_FEATURES, REPLY, &[])[..5].to_vec()],
    ] {
        let (result, took) = negotiate(&answers);
        assert!(
            matches!(
                result,
                Err(FsError::Timeout {
                    request: FrontendReq::GET_FEATURES
                })
            ),
            "{result:?}"
        );
        assert!(
            took >= Duration::from_millis(200) && took < Duration::from_secs(5),
            "{took:?}"
        );
    }
}

#[test]
fn a_closed_socket_is_the_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let mut backend = Backend::new(ours.into());
    backend.begin(Duration::from_secs(5));
    assert!(matches!(backend.check(), Err(FsError::Ended)));
    assert!(matches!(
        backend.negotiate(WANTED, PROTOCOL),
        Err(FsError::Ended)
    ));
    assert!(matches!(backend.stop_queue(0), Err(FsError::Ended)));
}

#[test]
fn answers_that_break_the_protocol_are_refused() {
    let features = (WANTED | PROTOCOL).to_ne_bytes();
    let get = FrontendReq::GET_FEATURES;
    for answer in [
        message(FrontendReq::GET_VRING_BASE, REPLY, &features),
        message(get, 0x1, &features),
        message(get, 0x6, &features),
        message(get, REPLY, &[0; 4]),
        message(get, REPLY, &[0; 16]),
        vec![0xff; 12],
    ] {
        let (result, _) = negotiate(&[answer]);
        assert!(
            matches!(result, Err(FsError::Protocol { .. })),
            "{result:?}"
        );
    }
    for offered in [WANTED, PROTOCOL, 0] {
        let (result, _) = negotiate(&[message(get, REPLY, &offered.to_ne_bytes())]);
        assert!(
            matches!(result, Err(FsError::Features { .. })),
            "{result:?}"
        );
    }
}

#[test]
fn a_refused_command_names_its_code() {
    let (result, _) = negotiate(&[
        message(
            FrontendReq::GET_FEATURES,
            REPLY,
            &(WANTED | PROTOCOL).to_ne_bytes(),
        ),
        message(
            FrontendReq::GET_PROTOCOL_FEATURES,
            REPLY,
            &REPLY_ACK.to_ne_bytes(),
        ),
        message(FrontendReq::SET_FEATURES, REPLY, &7u64.to_ne_bytes()),
    ]);
    assert!(
        matches!(
            result,
            Err(FsError::Refused {
                request: FrontendReq::SET_FEATURES,
                code: 7
            })
        ),
        "{result:?}"
    );
}

#[test]
fn something_unasked_is_told_from_a_false_alarm() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let backend = Backend::new(ours.into());
    assert!(backend.check().is_ok());
    theirs.write_all(&[0]).unwrap();
    assert!(matches!(backend.check(), Err(FsError::Unasked)));
}

#[test]
fn tags_have_1_to_36_bytes() {
    let tag = |length: usize| Fs::new(&"t".repeat(length), UnixStream::pair().unwrap().0.into());
    assert!(matches!(tag(0), Err(FsError::Tag(_))));
    assert!(tag(36).is_ok());
    assert!(matches!(tag(37), Err(FsError::Tag(_))));
}
