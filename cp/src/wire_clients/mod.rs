//! Clients of the wire protocol on the public port: who they are and what their streams are for.
//!
//! They prove an API key (SCRAM-SHA-256), ask for what its team may have, and hold streams into its
//! capsules. [`requests`] is what they may ask; the event loop's side is in `http::wire_streams`.

pub mod requests;

use crate::hosts::sessions::CallId;
use crate::http::task::TaskId;
use std::collections::BTreeMap;
use wire::auth::NONCE_LEN;
use wire::session::{Limits, Session, StreamId};
use wire::splice::Pipe;

/// Connections of wire clients at once; each may hold as much as [`LIMITS`] says.
pub const MAX_WIRE_CLIENTS: usize = 512;
/// What a client may have under way.
pub const LIMITS: Limits =
    Limits { stream_window: 256 * 1024, connection_window: 1024 * 1024, max_streams: 256 };

/// A connection of a wire client.
pub struct WireClient {
    /// The protocol.
    pub session: Session,
    /// The id of the key whose verifier the session was given. It is proven once the session is ready.
    pub key_id: Option<String>,
    /// What its streams are for.
    pub streams: BTreeMap<StreamId, StreamUse>,
}

/// What a client's stream is for.
pub enum StreamUse {
    /// A request is under way.
    Asked(TaskId),
    /// It is to go on into a capsule and its first message has not come.
    AwaitInner(String),
    /// It goes on into a capsule.
    Spliced(Box<Spliced>),
    /// Its answer is on its way.
    Answering(Pipe),
    /// It is answered; the client's half is still open.
    Answered,
}

/// A client's stream joined with one to a host.
pub struct Spliced {
    /// The task that finds the capsule and then stands for the two.
    pub task: TaskId,
    /// The stream to the host, once the capsule is found.
    pub call: Option<CallId>,
    /// Whether that stream is open.
    pub is_open: bool,
    /// What goes into the capsule.
    pub inward: Pipe,
    /// What comes out of it.
    pub outward: Pipe,
}

impl WireClient {
    /// A connection whose first byte is a wire client's.
    pub fn new(nonce: [u8; NONCE_LEN], now_ms: u64) -> WireClient {
        let name = concat!("wrenn-cp/", env!("CARGO_PKG_VERSION"));
        WireClient {
            session: Session::server(name, nonce, LIMITS, now_ms),
            key_id: None,
            streams: BTreeMap::new(),
        }
    }

    /// The stream's two pipes, if it goes on into a capsule.
    pub fn spliced(&mut self, stream: StreamId) -> Option<&mut Spliced> {
        match self.streams.get_mut(&stream) {
            Some(StreamUse::Spliced(spliced)) => Some(spliced),
            _ => None,
        }
    }
}
