//! The one live wire session to each host, and the calls and streams over it.
//!
//! A session is dialled when it is first needed and again after it was lost; after a failed attempt,
//! calls fail at once with its reason until the next attempt is due. So a call ends with a reply, with
//! an error, or by its timeout, and never hangs.
//!
//! The event loop calls [`Hosts::on_ready`] for readiness, [`Hosts::turn`] once a turn,
//! [`Hosts::handle_timeouts`] at [`Hosts::next_timeout_ms`], and takes every [`Hosts::poll_event`].

mod link;
mod receive;

use super::error::HostError;
use super::reply::{Collector, Reply};
use crate::budget::Budget;
use mio::{Registry, Token};
use std::collections::{BTreeSet, HashMap, VecDeque};
use wire::message::Code;
use wire::reactor::{Link, Timers};
use wire::session::{SendError, Session, StreamId};

/// The most calls and streams to all hosts together.
pub const MAX_CALLS: usize = 4096;
/// The most bytes that the replies of all calls hold while they come in. DATA over it is dropped, and told.
pub const MAX_REPLIES_BYTES: usize = 128 * 1024 * 1024;
/// The time for connecting and the handshake, in milliseconds.
pub const CONNECT_TIMEOUT_MS: u64 = 3_000;
/// The pause after a first failed attempt, in milliseconds; it doubles with each further one.
pub const FIRST_BACKOFF_MS: u64 = 250;
/// The longest pause, in milliseconds.
pub const MAX_BACKOFF_MS: u64 = 4_000;
/// How long a session without calls is kept, in milliseconds.
pub const IDLE_CLOSE_MS: u64 = 600_000;
/// Turns of reading, events and writing for one host before the others have theirs.
const MAX_ROUNDS: usize = 16;

/// What the caller names a call or stream by. Never used twice.
pub type CallId = u64;

/// What came of a call or stream.
#[derive(Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// A call is over.
    Reply {
        /// The call.
        call: CallId,
        /// The reply, or why there is none.
        result: Result<Reply, HostError>,
    },
    /// A stream got a message.
    Message {
        /// The stream.
        call: CallId,
        /// The message's number.
        kind: u16,
        /// The message's body.
        body: Vec<u8>,
        /// What to [release](Hosts::release) once it is dealt with.
        cost: u32,
    },
    /// A stream got bytes.
    Data {
        /// The stream.
        call: CallId,
        /// Their channel.
        channel: u8,
        /// The bytes.
        bytes: Vec<u8>,
        /// What to [release](Hosts::release) once they are dealt with.
        cost: u32,
    },
    /// The host ended its half of a stream.
    Finished {
        /// The stream.
        call: CallId,
    },
    /// A stream failed; it is over.
    Failed {
        /// The stream.
        call: CallId,
        /// Why.
        error: HostError,
    },
    /// The host reset a [spliced](Hosts::splice) stream; it is over.
    Reset {
        /// The stream.
        call: CallId,
        /// Why, as a number of [`Code`].
        code: u16,
        /// Why, for a person.
        reason: String,
    },
    /// A stream can be sent to: it is open now, or has room again.
    Writable {
        /// The stream.
        call: CallId,
    },
}

