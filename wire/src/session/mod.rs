//! One connection, sans-I/O: the bytes of a transport and a clock go in, events come out, and what is
//! to be sent is fetched from [`Session::output`].
//!
//! The shell's loop: give what was read to [`Session::receive`]; take every [`Session::poll_event`];
//! write [`Session::output`] and say how much went with [`Session::consume_output`] (which may make new
//! `Writable` events); call [`Session::handle_timeout`] at [`Session::next_timeout_ms`]. When the
//! session [is closed](Session::is_closed) and its output is written, close the transport.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

mod handshake;
mod mac;
mod receive;
mod send;
mod stream;
#[cfg(test)]
mod tests;
mod types;

pub use handshake::{Hello, MAX_HANDSHAKE_PAYLOAD, MAX_NAME, MAX_WINDOW, MIN_WINDOW, VERSION};
pub use types::{Event, Limits, OpenError, SendError, SessionError};

use crate::auth::{ClientExchange, NONCE_LEN, Verifier};
use crate::frame::{FRAME_CHARGE, FrameType, PREAMBLE};
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use handshake::Phase;
use mac::FrameMac;
use sha2::{Digest, Sha256};
use stream::{Pool, Stream, Want};

/// A stream's number on its connection.
pub type StreamId = u32;

/// Bytes of output above which a session takes no more data, so that a keystroke never waits behind
/// more than this.
pub const OUTPUT_SOFT_LIMIT: usize = 128 * 1024;
/// Room above the soft limit for writes of at most [`SMALL_WRITE`] bytes.
pub const OUTPUT_RESERVE: usize = 16 * 1024;
/// The longest write that may use the reserve, in bytes.
pub const SMALL_WRITE: usize = 1024;
/// Bytes of output at which a session gives up on a peer that does not read.
pub const OUTPUT_HARD_LIMIT: usize = 1024 * 1024;
/// The longest run of data in one frame, in bytes.
pub const MAX_DATA: usize = 32 * 1024;
/// Bytes of messages that a stream may have waiting for credit.
pub const MAX_QUEUED: usize = 256 * 1024;
/// Time for the whole handshake.
pub const HANDSHAKE_TIMEOUT_MS: u64 = 10_000;
/// Silence after which the peer is asked for a sign of life.
pub const PING_AFTER_MS: u64 = 15_000;
/// Silence after which the peer is taken for dead.
pub const DEAD_AFTER_MS: u64 = 45_000;
/// What a DATA frame costs beyond its bytes: the charge of a frame, and the channel.
const DATA_OVERHEAD: u64 = FRAME_CHARGE as u64 + 1;
/// Capacity that an empty buffer may keep on an idle connection, in bytes.
const IDLE_BUFFER: usize = 4096;

/// One side of a connection.
pub struct Session {
    is_client: bool,
    limits: Limits,
    name: String,
    nonce: [u8; NONCE_LEN],
    client_secret: Option<(String, Vec<u8>)>,
    phase: Phase,
    identity: String,
    peer: Option<Hello>,
    draining: bool,
    peer_draining: bool,
    input: Vec<u8>,
    output: Vec<u8>,
    output_sent: usize,
    events: VecDeque<Event>,
    send_mac: Option<FrameMac>,
    recv_mac: Option<FrameMac>,
    streams: BTreeMap<StreamId, Stream>,
    /// Streams with messages that wait.
    queued: BTreeSet<StreamId>,
    /// Streams of this side whose `OPEN` waits.
    unopened: BTreeSet<StreamId>,
    /// Where the next turn of waiting messages begins.
    served: StreamId,
    /// The last stream of this side whose `OPEN` was sent.
    last_opened: StreamId,
    /// Streams whose application waits for room, in the order of their turns.
    line: VecDeque<StreamId>,
    next_stream: StreamId,
    last_peer_stream: StreamId,
    own_open: u32,
    peer_open: u32,
    send_credit: u64,
    recv_left: u64,
    unreturned: u64,
    started_ms: u64,
    heard_ms: u64,
    pinged: bool,
}

