//! Clients of the wire protocol on the public port: who they are and what their streams are for.
//!
//! They prove an API key (SCRAM-SHA-256), ask for what its team may have, and hold streams into its
//! capsules. [`requests`] is what they may ask; the event loop's side is in `http::wire_streams`.

pub mod requests;

use crate::hosts::sessions::CallId;
use crate::http::task::TaskId;
use std::collections::BTreeMap;
use wire::auth::NONCE_LEN;
use wire::message::{Code, Error};
use wire::session::{Limits, Session, StreamId};
use wire::splice::Pipe;

/// Connections of wire clients at once; each may hold as much as [`LIMITS`] says.
pub const MAX_WIRE_CLIENTS: usize = 512;
/// Of these, connections that have not proven a key. Each has the time of the handshake for that.
pub const MAX_UNPROVEN: usize = 128;
/// Connections of one team, so that none takes the places of all others. With the streams of each it has a
/// quarter of [what all may have](crate::hosts::sessions::MAX_CALLS).
pub const MAX_TEAM_CLIENTS: usize = 16;
/// What a client may have under way.
pub const LIMITS: Limits =
    Limits { stream_window: 256 * 1024, connection_window: 512 * 1024, max_streams: 64 };
/// How often the key of a connection is looked up, in milliseconds: what a revoked key has open ends then.
/// New streams of it are refused at once.
pub const RECHECK_MS: u64 = 30_000;