/// What to ask a host.
#[derive(Debug)]
pub struct Request {
    /// The host's id.
    pub host_id: String,
    /// Where its agent listens, `IP:PORT`.
    pub address: String,
    /// Encoded messages; the first one opens the stream.
    pub messages: Vec<Vec<u8>>,
    /// Whether our half ends after them.
    pub half_close: bool,
    /// For a call, how long all of it may take; for a stream, how long until the first message. In
    /// milliseconds.
    pub timeout_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum TimerKey {
    /// A call has taken too long.
    Call(CallId),
    /// A session's own timeout.
    Session(Token),
    /// Connecting has taken too long.
    Connect(Token),
    /// A session has been without calls for long.
    Idle(Token),
}

enum Mode {
    /// Gathers a reply.
    Collect(Collector),
    /// Hands on what comes, but errors as failures.
    Stream,
    /// Hands on all that comes, as it came.
    Splice,
}

struct Call {
    host: Token,
    stream: Option<StreamId>,
    request: Request,
    mode: Mode,
    /// Credit of events that were handed out and not released yet. It is the connection's too, so none
    /// of it may be lost with the stream.
    owed: u32,
}

struct Host {
    host_id: String,
    address: String,
    link: Option<Link>,
    is_ready: bool,
    /// Calls that wait for the session.
    waiting: VecDeque<CallId>,
    streams: HashMap<StreamId, CallId>,
    backoff_ms: u64,
    /// The last attempt failed: not before this time again, and why.
    failed: Option<(u64, String)>,
}

/// All sessions.
pub struct Hosts {
    registry: Registry,
    jwt_secret: Vec<u8>,
    first_token: usize,
    next_token: usize,
    tokens: HashMap<String, Token>,
    hosts: HashMap<Token, Host>,
    calls: HashMap<CallId, Call>,
    replies: Budget,
    timers: Timers<TimerKey>,
    dirty: BTreeSet<Token>,
    events: VecDeque<HostEvent>,
    /// The time of the present turn.
    now_ms: u64,
    is_closing: bool,
}

impl std::fmt::Debug for Hosts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hosts")
            .field("hosts", &self.hosts.len())
            .field("calls", &self.calls.len())
            .finish_non_exhaustive()
    }
}

impl Hosts {
    /// No sessions yet. Their tokens are `first_token` and those above.
    pub fn new(registry: Registry, first_token: usize, jwt_secret: &[u8]) -> Hosts {
        Hosts {
            registry,
            jwt_secret: jwt_secret.to_vec(),
            first_token,
            next_token: first_token,
            tokens: HashMap::new(),
            hosts: HashMap::new(),
            calls: HashMap::new(),
            replies: Budget::new(MAX_REPLIES_BYTES),
            timers: Timers::default(),
            dirty: BTreeSet::new(),
            events: VecDeque::new(),
            now_ms: 0,
            is_closing: false,
        }
    }

    /// Starts a call: one [`HostEvent::Reply`] follows.
    pub fn call(
        &mut self,
        call: CallId,
        request: Request,
        last_kinds: Vec<u16>,
        max_data_bytes: usize,
        now_ms: u64,
    ) {
        let collector = Collector::new(last_kinds, max_data_bytes, self.replies.share());
        self.start(call, request, Mode::Collect(collector), now_ms);
    }

    /// Opens a stream. `Writable` follows when it is open, `Failed` when it cannot be.
    pub fn open(&mut self, call: CallId, request: Request, now_ms: u64) {
        self.start(call, request, Mode::Stream, now_ms);
    }

    /// Opens a stream that is one with a client's: errors and resets are handed on as they came, and once
    /// it is open the request's timeout means nothing more. `Writable` follows when it is open, `Failed`
    /// when it cannot be or its session is lost.
    pub fn splice(&mut self, call: CallId, request: Request, now_ms: u64) {
        self.start(call, request, Mode::Splice, now_ms);
    }

