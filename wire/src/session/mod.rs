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
mod stream;
#[cfg(test)]
mod tests;

pub use handshake::{Hello, MAX_HANDSHAKE_PAYLOAD, MAX_NAME, MAX_WINDOW, MIN_WINDOW, VERSION};

use crate::auth::{AuthError, ClientExchange, NONCE_LEN, Verifier};
use crate::codec::{DecodeError, Field};
use crate::frame::{FRAME_CHARGE, FrameType, HEADER_LEN, Header, HeaderError, MAX_PAYLOAD, PREAMBLE};
use crate::message::{Code, Message};
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use core::fmt;
use handshake::Phase;
use mac::FrameMac;
use sha2::{Digest, Sha256};
use stream::{Pool, Queued, Stream, Want, charge};

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

/// What a session offers its peer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes that the peer may have under way on a stream.
    pub stream_window: u32,
    /// Bytes that the peer may have under way on all streams together.
    pub connection_window: u32,
    /// Streams that the peer may have open at once.
    pub max_streams: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { stream_window: 256 * 1024, connection_window: 2 * 1024 * 1024, max_streams: 4096 }
    }
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionError {
    /// The first bytes are not this protocol's.
    NotWrenn,
    /// No version is spoken by both sides.
    NoCommonVersion,
    /// A frame header is malformed.
    Header(HeaderError),
    /// A connection-level payload is malformed.
    Payload(DecodeError),
    /// A frame's MAC is wrong: the byte stream was changed, replayed or reordered.
    Integrity,
    /// Authentication failed.
    Auth(AuthError),
    /// A frame came that the state does not allow.
    Unexpected(&'static str),
    /// The peer sent more than its credit.
    CreditExceeded,
    /// The peer has more streams open than it may.
    TooManyStreams,
    /// The peer does not read what it is sent.
    PeerDoesNotRead,
    /// The handshake took too long.
    HandshakeTimeout,
    /// The peer has been silent for too long.
    PeerSilent,
    /// The peer ended the connection, with a code and its reason.
    ByPeer(u16, String),
    /// The transport ended.
    TransportClosed,
    /// This side ended it.
    Local,
}

impl fmt::Display for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionError::NotWrenn => f.write_str("the peer does not speak the Wrenn wire protocol"),
            SessionError::NoCommonVersion => {
                f.write_str("no protocol version is spoken by both sides: upgrade the older one")
            }
            SessionError::Header(e) => write!(f, "{e}"),
            SessionError::Payload(e) => write!(f, "a connection frame is malformed: {e}"),
            SessionError::Integrity => f.write_str("a frame was changed, replayed or reordered on its way"),
            SessionError::Auth(e) => write!(f, "{e}"),
            SessionError::Unexpected(what) => write!(f, "unexpected {what}"),
            SessionError::CreditExceeded => f.write_str("the peer sent more than its credit"),
            SessionError::TooManyStreams => f.write_str("the peer opened more streams than it may"),
            SessionError::PeerDoesNotRead => f.write_str("the peer does not read what it is sent"),
            SessionError::HandshakeTimeout => f.write_str("the handshake took too long"),
            SessionError::PeerSilent => f.write_str("the peer has been silent for too long"),
            SessionError::ByPeer(code, reason) => {
                // The reason may come from a peer that has proven nothing, and goes into logs.
                let reason = reason.replace(char::is_control, "\u{fffd}");
                write!(f, "closed by the peer: {}: {reason}", Code::from_number(*code).name())
            }
            SessionError::TransportClosed => f.write_str("the connection was closed"),
            SessionError::Local => f.write_str("closed by this side"),
        }
    }
}

impl core::error::Error for SessionError {}

impl SessionError {
    /// The code told to the peer.
    fn code(&self) -> Code {
        match self {
            SessionError::Integrity => Code::Integrity,
            SessionError::Auth(_) => Code::Unauthenticated,
            SessionError::PeerDoesNotRead => Code::ResourceExhausted,
            SessionError::HandshakeTimeout | SessionError::PeerSilent => Code::DeadlineExceeded,
            SessionError::Local => Code::ShuttingDown,
            _ => Code::Protocol,
        }
    }
}

