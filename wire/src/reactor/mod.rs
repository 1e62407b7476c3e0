//! The thin mio shell that event loops have in common. No protocol lives here.
//!
//! | type | what it is |
//! | --- | --- |
//! | [`Socket`] | a non-blocking TCP stream that remembers its readiness |
//! | [`Link`] | a wire session on a socket |
//! | [`Timers`] | one timer a key |
//! | [`mailbox`] | a queue into the loop from other threads |
//! | [`sys`] | signals, limits and random numbers of the kernel |

mod link;
pub mod mailbox;
mod socket;
pub mod sys;
mod timers;

pub use link::Link;
pub use socket::{READ_BUDGET_BYTES, READ_CHUNK_BYTES, Socket, Transfer};
pub use timers::Timers;
