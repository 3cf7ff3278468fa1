//! Flow control of one connection (virtio 1.2, 5.10.6.3).
//!
//! All counts are of bytes since the connection began, modulo 2^32; only their differences mean anything.

use super::Header;
use super::limits::{BUFFER, CREDIT_THRESHOLD};

/// Both directions of one connection's flow control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Credit {
    /// The guest's buffer space.
    peer_space: u32,
    /// What the guest has consumed of what we sent.
    peer_consumed: u32,
    /// What we sent.
    sent: u32,
    /// What the guest sent.
    received: u32,
    /// What we passed on of that.
    consumed: u32,
    /// The last `consumed` that the guest was told.
    told: u32,
}

/// The guest sent more than the space it was told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest sent beyond its credit")]
pub struct OverCredit;

impl Credit {
    /// Takes over what a packet of the guest says about its buffer.
    ///
    /// A `fwd_cnt` that lies before the one known, or beyond what was sent, is ignored: Linux may queue two packets
    /// in the other order than it counted them, so it is no reason for a reset, and believing it would overrun or stall.
    pub fn learn(&mut self, header: &Header) {
        self.peer_space = header.buf_alloc;
        let advance = header.fwd_cnt.wrapping_sub(self.peer_consumed);
        if advance <= self.sent.wrapping_sub(self.peer_consumed) {
            self.peer_consumed = header.fwd_cnt;
        }
    }

    /// No byte went either way.
    pub fn is_fresh(&self) -> bool {
        self.sent == 0 && self.received == 0
    }

    /// Bytes the guest has room for.
    pub fn available(&self) -> u32 {
        self.peer_space
            .saturating_sub(self.sent.wrapping_sub(self.peer_consumed))
    }

    /// We sent `length` bytes.
    pub fn send(&mut self, length: u32) {
        self.sent = self.sent.wrapping_add(length);
    }

    /// The guest sent `length` bytes. What counts is the space it was told of, even if more is free by now.
    pub fn receive(&mut self, length: u32) -> Result<(), OverCredit> {
        let unacknowledged = self.received.wrapping_sub(self.told);
        if length > BUFFER - unacknowledged {
            return Err(OverCredit);
        }
        self.received = self.received.wrapping_add(length);
        Ok(())
    }

    /// The host took `length` bytes of what the guest sent. At most as many as are held.
    pub fn consume(&mut self, length: u32) {
        debug_assert!(length <= self.received.wrapping_sub(self.consumed));
        self.consumed = self.consumed.wrapping_add(length);
    }

    /// Whether the guest believes in so little room that it should hear of what was freed.
    pub fn update_is_due(&self) -> bool {
        let believed = BUFFER - self.received.wrapping_sub(self.told);
        self.told != self.consumed && believed < CREDIT_THRESHOLD
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that goes to the guest now.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.consumed;
        (BUFFER, self.consumed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::vsock::packet::TYPE_STREAM;

    #[test]
    fn counters_wrap_without_a_loss() {
        const STEP: u32 = 100_003;
        let mut credit = Credit::default();
        let mut said = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 1,
            dst_port: 1,
            len: 0,
            kind: TYPE_STREAM,
            op: None,
            flags: 0,
            buf_alloc: STEP,
            fwd_cnt: 0,
        };
        credit.learn(&said);
        let mut told = 0u32;
        // Three times around.
        for _ in 0..3 * (u32::MAX / STEP) {
            assert_eq!(credit.available(), STEP);
            credit.send(STEP);
            assert_eq!(credit.available(), 0);
            said.fwd_cnt = said.fwd_cnt.wrapping_add(STEP);
            credit.learn(&said);
            credit.receive(STEP).unwrap();
            assert_eq!(credit.receive(BUFFER), Err(OverCredit));
            credit.consume(STEP);
            told = told.wrapping_add(STEP);
            assert_eq!(credit.tell(), (BUFFER, told));
        }
    }
}
