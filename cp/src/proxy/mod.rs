//! Services inside capsules, reached from outside at `{port}-{capsule id}.{domain}` by the Host header.
//!
//! One request is one [exchange](exchange::Exchange) over a connection of its own to the port, which the
//! capsule's guest daemon makes; so nothing that one request leaves behind is read by the next one. The
//! client's connection is kept alive. A request shows the same credential as one to the API does; that
//! never reaches the capsule. HTTP/1.1 both ways, and WebSockets.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`destination`] | from the Host header to a port of a capsule |
//! | [`head`] | what of a head goes on, and what is this hop's own |
//! | [`exchange`] | one request and its response, sans-I/O |
//! | [`mod@begin`] | who asks, and the way to the capsule |

pub mod begin;
pub mod destination;
pub mod exchange;
pub mod head;

pub use begin::{Proxy, begin};
pub use destination::Destination;