/// What a session has to tell its application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Server: somebody claims this identity; answer with [`Session::provide_verifier`].
    Authenticate {
        /// The claimed identity, not yet proven.
        identity: String,
    },
    /// The handshake is done; streams may be opened.
    Ready {
        /// Who the client is, proven; on the client, its own identity.
        identity: String,
        /// The peer's program and version.
        peer_name: String,
    },
    /// The peer opened a stream with a message.
    Opened {
        /// The stream.
        stream: StreamId,
        /// The message's number.
        kind: u16,
        /// The message's body.
        body: Vec<u8>,
    },
    /// A further message.
    Message {
        /// The stream.
        stream: StreamId,
        /// The message's number.
        kind: u16,
        /// The message's body.
        body: Vec<u8>,
        /// What to [release](Session::release) once it is dealt with.
        cost: u32,
    },
    /// Raw bytes.
    Data {
        /// The stream.
        stream: StreamId,
        /// Which of the stream's channels.
        channel: u8,
        /// The bytes, at least one.
        bytes: Vec<u8>,
        /// What to [release](Session::release) once they are dealt with.
        cost: u32,
    },
    /// The peer ended its half.
    Finished {
        /// The stream.
        stream: StreamId,
    },
    /// The peer ended the stream at once.
    Reset {
        /// The stream.
        stream: StreamId,
        /// Why, see [`Code`].
        code: u16,
        /// Why, for a person.
        reason: String,
    },
    /// Data can be sent again on a stream where less than all was taken.
    Writable {
        /// The stream.
        stream: StreamId,
    },
    /// The peer takes no new streams; those open go on.
    GoingAway {
        /// Why, see [`Code`].
        code: u16,
        /// Why, for a person.
        reason: String,
    },
    /// The session is over; every stream with it.
    Closed {
        /// Why.
        error: SessionError,
    },
}

/// Why a stream cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenError {
    /// The handshake is not done, or the session is over.
    NotReady,
    /// The peer takes no new streams.
    GoingAway,
    /// The peer's limit of open streams is reached; try again when one has ended.
    TooManyStreams,
    /// All stream numbers are used; the connection has to be made anew.
    Exhausted,
    /// The message is longer than a frame.
    TooLong,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OpenError::NotReady => "the connection is not ready",
            OpenError::GoingAway => "the peer is shutting down",
            OpenError::TooManyStreams => "too many streams are open on the connection",
            OpenError::Exhausted => "the connection has used all its stream numbers",
            OpenError::TooLong => "the message is longer than a frame can be",
        })
    }
}

impl core::error::Error for OpenError {}

/// Why a message cannot be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendError {
    /// The stream is not open, or this half of it has ended.
    NoStream,
    /// Too much waits on the stream already.
    QueueFull,
    /// The message is longer than a frame.
    TooLong,
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SendError::NoStream => "the stream has ended",
            SendError::QueueFull => "too many messages wait on the stream",
            SendError::TooLong => "the message is longer than a frame can be",
        })
    }
}