    fn start(&mut self, call: CallId, request: Request, mode: Mode, now_ms: u64) {
        let fail = |mode: Mode, error| match mode {
            Mode::Collect(_) => HostEvent::Reply { call, result: Err(error) },
            Mode::Stream | Mode::Splice => HostEvent::Failed { call, error },
        };
        if self.is_closing {
            self.events.push_back(fail(mode, HostError::ShuttingDown));
            return;
        }
        if self.calls.len() >= MAX_CALLS {
            self.events.push_back(fail(mode, HostError::Busy));
            return;
        }
        let token = self.host(&request.host_id, &request.address);
        self.timers.set(TimerKey::Call(call), now_ms.saturating_add(request.timeout_ms));
        self.timers.clear(TimerKey::Idle(token));
        self.calls.insert(call, Call { host: token, stream: None, request, mode, owed: 0 });
        let Some(host) = self.hosts.get_mut(&token) else { return };
        host.waiting.push_back(call);
        self.dirty.insert(token);
        if host.link.is_some() {
            return;
        }
        if let Some((_, reason)) = host.failed.as_ref().filter(|(until, _)| now_ms < *until) {
            let reason = reason.clone();
            self.fail_calls(token, &reason);
        } else if let Err(reason) = self.dial(token, now_ms) {
            self.attempt_failed(token, &reason, now_ms);
        }
    }

    /// The host's entry. A session to an address that is not the host's any more is given up.
    fn host(&mut self, host_id: &str, address: &str) -> Token {
        let token = match self.tokens.get(host_id) {
            Some(token) => *token,
            None => {
                let token = Token(self.next_token);
                self.next_token += 1;
                self.tokens.insert(host_id.to_string(), token);
                token
            }
        };
        if self.hosts.get(&token).is_some_and(|h| h.address != address) {
            self.close_session(token, "the host has a new address");
            self.hosts.remove(&token);
        }
        self.hosts.entry(token).or_insert_with(|| Host {
            host_id: host_id.to_string(),
            address: address.to_string(),
            link: None,
            is_ready: false,
            waiting: VecDeque::new(),
            streams: HashMap::new(),
            backoff_ms: 0,
            failed: None,
        });
        token
    }

    /// Whether a readiness token is one of a session.
    pub fn owns(&self, token: Token) -> bool {
        token.0 >= self.first_token
    }

