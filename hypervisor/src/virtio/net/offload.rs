//! Which work guest and tap may leave to each other.
//!
//! "Guest" features say what the guest can receive and become flags of TUNSETOFFLOAD. "Host" features say what the
//! guest may send; the tap takes all of these that its kernel knows, always.

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
};

/// What every tap of a supported kernel does, so it can be offered before the tap is there.
pub(super) const COMMON: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_UFO
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_UFO;

/// UDP segmentation, in taps since Linux 6.2: offered where the tap at hand takes it.
pub(super) const USO: u64 =
    1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6 | 1 << VIRTIO_NET_F_HOST_USO;

/// Flags of TUNSETOFFLOAD for what the guest can receive. The kernel knows the rest only on top of checksums, and the
/// two kinds of USO only together.
pub(super) fn tap_flags(features: u64) -> u32 {
    let has = |bit: u32| features & 1 << bit != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = TUN_F_CSUM;
    for (bit, flag) in [
        (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_UFO, TUN_F_UFO),
    ] {
        if has(bit) {
            flags |= flag;
        }
    }
    if has(VIRTIO_NET_F_GUEST_ECN) && flags & (TUN_F_TSO4 | TUN_F_TSO6) != 0 {
        flags |= TUN_F_TSO_ECN;
    }
    if has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6) {
        flags |= TUN_F_USO4 | TUN_F_USO6;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_without_checksums() {
        assert_eq!(tap_flags(COMMON & !(1 << VIRTIO_NET_F_GUEST_CSUM)), 0);
    }

    #[test]
    fn ecn_needs_tso_and_uso_comes_in_pairs() {
        let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
        assert_eq!(tap_flags(csum | 1 << VIRTIO_NET_F_GUEST_ECN), TUN_F_CSUM);
        assert_eq!(tap_flags(csum | 1 << VIRTIO_NET_F_GUEST_USO4), TUN_F_CSUM);
        assert_eq!(tap_flags(COMMON | USO), 0x7f);
    }
}
