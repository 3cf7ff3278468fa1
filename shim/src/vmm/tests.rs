use super::*;
use crate::machine::child::ProcessId;
use std::ffi::OsStr;
use std::path::Path;

/// Ends the process with the test.
struct Reaped(ProcessId);

impl Drop for Reaped {
    fn drop(&mut self) {
        self.0.kill(Duration::from_secs(5)).unwrap();
    }
}

/// A process that only holds its end of the control socket, and that end once more for the test to speak.
fn start() -> (Vmm, OwnedFd, Reaped) {
    let (ours, theirs) = coffer_proto::vmm::control_pair().unwrap();
    let args = [OsStr::new("600")];
    let child = Child::spawn(Path::new("/bin/sleep"), &args, theirs.as_fd()).unwrap();
    let reaped = Reaped(child.id);
    (Vmm::new(ours, child).unwrap(), theirs, reaped)
}

/// Answers the next request on the far end.
async fn answer(far: OwnedFd, message: FromVmm) -> (Request, OwnedFd) {
    tokio::task::spawn_blocking(move || {
        let (request, _files) = receive::<Request>(far.as_fd()).unwrap();
        send(far.as_fd(), &message, &[]).unwrap();
        (request, far)
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn requests_get_their_replies_and_events_are_kept() {
    let (vmm, far, _reaped) = start();
    send(
        far.as_fd(),
        &FromVmm::Event(Event::Phase {
            phase: 1,
            since_start_us: 1500,
        }),
        &[],
    )
    .unwrap();
    let (metrics, (request, far)) = tokio::join!(
        vmm.metrics(),
        answer(far, FromVmm::Reply(Reply::Metrics(Metrics::default())))
    );
    assert_eq!(request, Request::Metrics);
    assert_eq!(metrics.unwrap(), Metrics::default());
    assert_eq!(
        vmm.phases(),
        [BootPhase {
            phase: 1,
            at: Duration::from_micros(1500)
        }]
    );
    let refused = FromVmm::Reply(Reply::Failed {
        message: "no\nsuch slot".into(),
    });
    let (stop, _) = tokio::join!(vmm.stop(), answer(far, refused));
    assert_eq!(
        stop.unwrap_err().to_string(),
        "the hypervisor process refused: no such slot"
    );
}

#[tokio::test]
async fn the_reason_of_the_end_reaches_everyone() {
    let (vmm, far, _reaped) = start();
    let failed = Exit::Failed {
        message: "KVM_RUN failed".into(),
    };
    send(far.as_fd(), &FromVmm::Event(Event::Exited(failed)), &[]).unwrap();
    drop(far);
    vmm.process.id.kill(Duration::from_secs(5)).unwrap();
    assert_eq!(vmm.gone().await, "KVM_RUN failed");
    assert!(
        matches!(vmm.metrics().await, Err(VmmError::Gone(reason)) if reason == "KVM_RUN failed")
    );
}

#[tokio::test]
async fn the_guest_is_waited_for_to_have_what_it_was_asked_to_have_last() {
    let (vmm, far, _reaped) = start();
    let (asked, (request, far)) = tokio::join!(
        vmm.resize_memory(512),
        answer(far, FromVmm::Reply(Reply::Done))
    );
    asked.unwrap();
    assert_eq!(request, Request::ResizeMemory { mib: 512 });
    let moment = Duration::from_millis(20);
    assert!(!vmm.memory_reached(512, moment).await);
    send(
        far.as_fd(),
        &FromVmm::Event(Event::Memory { mib: 512 }),
        &[],
    )
    .unwrap();
    assert!(vmm.memory_reached(512, Duration::from_secs(5)).await);
    let (asked, _far) = tokio::join!(
        vmm.resize_memory(256),
        answer(far, FromVmm::Reply(Reply::Done))
    );
    asked.unwrap();
    assert!(!vmm.memory_reached(256, moment).await);
}

#[tokio::test]
async fn a_killed_process_is_named_with_its_signal() {
    let (vmm, far, _reaped) = start();
    drop(far);
    vmm.process.id.kill(Duration::from_secs(5)).unwrap();
    assert_eq!(vmm.gone().await, "sleep was killed by signal 9");
}

#[tokio::test]
async fn a_reply_nobody_asked_for_ends_the_vm() {
    let (vmm, far, _reaped) = start();
    send(far.as_fd(), &FromVmm::Reply(Reply::Done), &[]).unwrap();
    let reason = vmm.gone().await;
    assert!(reason.contains("nobody asked"), "{reason}");
    assert!(!vmm.process.id.is_alive());
}

#[tokio::test]
async fn no_answer_meets_the_deadline() {
    let (vmm, _far, _reaped) = start();
    let answer = vmm
        .call(Request::Metrics, Vec::new(), Duration::from_millis(20))
        .await;
    assert!(matches!(answer, Err(VmmError::Deadline(_))));
}
