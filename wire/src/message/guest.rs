//! Messages between the agent and a capsule's guest daemon about the guest itself.

use super::messages;
use crate::codec::Bytes;
use alloc::string::String;
use alloc::vec::Vec;

messages! {
    /// Tells the guest daemon what it could not know: sent by the agent after boot and each resume.
    /// Answered by `Done`.
    GuestInit = 0x0400 {
        /// Wall clock time, in microseconds since the epoch.
        time_us: u64,
        /// Account for requests that name none; empty for `user`, or root where that does not exist.
        default_user: String,
        /// Default environment of processes.
        environment: Vec<(Bytes, Bytes)>,
        /// Bytes to mix into the guest's random pool.
        entropy: Bytes,
    }
}
