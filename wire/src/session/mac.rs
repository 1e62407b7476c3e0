//! The MAC of each frame after the handshake.

use crate::auth::{constant_time_eq, new_mac};
use crate::frame::MAC_LEN;
use hmac::{Hmac, Mac};
use sha2::Sha256;

/// One direction: its key and the number of the next frame. The number is in the MAC and not on the
/// wire, so a frame that is replayed, dropped or moved does not verify.
pub(super) struct FrameMac {
    keyed: Hmac<Sha256>,
    sequence: u64,
}

impl FrameMac {
    pub fn new(key: &[u8; 32]) -> FrameMac {
        FrameMac { keyed: new_mac(key), sequence: 0 }
    }

    /// The MAC of the next frame, header and payload.
    pub fn next(&mut self, frame: &[u8]) -> [u8; MAC_LEN] {
        let mut mac = self.keyed.clone();
        mac.update(&self.sequence.to_be_bytes());
        mac.update(frame);
        // At a million frames a second this lasts half a million years.
        self.sequence += 1;
        let full: [u8; 32] = mac.finalize().into_bytes().into();
        let mut tag = [0; MAC_LEN];
        tag.copy_from_slice(&full[..MAC_LEN]);
        tag
    }

    /// Whether `tag` is the MAC of the next frame.
    pub fn verify_next(&mut self, frame: &[u8], tag: &[u8]) -> bool {
        constant_time_eq(&self.next(frame), tag)
    }
}