impl core::error::Error for SendError {}

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

    /// Opens a stream with a message; `fin` ends this side's half with it.
    pub fn open<M: Message>(&mut self, message: &M, fin: bool) -> Result<StreamId, OpenError> {
        let mut payload = Vec::new();
        M::KIND.encode(&mut payload);
        message.encode(&mut payload);
        self.open_raw(payload, fin)
    }

    /// Opens a stream with a message that is already encoded (`u16` number, then body).
    pub fn open_raw(&mut self, payload: Vec<u8>, fin: bool) -> Result<StreamId, OpenError> {
        let Some(peer) = self.peer.as_ref().filter(|_| self.is_ready()) else {
            return Err(OpenError::NotReady);
        };
        if self.peer_draining || self.draining {
            return Err(OpenError::GoingAway);
        }
        if payload.len() > MAX_PAYLOAD {
            return Err(OpenError::TooLong);
        }
        if self.own_open >= peer.max_streams {
            return Err(OpenError::TooManyStreams);
        }
        let id = self.next_stream;
        self.next_stream = id.checked_add(2).ok_or(OpenError::Exhausted)?;
        let mut stream = Stream::new(peer.stream_window, self.limits.stream_window);
        stream.queued_bytes = payload.len();
        stream.finishing = fin;
        stream.queue.push_back(Queued { frame_type: FrameType::Open, payload, fin });
        self.streams.insert(id, stream);
        self.own_open += 1;
        self.queued.insert(id);
        self.unopened.insert(id);
        self.flush();
        Ok(id)
    }

    /// Sends a message. It waits inside the session for credit if it must, in order.
    pub fn send<M: Message>(&mut self, stream: StreamId, message: &M) -> Result<(), SendError> {
        self.queue_message(stream, message, false)
    }

    /// Sends a message and ends this side's half with it.
    pub fn send_last<M: Message>(&mut self, stream: StreamId, message: &M) -> Result<(), SendError> {
        self.queue_message(stream, message, true)
    }

    fn queue_message<M: Message>(
        &mut self,
        stream: StreamId,
        message: &M,
        fin: bool,
    ) -> Result<(), SendError> {
        let mut payload = Vec::new();
        M::KIND.encode(&mut payload);
        message.encode(&mut payload);
        self.send_raw(stream, payload, fin)
    }

    /// Sends a message that is already encoded (`u16` number, then body).
    pub fn send_raw(&mut self, stream: StreamId, payload: Vec<u8>, fin: bool) -> Result<(), SendError> {
        let s = self.streams.get_mut(&stream).filter(|s| !s.finishing).ok_or(SendError::NoStream)?;
        if payload.len() > MAX_PAYLOAD {
            return Err(SendError::TooLong);
        }
        if s.queued_bytes + payload.len() > MAX_QUEUED {
            return Err(SendError::QueueFull);
        }
        s.queued_bytes += payload.len();
        s.finishing = fin;
        s.queue.push_back(Queued { frame_type: FrameType::Message, payload, fin });
        self.queued.insert(stream);
        self.flush();
        Ok(())
    }

    /// Sends bytes on a channel: as many as credit and room allow, which is the number returned. When
    /// that is less than all, [`Event::Writable`] tells when to go on.
    pub fn send_data(&mut self, stream: StreamId, channel: u8, bytes: &[u8]) -> Result<usize, SendError> {
        let limit =
            if bytes.len() <= SMALL_WRITE { OUTPUT_SOFT_LIMIT + OUTPUT_RESERVE } else { OUTPUT_SOFT_LIMIT };
        let mut taken = 0;
        while taken < bytes.len() {
            let room = limit.saturating_sub(self.pending_output());
            let pool = self.send_pool();
            let s = self.streams.get_mut(&stream).filter(|s| !s.finishing).ok_or(SendError::NoStream)?;
            // Credit is at most MAX_WINDOW, so it fits.
            let credit = s.allowance(pool).saturating_sub(DATA_OVERHEAD) as usize;
            let n = (bytes.len() - taken).min(MAX_DATA).min(room).min(credit);
            if n == 0 || !s.queue.is_empty() {
                if s.send_credit <= DATA_OVERHEAD || !s.queue.is_empty() {
                    s.want = Want::Credit;
                } else {
                    self.line_up(stream);
                }
                break;
            }
            let cost = n as u64 + DATA_OVERHEAD;
            s.send_credit -= cost;
            self.send_credit -= cost;
            self.write_frame(FrameType::Data, stream, false, &[&[channel], &bytes[taken..taken + n]]);
            taken += n;
        }
        Ok(taken)
    }

    /// Ends this side's half, after everything sent before.
    pub fn finish(&mut self, stream: StreamId) -> Result<(), SendError> {
        let s = self.streams.get_mut(&stream).filter(|s| !s.finishing).ok_or(SendError::NoStream)?;
        s.finishing = true;
        match s.queue.back_mut() {
            Some(last) => last.fin = true,
            None => {
                s.fin_sent = true;
                self.write_frame(FrameType::Data, stream, true, &[]);
                self.forget_if_done(stream);
            }
        }
        Ok(())
    }

    /// Ends a stream at once, both halves. Events of it that were not polled yet are dropped. Does
    /// nothing when the stream has ended already.
    pub fn reset(&mut self, stream: StreamId, code: Code, reason: &str) {
        let Some(s) = self.streams.get(&stream) else { return };
        if !s.is_unopened() {
            let payload = crate::frame::encode_reset(code as u16, reason);
            self.write_frame(FrameType::Reset, stream, false, &[&payload]);
        }
        self.forget(stream);
        let mut returned = 0;
        self.events.retain(|event| match event {
            Event::Message { stream: id, cost, .. } | Event::Data { stream: id, cost, .. }
                if *id == stream =>
            {
                returned += cost;
                false
            }
            Event::Opened { stream: id, body, .. } if *id == stream => {
                returned += body.len() as u32 + 2 + FRAME_CHARGE;
                false
            }
            Event::Finished { stream: id } if *id == stream => false,
            _ => true,
        });
        self.release(0, returned);
        // Its OPEN may have held back those of others.
        self.flush();
    }

    /// Gives back the credit of an event that is dealt with. `stream` may have ended meanwhile; 0 gives
    /// back the connection's credit only.
    pub fn release(&mut self, stream: StreamId, cost: u32) {
        if self.is_closed() {
            return;
        }
        self.unreturned += u64::from(cost);
        let window = self.limits.connection_window;
        let pool = Pool { left: self.recv_left, window: u64::from(window) };
        if pool.is_due(self.unreturned, window) {
            let amount = core::mem::take(&mut self.unreturned);
            self.recv_left += amount;
            self.write_credit(0, amount);
        }
        let Some(s) = self.streams.get_mut(&stream).filter(|s| !s.fin_received) else { return };
        s.unreturned += u64::from(cost);
        if pool.is_due(s.unreturned, self.limits.stream_window) {
            let amount = core::mem::take(&mut s.unreturned);
            s.recv_left += amount;
            self.write_credit(stream, amount);
        }
    }

    fn write_credit(&mut self, stream: StreamId, amount: u64) {
        // A window is at most MAX_WINDOW, and no more than a window is ever given back at once.
        let amount = u32::try_from(amount).unwrap_or(MAX_WINDOW);
        self.write_frame(FrameType::Credit, stream, false, &[&amount.to_be_bytes()]);
    }

    /// Takes no new streams from the peer and opens none; those open go on.
    pub fn drain(&mut self, reason: &str) {
        if self.is_ready() && !self.draining {
            self.draining = true;
            self.write_go_away(Code::ShuttingDown, reason);
        }
    }

    /// Ends the session from this side.
    pub fn close(&mut self) {
        self.fail(SessionError::Local);
    }

    fn write_go_away(&mut self, code: Code, reason: &str) {
        let mut payload = Vec::new();
        self.last_peer_stream.encode(&mut payload);
        payload.extend_from_slice(&crate::frame::encode_reset(code as u16, reason));
        self.write_frame(FrameType::GoAway, 0, false, &[&payload]);
    }

    /// Ends the session and tells the peer why.
    fn fail(&mut self, error: SessionError) {
        if self.is_closed() {
            return;
        }
        if error != SessionError::NotWrenn {
            self.write_go_away(error.code(), &error.to_string());
        }
        self.end(error);
    }

    /// Ends the session without a word.
    fn end(&mut self, error: SessionError) {
        if self.is_closed() {
            return;
        }
        self.phase = Phase::Closed;
        self.streams.clear();
        self.queued.clear();
        self.unopened.clear();
        self.line.clear();
        self.input = Vec::new();
        self.client_secret = None;
        self.events.push_back(Event::Closed { error });
    }

    /// Sends what waits, as far as credit and room allow: one message of each stream after the other,
    /// beginning after the stream that was served last. Streams are opened in the order of their
    /// numbers, so the first `OPEN` that has to wait holds back those after it.
    fn flush(&mut self) {
        while !self.queued.is_empty() {
            let turns: Vec<StreamId> =
                self.queued.range(self.served..).chain(self.queued.range(..self.served)).copied().collect();
            let mut moved = false;
            for id in turns {
                if self.pending_output() >= OUTPUT_SOFT_LIMIT + OUTPUT_RESERVE {
                    return;
                }
                if self.flush_one(id) {
                    moved = true;
                    self.served = id.saturating_add(1);
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// Sends the first message that waits on a stream, if it may go now.
    fn flush_one(&mut self, id: StreamId) -> bool {
        let next_open = self.unopened.first().copied();
        let pool = self.send_pool();
        let Some(s) = self.streams.get_mut(&id) else { return false };
        let Some(front) = s.queue.front() else { return false };
        let is_open = front.frame_type == FrameType::Open;
        let cost = charge(front.payload.len(), front.frame_type);
        if is_open && next_open != Some(id) {
            return false;
        }
        let allowed = if is_open { cost <= pool.left } else { s.allows_message(cost, pool) };
        if !allowed {
            return false;
        }
        let Some(item) = s.queue.pop_front() else { return false };
        s.queued_bytes -= item.payload.len();
        self.send_credit -= cost;
        if is_open {
            self.unopened.remove(&id);
            self.last_opened = id;
        } else {
            s.send_credit -= cost;
        }
        s.fin_sent |= item.fin;
        let is_empty = s.queue.is_empty();
        let goes_on = is_empty && s.want == Want::Credit && s.send_credit > DATA_OVERHEAD;
        self.write_frame(item.frame_type, id, item.fin, &[&item.payload]);
        if is_empty {
            self.queued.remove(&id);
            if goes_on {
                self.line_up(id);
            }
            self.forget_if_done(id);
        }
        true
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

    fn write_frame(&mut self, frame_type: FrameType, stream: StreamId, fin: bool, payload: &[&[u8]]) {
        let length: usize = payload.iter().map(|p| p.len()).sum();
        assert!(length <= MAX_PAYLOAD, "a frame is made only of checked lengths");
        if self.pending_output() > OUTPUT_HARD_LIMIT {
            self.end(SessionError::PeerDoesNotRead);
            return;
        }
        let header = Header { length: length as u32, stream, frame_type, fin }.encode();
        self.output.reserve(HEADER_LEN + length + crate::frame::MAC_LEN);
        self.output.extend_from_slice(&header);
        for part in payload {
            self.output.extend_from_slice(part);
        }
        if let Some(mac) = &mut self.send_mac {
            let frame = &self.output[self.output.len() - HEADER_LEN - length..];
            let tag = mac.next(frame);
            self.output.extend_from_slice(&tag);
        }
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
