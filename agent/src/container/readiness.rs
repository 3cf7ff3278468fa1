//! Waiting for a descriptor, but no longer than is allowed.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Whether one of `events` (poll(2)) comes before `until`. Signals that come meanwhile change nothing.
pub fn ready_by(fd: BorrowedFd<'_>, events: PollFlags, until: Instant) -> nix::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, events)], timeout) {
            Ok(0) if Instant::now() >= until => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::time::Duration;

    #[test]
    fn a_descriptor_is_waited_for_until_the_moment_and_no_longer() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let by = |time| ready_by(reader.as_fd(), PollFlags::POLLIN, Instant::now() + time);
        assert_eq!(by(Duration::ZERO), Ok(false));
        let began = Instant::now();
        assert_eq!(by(Duration::from_millis(30)), Ok(false));
        assert!(began.elapsed() >= Duration::from_millis(30));
        writer.write_all(b"x").unwrap();
        assert_eq!(by(Duration::from_secs(60)), Ok(true));
    }
}