    /// The poll says what a session's transport is ready for.
    pub fn on_ready(&mut self, token: Token, readable: bool, writable: bool) {
        if let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) {
            link.socket.on_ready(readable, writable);
            self.dirty.insert(token);
        }
    }

    /// Reads, handles and writes for every session that has something to do. Returns whether some have
    /// more, so that the loop does not sleep.
    pub fn turn(&mut self, now_ms: u64) -> bool {
        for token in std::mem::take(&mut self.dirty) {
            self.drive(token, now_ms);
        }
        !self.dirty.is_empty()
    }

    /// Ends a call with the reply that it has gathered.
    fn complete(&mut self, id: CallId) {
        let Some(call) = self.remove(id, Code::Cancelled, "the reply is complete") else { return };
        if let Mode::Collect(collector) = call.mode {
            self.events.push_back(HostEvent::Reply { call: id, result: Ok(collector.into_reply()) });
        }
    }

    /// Ends a call or stream with an error.
    fn end(&mut self, id: CallId, result: Result<Reply, HostError>) {
        let Some(call) = self.remove(id, Code::Cancelled, "the request is over") else { return };
        self.events.push_back(match (call.mode, result) {
            (Mode::Collect(_), result) => HostEvent::Reply { call: id, result },
            (Mode::Stream | Mode::Splice, Err(error)) => HostEvent::Failed { call: id, error },
            (Mode::Stream | Mode::Splice, Ok(_)) => HostEvent::Finished { call: id },
        });
    }

    /// Forgets a call; its stream, if it is still open in any half, is reset.
    fn remove(&mut self, id: CallId, code: Code, reason: &str) -> Option<Call> {
        let call = self.calls.remove(&id)?;
        self.timers.clear(TimerKey::Call(id));
        if let Some(host) = self.hosts.get_mut(&call.host) {
            host.waiting.retain(|w| *w != id);
            if let Some(stream) = call.stream {
                host.streams.remove(&stream);
                if let Some(link) = &mut host.link {
                    link.session.reset(stream, code, reason);
                    link.session.release(0, call.owed);
                    self.dirty.insert(call.host);
                }
            }
            if host.streams.is_empty() && host.waiting.is_empty() {
                self.timers.set(TimerKey::Idle(call.host), self.now_ms + IDLE_CLOSE_MS);
            }
        }
        Some(call)
    }

    /// Ends a call or stream without an event. What runs in the guest for it is ended.
    pub fn cancel(&mut self, call: CallId) {
        self.remove(call, Code::Cancelled, "the client went away");
    }

    /// Sends an encoded message on a stream.
    ///
    /// # Errors
    /// When the stream is over, or too much waits on it.
    pub fn send(&mut self, call: CallId, message: Vec<u8>) -> Result<(), SendError> {
        self.with_stream(call, |session, stream| session.send_raw(stream, message, false))
            .unwrap_or(Err(SendError::NoStream))
    }

    /// Sends bytes on a stream, as many as there is room for, which is the number returned. When that is
    /// less than all, `Writable` tells when to go on.
    ///
    /// # Errors
    /// When the stream is over or our half has ended.
    pub fn send_data(&mut self, call: CallId, channel: u8, bytes: &[u8]) -> Result<usize, SendError> {
        self.with_stream(call, |session, stream| session.send_data(stream, channel, bytes))
            .unwrap_or(Err(SendError::NoStream))
    }

    /// Ends our half of a stream.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn finish(&mut self, call: CallId) -> Result<(), SendError> {
        self.with_stream(call, Session::finish).unwrap_or(Err(SendError::NoStream))
    }

    /// Gives back the credit of an event that is dealt with. What is not given back when its stream is
    /// over goes back then.
    pub fn release(&mut self, call: CallId, cost: u32) {
        let Some(state) = self.calls.get_mut(&call) else { return };
        let cost = cost.min(state.owed);
        state.owed -= cost;
        self.with_stream(call, |session, stream| session.release(stream, cost));
    }

    fn with_stream<T>(&mut self, call: CallId, act: impl FnOnce(&mut Session, StreamId) -> T) -> Option<T> {
        let call = self.calls.get(&call)?;
        let link = self.hosts.get_mut(&call.host)?.link.as_mut()?;
        let result = act(&mut link.session, call.stream?);
        self.dirty.insert(call.host);
        Some(result)
    }

    /// What came of the calls, in order.
    pub fn poll_event(&mut self) -> Option<HostEvent> {
        self.events.pop_front()
    }

    /// Whether events wait to be polled.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty() || !self.dirty.is_empty()
    }

    /// When [`Hosts::handle_timeouts`] is due.
    pub fn next_timeout_ms(&self) -> Option<u64> {
        self.timers.next_ms()
    }

    /// Does what is due.
    pub fn handle_timeouts(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        while let Some(key) = self.timers.pop_due(now_ms) {
            match key {
                TimerKey::Call(id) => {
                    let after_ms = self.calls.get(&id).map_or(0, |c| c.request.timeout_ms);
                    self.end(id, Err(HostError::TimedOut { after_ms }));
                }
                TimerKey::Connect(token) => {
                    let seconds = CONNECT_TIMEOUT_MS / 1000;
                    self.session_ended(token, &format!("no session within {seconds} s"), now_ms);
                }
                TimerKey::Session(token) => {
                    if let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) {
                        link.session.handle_timeout(now_ms);
                        self.dirty.insert(token);
                    }
                }
                TimerKey::Idle(token) => {
                    if self.hosts.get(&token).is_some_and(|h| h.streams.is_empty() && h.waiting.is_empty()) {
                        self.close_session(token, "it was not used");
                        if let Some(host) = self.hosts.remove(&token) {
                            self.tokens.remove(&host.host_id);
                        }
                    }
                }
            }
        }
    }

    /// Ends every session; calls under way fail.
    pub fn close(&mut self) {
        self.is_closing = true;
        let tokens: Vec<Token> = self.hosts.keys().copied().collect();
        for token in tokens {
            self.close_session(token, "the control plane is being shut down");
        }
    }
}