impl Session {
    /// The dialling side. `identity` and `secret` are proven to the server and never sent; `name` is
    /// program and version, for logs; `nonce` is fresh random bytes.
    pub fn client(
        identity: &str,
        secret: &[u8],
        name: &str,
        nonce: [u8; NONCE_LEN],
        limits: Limits,
        now_ms: u64,
    ) -> Session {
        let mut session = Session::new(true, name, nonce, limits, now_ms);
        session.client_secret = Some((identity.to_string(), secret.to_vec()));
        session.output.extend_from_slice(&PREAMBLE);
        let mut hash = Sha256::new();
        hash.update(PREAMBLE);
        let hello = session.hello(VERSION, VERSION, 0).encode();
        let at = session.output.len();
        session.write_frame(FrameType::Hello, 0, false, &[&hello]);
        hash.update(&session.output[at..]);
        session.phase = Phase::AwaitHello(hash);
        session
    }

    /// The accepting side. `name` is program and version, for logs; `nonce` is fresh random bytes.
    pub fn server(name: &str, nonce: [u8; NONCE_LEN], limits: Limits, now_ms: u64) -> Session {
        Session::new(false, name, nonce, limits, now_ms)
    }

    fn new(is_client: bool, name: &str, nonce: [u8; NONCE_LEN], limits: Limits, now_ms: u64) -> Session {
        let limits = Limits {
            stream_window: limits.stream_window.clamp(MIN_WINDOW, MAX_WINDOW),
            connection_window: limits.connection_window.clamp(MIN_WINDOW, MAX_WINDOW),
            max_streams: limits.max_streams,
        };
        let mut name = name.to_string();
        name.truncate((0..=MAX_NAME.min(name.len())).rev().find(|n| name.is_char_boundary(*n)).unwrap_or(0));
        Session {
            is_client,
            limits,
            name,
            nonce,
            client_secret: None,
            phase: Phase::AwaitPreamble,
            identity: String::new(),
            peer: None,
            draining: false,
            peer_draining: false,
            input: Vec::new(),
            output: Vec::new(),
            output_sent: 0,
            events: VecDeque::new(),
            send_mac: None,
            recv_mac: None,
            streams: BTreeMap::new(),
            queued: BTreeSet::new(),
            unopened: BTreeSet::new(),
            served: 0,
            last_opened: 0,
            line: VecDeque::new(),
            next_stream: if is_client { 1 } else { 2 },
            last_peer_stream: 0,
            own_open: 0,
            peer_open: 0,
            send_credit: 0,
            recv_left: u64::from(limits.connection_window),
            unreturned: 0,
            started_ms: now_ms,
            heard_ms: now_ms,
            pinged: false,
        }
    }

    fn hello(&self, min_version: u16, max_version: u16, features: u64) -> Hello {
        Hello {
            min_version,
            max_version,
            features,
            stream_window: self.limits.stream_window,
            connection_window: self.limits.connection_window,
            max_streams: self.limits.max_streams,
            name: self.name.clone(),
        }
    }

    /// Answers [`Event::Authenticate`]. `None` lets an unknown identity fail like a wrong secret;
    /// `decoy_key` is a secret of the server's own that makes the two look the same.
    pub fn provide_verifier(&mut self, verifier: Option<Verifier>, decoy_key: &[u8]) {
        match core::mem::replace(&mut self.phase, Phase::Closed) {
            Phase::AwaitVerifier(mut exchange) => {
                let verifier = verifier.unwrap_or_else(|| Verifier::decoy(decoy_key, exchange.identity()));
                let challenge = exchange.challenge(verifier, self.nonce);
                self.write_frame(FrameType::Auth, 0, false, &[challenge.as_bytes()]);
                self.phase = Phase::AwaitProof(exchange);
                self.parse_input();
            }
            // The session ended while the verifier was looked up.
            other => self.phase = other,
        }
    }

