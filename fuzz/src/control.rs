//! Control messages between the supervisor and a hypervisor process, as either of them takes them.

use crate::input::Input;
use coffer_hypervisor::machine;
use coffer_proto::vmm::{self, Files, FromVmm, Request};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd};

/// Files that the kernel lets one message carry.
const SCM_MAX_FD: usize = 253;

/// One message: a byte for the direction, one for the number of files that come with it, and the message itself.
pub fn control(input: &[u8]) {
    let mut input = Input(input);
    let (Some(direction), Some(files)) = (input.byte(), input.byte()) else {
        return;
    };
    if direction & 1 == 0 {
        deliver(input.0, files.into(), |request: Request| {
            if let Request::Boot(config) = request {
                // Whatever it says, it is taken or refused.
                let _ = machine::check(&config);
            }
        });
    } else {
        deliver(input.0, files.into(), |_: FromVmm| {});
    }
}

/// Sends the bytes as a peer would who keeps no rule, and takes them as ours does. No file may stay open.
fn deliver<M>(message: &[u8], files: usize, look: impl FnOnce(M))
where
    M: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let (near, far) = vmm::control_pair().expect("a socket pair");
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let rights = vec![writer.as_raw_fd(); files.min(SCM_MAX_FD)];
    let sent = sendmsg::<()>(
        far.as_raw_fd(),
        &[IoSlice::new(message)],
        &[ControlMessage::ScmRights(&rights)],
        MsgFlags::MSG_DONTWAIT,
        None,
    );
    drop(writer);
    if sent.is_err() {
        return; // Longer than a socket takes.
    }
    if let Ok((message, mut files)) = vmm::receive::<M>(near.as_fd()) {
        take_all(&mut files);
        vmm::send(far.as_fd(), &message, &[]).expect("what was taken can be sent");
        let (again, _) = vmm::receive::<M>(near.as_fd()).expect("what was sent can be taken");
        assert_eq!(message, again);
        look(message);
    }
    drop((near, far));
    // It would wait for ever where a copy of the writing end is still open.
    assert_eq!(reader.read(&mut [0]).expect("a pipe"), 0);
}

/// Each file comes out once.
fn take_all(files: &mut Files) {
    for index in 0..=u8::MAX {
        let index = vmm::FdIndex(index);
        drop(files.take(index));
        assert!(files.take(index).is_err(), "a file came out twice");
    }
}
