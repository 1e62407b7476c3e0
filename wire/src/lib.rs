//! The Wrenn wire protocol and the codecs around it.
//!
//! Everything here but `client` and `reactor` is sans-I/O: bytes and time in, bytes and events out. `PROTOCOL.md`
//! beside this crate is normative; the code follows it.
//!
//! | module | what it is |
//! | --- | --- |
//! | `client` | a blocking client (feature `client`) |
//! | [`codec`] | primitive encodings |
//! | `config` | the daemons' variables and `.env` file (feature `reactor`) |
//! | [`frame`] | the frame header and frame types |
//! | `http1` | HTTP/1.1 (feature `reactor`) |
//! | [`limiter`] | how often a wrong secret may be tried |
//! | [`message`] | every message |
//! | [`auth`] | SCRAM-SHA-256 and the keys that follow from it |
//! | `reactor` | the mio shell (feature `reactor`) |
//! | [`session`] | one connection: handshake, streams, credit, keep-alive |
//! | `websocket` | RFC 6455 (feature `reactor`) |

// envd is a freestanding program: the session and its messages need an allocator and nothing else.
#![cfg_attr(not(any(feature = "client", feature = "reactor")), no_std)]

extern crate alloc;

pub mod auth;
pub mod base64;
#[cfg(feature = "client")]
pub mod client;
pub mod codec;
#[cfg(feature = "reactor")]
pub mod config;
pub mod frame;
#[cfg(feature = "reactor")]
pub mod http1;
pub mod limiter;
pub mod message;
pub mod network;
#[cfg(feature = "reactor")]
pub mod reactor;
pub mod session;
pub mod splice;
#[cfg(feature = "reactor")]
pub mod websocket;