    /// Takes bytes from the transport.
    pub fn receive(&mut self, bytes: &[u8], now_ms: u64) {
        if self.is_closed() || bytes.is_empty() {
            return;
        }
        self.heard_ms = now_ms;
        self.pinged = false;
        let bytes = self.complete_frame(bytes);
        if self.is_closed() {
            return;
        }
        if self.input.is_empty() {
            let used = self.parse(bytes);
            self.input.extend_from_slice(&bytes[used..]);
        } else {
            self.input.extend_from_slice(bytes);
            self.parse_input();
        }
        if matches!(self.phase, Phase::AwaitVerifier(_)) && self.input.len() > MAX_HANDSHAKE_PAYLOAD {
            self.fail(SessionError::Unexpected("bytes before the authentication went on"));
        }
    }

    /// The transport ended.
    pub fn transport_closed(&mut self) {
        self.end(SessionError::TransportClosed);
    }

    /// The next event. After the last one there may be new output.
    pub fn poll_event(&mut self) -> Option<Event> {
        if let Some(event) = self.events.pop_front() {
            if let Event::Opened { body, .. } = &event {
                // The peer's stream limit bounds these, so their credit goes back at once.
                let cost = body.len() as u32 + 2 + FRAME_CHARGE;
                self.release(0, cost);
            }
            return Some(event);
        }
        self.next_in_line()
    }

    /// Lets the stream whose turn it is write, if there is room and credit.
    fn next_in_line(&mut self) -> Option<Event> {
        let mut turns = self.line.len();
        while turns > 0 && self.pending_output() < OUTPUT_SOFT_LIMIT {
            turns -= 1;
            let pool = self.send_pool();
            let stream = self.line.pop_front()?;
            let Some(s) = self.streams.get_mut(&stream) else { continue };
            s.is_lined_up = false;
            if s.want != Want::InLine {
                continue;
            }
            if s.send_credit <= DATA_OVERHEAD || !s.queue.is_empty() {
                s.want = Want::Credit;
                continue;
            }
            if s.allowance(pool) <= DATA_OVERHEAD {
                // Its turn comes when others have given credit back; those behind it go on.
                self.line_up(stream);
                continue;
            }
            s.want = Want::Nothing;
            return Some(Event::Writable { stream });
        }
        None
    }

    /// The connection's credit on the sending side.
    fn send_pool(&self) -> Pool {
        let window = self.peer.as_ref().map_or(0, |p| u64::from(p.connection_window));
        Pool { left: self.send_credit, window }
    }

    /// Puts a stream whose application waits at the end of the line.
    fn line_up(&mut self, stream: StreamId) {
        if let Some(s) = self.streams.get_mut(&stream) {
            s.want = Want::InLine;
            if !s.is_lined_up {
                s.is_lined_up = true;
                self.line.push_back(stream);
            }
        }
    }

    /// What is to be written to the transport.
    pub fn output(&self) -> &[u8] {
        &self.output[self.output_sent..]
    }

    fn pending_output(&self) -> usize {
        self.output.len() - self.output_sent
    }

    /// `n` bytes of the output were written. Poll for events afterwards: streams may go on.
    pub fn consume_output(&mut self, n: usize) {
        assert!(n <= self.pending_output(), "more consumed than there was");
        self.output_sent += n;
        if self.output_sent == self.output.len() {
            self.output.clear();
            self.output_sent = 0;
        } else if self.output_sent >= OUTPUT_SOFT_LIMIT {
            self.output.drain(..self.output_sent);
            self.output_sent = 0;
        }
        self.flush();
    }

    /// When [`Session::handle_timeout`] is due, in the caller's milliseconds. `None` once closed.
    pub fn next_timeout_ms(&self) -> Option<u64> {
        match self.phase {
            Phase::Closed => None,
            Phase::Open if self.pinged => Some(self.heard_ms + DEAD_AFTER_MS),
            Phase::Open => Some(self.heard_ms + PING_AFTER_MS),
            _ => Some(self.started_ms + HANDSHAKE_TIMEOUT_MS),
        }
    }

