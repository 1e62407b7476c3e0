//! Which connections may ask for work: fails closed until the agent has told the guest what it missed.
//!
//! A guest that was just started, or resumed from a snapshot, has a wrong clock and may share its random
//! pool with other guests of the same snapshot. Nothing is started in it before [`GuestInit`] has mended
//! that. The one connection that had the guest made ready to be saved goes on without: where it still has
//! somebody at its other end, this is the guest that was saved, not one that was made of it.
//!
//! [`GuestInit`]: wire::message::GuestInit

use crate::connection::ConnectionId;
use alloc::format;
use wire::message::{Code, Error, GuestInit, Health, Message};

/// Randomness without which a guest that others may share a random pool with does not begin, in bytes.
pub const MIN_ENTROPY: usize = 32;

/// Who may ask for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Nobody before [`GuestInit`].
    Nobody,
    /// The connection that had the guest made ready to be saved; all others after [`GuestInit`].
    Only(ConnectionId),
    /// Everybody who is let in.
    Everybody,
}

impl Trust {
    /// Refuses a stream's first message where its connection may not ask for work yet.
    pub fn check(self, connection: ConnectionId, kind: u16) -> Result<(), Error> {
        match self {
            Trust::Everybody => Ok(()),
            Trust::Only(trusted) if trusted == connection => Ok(()),
            _ if kind == Health::KIND || kind == GuestInit::KIND => Ok(()),
            Trust::Nobody | Trust::Only(_) => Err(Error::new(
                Code::Unavailable,
                "the capsule was just started or resumed, and its host has not set its clock and random \
                 numbers yet: try again",
            )),
        }
    }

    /// Refuses an initialisation that would leave undone what everybody waits for.
    pub fn check_init(self, init: &GuestInit) -> Result<(), Error> {
        if self == Trust::Everybody || (init.time_us > 0 && init.entropy.len() >= MIN_ENTROPY) {
            return Ok(());
        }
        let text = format!(
            "a guest that was just started or resumed needs the time and at least {MIN_ENTROPY} random bytes"
        );
        Err(Error::new(Code::InvalidRequest, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::message::{GuestPrepareSnapshot, ProcessStart};

    const WORK: [u16; 2] = [ProcessStart::KIND, GuestPrepareSnapshot::KIND];
    const ALWAYS: [u16; 2] = [Health::KIND, GuestInit::KIND];

    #[test]
    fn work_waits_for_the_initialisation() {
        for (trust, connection, may) in [
            (Trust::Nobody, 1, false),
            (Trust::Only(1), 1, true),
            (Trust::Only(1), 2, false),
            (Trust::Everybody, 2, true),
        ] {
            for kind in WORK {
                let result = trust.check(connection, kind).map_err(|e| e.code());
                assert_eq!(result, if may { Ok(()) } else { Err(Code::Unavailable) }, "{trust:?} {kind:#x}");
            }
            assert!(ALWAYS.iter().all(|kind| trust.check(connection, *kind).is_ok()), "{trust:?}");
        }
    }

    #[test]
    fn an_initialisation_without_time_or_randomness_opens_nothing() {
        let init = |time_us, entropy| GuestInit {
            time_us,
            entropy: alloc::vec![1; entropy].as_slice().into(),
            ..GuestInit::default()
        };
        for trust in [Trust::Nobody, Trust::Only(1)] {
            assert!(trust.check_init(&init(1, MIN_ENTROPY)).is_ok());
            for lacking in [init(0, MIN_ENTROPY), init(1, MIN_ENTROPY - 1), init(0, 0)] {
                assert_eq!(trust.check_init(&lacking).map_err(|e| e.code()), Err(Code::InvalidRequest));
            }
        }
        assert!(Trust::Everybody.check_init(&init(0, 0)).is_ok());
    }
}