/// A connection of a wire client.
pub struct WireClient {
    /// The protocol.
    pub session: Session,
    /// The id of the key whose verifier the session was given. It is proven once the session is ready.
    pub key_id: Option<String>,
    /// The team that the key acts for.
    pub team_id: String,
    /// Whether the key is proven.
    pub is_proven: bool,
    /// When the key is looked up again; `None` while it is being looked up.
    pub recheck_at_ms: Option<u64>,
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
            team_id: String::new(),
            is_proven: false,
            recheck_at_ms: None,
            streams: BTreeMap::new(),
        }
    }

    /// The key is proven.
    pub fn on_proven(&mut self, now_ms: u64) {
        self.is_proven = true;
        self.recheck_at_ms = Some(now_ms + RECHECK_MS);
    }

    /// When something is due.
    pub fn next_timeout_ms(&self) -> Option<u64> {
        let session = self.session.next_timeout_ms()?;
        Some(self.recheck_at_ms.map_or(session, |at| at.min(session)))
    }

    /// The id of the key, when it is to be looked up now. [`WireClient::on_rechecked`] follows.
    pub fn take_recheck(&mut self, now_ms: u64) -> Option<String> {
        self.recheck_at_ms.take_if(|at| *at <= now_ms)?;
        self.key_id.clone()
    }

    /// What looking up the key, proven or only claimed, has come to when it is no verifier: a connection
    /// without a good key ends. That the database is away says nothing of a key that was proven.
    pub fn on_rechecked(&mut self, error: Option<Error>, now_ms: u64) {
        match error {
            Some(error) if !self.is_proven || error.code() == Code::Unauthenticated => {
                self.session.refuse(error.code(), &error.text);
            }
            Some(_) | None => self.recheck_at_ms = Some(now_ms + RECHECK_MS),
        }
    }

    /// Ends a stream into a capsule as its host has.
    pub fn reset(&mut self, stream: StreamId, code: u16, reason: &str) {
        self.session.reset(stream, Code::from_number(code), reason);
        self.unsplice(stream);
    }

    /// Takes what a stream into a capsule was for, and gives back the credit of what has not gone in. Where
    /// the stream has ended, that is the connection's alone.
    pub fn unsplice(&mut self, stream: StreamId) -> Option<Box<Spliced>> {
        let owed = self.spliced(stream)?.inward.owed();
        self.session.release(stream, owed);
        match self.streams.remove(&stream) {
            Some(StreamUse::Spliced(spliced)) => Some(spliced),
            _ => None,
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

/// Whether a connection may go on to the lookup of its key, with so many there, itself among them, and so
/// many of them unproven.
pub fn has_room(connections: usize, unproven: usize) -> bool {
    connections <= MAX_WIRE_CLIENTS && unproven <= MAX_UNPROVEN
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::auth::{ITERATIONS, Verifier};
    use wire::message::Health;
    use wire::session::Event;

    fn proven(now_ms: u64) -> WireClient {
        let mut client = WireClient::new([1; NONCE_LEN], now_ms);
        client.key_id = Some("key-1".into());
        client.on_proven(now_ms);
        client
    }

    #[test]
    fn a_key_is_looked_up_again_and_a_revoked_one_ends_its_connection() {
        let mut client = proven(0);
        assert_eq!(client.take_recheck(RECHECK_MS - 1), None);
        assert_eq!(client.take_recheck(RECHECK_MS).as_deref(), Some("key-1"));
        assert_eq!(client.take_recheck(2 * RECHECK_MS), None, "one at a time");
        client.on_rechecked(None, RECHECK_MS);
        assert_eq!(client.recheck_at_ms, Some(2 * RECHECK_MS));
        client.on_rechecked(Some(Error::new(Code::Unavailable, "the database is away")), RECHECK_MS);
        assert!(!client.session.is_closed());
        client.on_rechecked(Some(Error::new(Code::Unauthenticated, "revoked")), RECHECK_MS);
        assert!(client.session.is_closed() && client.next_timeout_ms().is_none());
    }

    #[test]
    fn nobody_is_let_in_without_a_lookup() {
        let mut client = WireClient::new([1; NONCE_LEN], 0);
        client.on_rechecked(Some(Error::new(Code::Unavailable, "the database is away")), 1);
        assert!(client.session.is_closed());
    }

    #[test]
    fn what_a_host_resets_is_reset_to_the_client() {
        let mut client = Session::client("key-1", b"secret", "test", [1; NONCE_LEN], LIMITS, 0);
        let mut server = WireClient::new([2; NONCE_LEN], 0);
        let carry = |client: &mut Session, server: &mut WireClient| {
            for _ in 0..5 {
                server.session.receive(client.output(), 0);
                client.consume_output(client.output().len());
                client.receive(server.session.output(), 0);
                server.session.consume_output(server.session.output().len());
                if let Some(Event::Authenticate { .. }) = server.session.poll_event() {
                    let verifier = Verifier::new(b"secret", &[3; 16], ITERATIONS);
                    server.session.provide_verifier(Some(verifier), &[0; 32]);
                }
            }
        };
        carry(&mut client, &mut server);
        let stream = client.open(&Health {}, false).expect("ready");
        carry(&mut client, &mut server);
        let (inward, outward) = (Pipe::default(), Pipe::default());
        let spliced = Spliced { task: 1, call: Some(2), is_open: true, inward, outward };
        server.streams.insert(stream, StreamUse::Spliced(Box::new(spliced)));
        server.reset(stream, Code::NotFound as u16, "gone");
        carry(&mut client, &mut server);
        let events: Vec<Event> = std::iter::from_fn(|| client.poll_event()).collect();
        let reset = Event::Reset { stream, code: Code::NotFound as u16, reason: "gone".into() };
        assert_eq!(events.last(), Some(&reset), "{events:?}");
        assert!(server.streams.is_empty() && !server.session.has_stream(stream));
    }

    #[test]
    fn one_team_cannot_take_all() {
        const { assert!(MAX_TEAM_CLIENTS * LIMITS.max_streams as usize * 4 <= crate::hosts::sessions::MAX_CALLS) };
        const { assert!(MAX_TEAM_CLIENTS * 4 <= MAX_WIRE_CLIENTS && MAX_UNPROVEN * 2 <= MAX_WIRE_CLIENTS) };
        assert!(has_room(MAX_WIRE_CLIENTS, MAX_UNPROVEN));
        assert!(!has_room(MAX_WIRE_CLIENTS + 1, 1) && !has_room(MAX_UNPROVEN + 1, MAX_UNPROVEN + 1));
    }
}