    /// Does what is due at `now_ms`.
    pub fn handle_timeout(&mut self, now_ms: u64) {
        match self.phase {
            Phase::Closed => {}
            Phase::Open => {
                if now_ms >= self.heard_ms + DEAD_AFTER_MS {
                    self.fail(SessionError::PeerSilent);
                } else if now_ms >= self.heard_ms + PING_AFTER_MS && !self.pinged {
                    self.pinged = true;
                    self.write_frame(FrameType::Ping, 0, false, &[&now_ms.to_be_bytes()]);
                    self.shrink();
                }
            }
            _ => {
                if now_ms >= self.started_ms + HANDSHAKE_TIMEOUT_MS {
                    self.fail(SessionError::HandshakeTimeout);
                }
            }
        }
    }

    /// Gives an idle connection's memory back.
    fn shrink(&mut self) {
        if self.input.is_empty() && self.input.capacity() > IDLE_BUFFER {
            self.input = Vec::new();
        }
        if self.events.is_empty() {
            self.events.shrink_to(8);
        }
        self.output.shrink_to(IDLE_BUFFER);
    }

    /// Whether the session is over. Its output is still to be written.
    pub fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed)
    }

    /// Whether streams can be opened.
    pub fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    /// Streams that are open, from both sides.
    pub fn stream_count(&self) -> usize {
        self.streams.len()
    }

    /// Whether a stream is open in any half.
    pub fn has_stream(&self, stream: StreamId) -> bool {
        self.streams.contains_key(&stream)
    }

    /// Bytes of messages that wait on a stream; none when it is gone.
    pub fn queued_bytes(&self, stream: StreamId) -> usize {
        self.streams.get(&stream).map_or(0, |s| s.queued_bytes)
    }

    /// Bytes held in buffers, events and queues.
    pub fn buffered_bytes(&self) -> usize {
        let events: usize = self
            .events
            .iter()
            .map(|e| match e {
                Event::Opened { body, .. } | Event::Message { body, .. } => body.len(),
                Event::Data { bytes, .. } => bytes.len(),
                _ => 0,
            })
            .sum();
        let queues: usize = self.streams.values().map(|s| s.queued_bytes).sum();
        self.input.len() + self.pending_output() + events + queues
    }

    fn forget_if_done(&mut self, stream: StreamId) {
        if self.streams.get(&stream).is_some_and(Stream::is_done) {
            self.forget(stream);
        }
    }

    fn forget(&mut self, stream: StreamId) {
        if let Some(s) = self.streams.remove(&stream) {
            self.queued.remove(&stream);
            self.unopened.remove(&stream);
            if s.is_lined_up {
                self.line.retain(|id| *id != stream);
            }
            if self.is_own(stream) {
                self.own_open -= 1;
            } else {
                self.peer_open -= 1;
            }
        }
    }

    /// Whether a stream was ever opened on the wire, by either side.
    fn was_opened(&self, stream: StreamId) -> bool {
        stream <= if self.is_own(stream) { self.last_opened } else { self.last_peer_stream }
    }

    fn is_own(&self, stream: StreamId) -> bool {
        (stream % 2 == 1) == self.is_client
    }

    fn start_exchange(&mut self, binding: [u8; 32]) {
        let Some((identity, secret)) = self.client_secret.take() else { return };
        match ClientExchange::start(&identity, &secret, self.nonce, binding) {
            Ok((exchange, first)) => {
                self.identity = identity;
                self.write_frame(FrameType::Auth, 0, false, &[first.as_bytes()]);
                self.phase = Phase::AwaitChallenge(exchange);
            }
            Err(e) => self.fail(SessionError::Auth(e)),
        }
    }
}
