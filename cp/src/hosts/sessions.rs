//! The one live wire session to each host, and the calls and streams over it.
//!
//! A session is dialled when it is first needed and again after it was lost; after a failed attempt,
//! calls fail at once with its reason until the next attempt is due. So a call ends with a reply, with
//! an error, or by its timeout, and never hangs.
//!
//! The event loop calls [`Hosts::on_ready`] for readiness, [`Hosts::turn`] once a turn,
//! [`Hosts::handle_timeouts`] at [`Hosts::next_timeout_ms`], and takes every [`Hosts::poll_event`].

use super::credential;
use super::error::HostError;
use super::reply::{Collector, Progress, Reply};
use crate::auth::random;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use wire::message::{Code, Error, Message};
use wire::reactor::{Link, Socket, Timers};
use wire::session::{Event, Limits, OpenError, SendError, Session, SessionError, StreamId};

/// The most calls and streams to all hosts together.
pub const MAX_CALLS: usize = 4096;
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
    /// Hands on what comes.
    Stream,
}

struct Call {
    host: Token,
    stream: Option<StreamId>,
    request: Request,
    mode: Mode,
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
    timers: Timers<TimerKey>,
    dirty: BTreeSet<Token>,
    events: VecDeque<HostEvent>,
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
            timers: Timers::default(),
            dirty: BTreeSet::new(),
            events: VecDeque::new(),
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
        self.start(call, request, Mode::Collect(Collector::new(last_kinds, max_data_bytes)), now_ms);
    }

    /// Opens a stream. `Writable` follows when it is open, `Failed` when it cannot be.
    pub fn open(&mut self, call: CallId, request: Request, now_ms: u64) {
        self.start(call, request, Mode::Stream, now_ms);
    }

    fn start(&mut self, call: CallId, request: Request, mode: Mode, now_ms: u64) {
        let fail = |mode: Mode, error| match mode {
            Mode::Collect(_) => HostEvent::Reply { call, result: Err(error) },
            Mode::Stream => HostEvent::Failed { call, error },
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
        self.calls.insert(call, Call { host: token, stream: None, request, mode });
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

    fn dial(&mut self, token: Token, now_ms: u64) -> Result<(), String> {
        let Some(host) = self.hosts.get_mut(&token) else { return Ok(()) };
        let address: SocketAddr =
            host.address.parse().map_err(|_| "its address is not IP:PORT".to_string())?;
        let mut stream = TcpStream::connect(address).map_err(|e| reason_of(&e))?;
        self.registry
            .register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)
            .map_err(|e| reason_of(&e))?;
        let secret = credential::credential(&self.jwt_secret, &host.host_id);
        let session = Session::client(
            credential::IDENTITY,
            secret.as_bytes(),
            concat!("wrenn-cp/", env!("CARGO_PKG_VERSION")),
            random::bytes(),
            Limits::default(),
            now_ms,
        );
        host.link = Some(Link::new(Socket::connecting(stream), session));
        host.is_ready = false;
        self.timers.set(TimerKey::Connect(token), now_ms + CONNECT_TIMEOUT_MS);
        log::debug!("host {}: dialling {address}", host.host_id);
        Ok(())
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

    fn drive(&mut self, token: Token, now_ms: u64) {
        for _ in 0..MAX_ROUNDS {
            let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) else { return };
            if !link.socket.is_writable() && !link.socket.is_readable() {
                break;
            }
            if let Ok(Some(error)) = link.socket.stream.take_error() {
                self.session_ended(token, &reason_of(&error), now_ms);
                return;
            }
            link.read(now_ms);
            let mut had_events = false;
            while let Some(event) =
                self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()).and_then(|l| l.session.poll_event())
            {
                had_events = true;
                self.on_event(token, event, now_ms);
            }
            self.start_waiting(token);
            let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) else { return };
            let wrote = link.flush();
            if !had_events && !wrote && !link.is_readable() {
                break;
            }
        }
        let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) else { return };
        if link.is_readable() {
            self.dirty.insert(token);
        }
        self.timers.update(TimerKey::Session(token), link.session.next_timeout_ms());
    }

    fn on_event(&mut self, token: Token, event: Event, now_ms: u64) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        match event {
            Event::Ready { peer_name, .. } => {
                log::info!("host {}: session with {peer_name} at {}", host.host_id, host.address);
                host.is_ready = true;
                host.backoff_ms = 0;
                host.failed = None;
                self.timers.clear(TimerKey::Connect(token));
            }
            Event::Message { stream, kind, body, cost } => self.on_message(token, stream, kind, body, cost),
            Event::Data { stream, channel, bytes, cost } => {
                self.on_data(token, stream, channel, bytes, cost);
            }
            Event::Finished { stream } => self.on_finished(token, stream),
            Event::Reset { stream, code, reason } => {
                if let Some(call) = host.streams.remove(&stream) {
                    let error = Error::new(Code::from_number(code), reason);
                    self.end(call, Err(HostError::Remote(error)));
                }
            }
            Event::Writable { stream } => {
                if let Some(call) = host.streams.get(&stream) {
                    self.events.push_back(HostEvent::Writable { call: *call });
                }
            }
            // Agents open no streams to a control plane.
            Event::Opened { stream, .. } => {
                if let Some(link) = &mut host.link {
                    link.session.reset(
                        stream,
                        Code::Unimplemented,
                        "the control plane serves no requests here",
                    );
                }
            }
            Event::GoingAway { reason, .. } => log::info!("host {}: going away: {reason}", host.host_id),
            // The client side never gets it.
            Event::Authenticate { .. } => {}
            Event::Closed { error } => {
                let is_refused = match &error {
                    SessionError::Auth(_) => true,
                    SessionError::ByPeer(code, _) => Code::from_number(*code) == Code::Unauthenticated,
                    _ => false,
                };
                let reason = if is_refused {
                    format!("it does not accept this control plane's credential ({error}); register it anew")
                } else {
                    error.to_string()
                };
                self.session_ended(token, &reason, now_ms);
            }
        }
    }

    /// Gives the calls that wait their streams, once the session is ready.
    fn start_waiting(&mut self, token: Token) {
        while let Some(host) = self.hosts.get_mut(&token).filter(|h| h.is_ready) {
            let Some(link) = &mut host.link else { return };
            let Some(id) = host.waiting.pop_front() else { return };
            let Some(call) = self.calls.get_mut(&id) else { continue };
            let mut messages = std::mem::take(&mut call.request.messages).into_iter();
            let count = messages.len();
            let half_close = call.request.half_close;
            let first = messages.next().unwrap_or_default();
            let opened = link.session.open_raw(first, half_close && count <= 1);
            let result = opened.map_err(|e| open_error(e, &host.address)).and_then(|stream| {
                for (i, message) in messages.enumerate() {
                    let is_last = i + 2 == count;
                    if let Err(error) = link.session.send_raw(stream, message, half_close && is_last) {
                        link.session.reset(stream, Code::Cancelled, "the request could not be sent");
                        return Err(send_error(error));
                    }
                }
                Ok(stream)
            });
            match result {
                Ok(stream) => {
                    call.stream = Some(stream);
                    host.streams.insert(stream, id);
                    if matches!(call.mode, Mode::Stream) {
                        self.events.push_back(HostEvent::Writable { call: id });
                    }
                }
                Err(error) => self.end(id, Err(error)),
            }
        }
    }

    fn on_message(&mut self, token: Token, stream: StreamId, kind: u16, body: Vec<u8>, cost: u32) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        let Some(id) = host.streams.get(&stream).copied() else {
            release(host, stream, cost);
            return;
        };
        let Some(call) = self.calls.get_mut(&id) else { return };
        match &mut call.mode {
            Mode::Collect(collector) => {
                release(host, stream, cost);
                match collector.message(kind, body) {
                    Ok(Progress::More) => {}
                    Ok(Progress::Complete) => self.complete(id),
                    Err(error) => self.end(id, Err(error)),
                }
            }
            Mode::Stream => {
                self.timers.clear(TimerKey::Call(id));
                if kind == Error::KIND {
                    release(host, stream, cost);
                    let error = match Error::decode(&body) {
                        Ok(error) => HostError::Remote(error),
                        Err(error) => HostError::BadReply(format!("Error: {error}")),
                    };
                    self.end(id, Err(error));
                } else {
                    self.events.push_back(HostEvent::Message { call: id, kind, body, cost });
                }
            }
        }
    }

    fn on_data(&mut self, token: Token, stream: StreamId, channel: u8, bytes: Vec<u8>, cost: u32) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        let call = host.streams.get(&stream).copied();
        match call.and_then(|id| self.calls.get_mut(&id).map(|c| (id, c))) {
            Some((_, Call { mode: Mode::Collect(collector), .. })) => {
                collector.data(channel, &bytes);
                release(host, stream, cost);
            }
            Some((call, _)) => self.events.push_back(HostEvent::Data { call, channel, bytes, cost }),
            None => release(host, stream, cost),
        }
    }

    fn on_finished(&mut self, token: Token, stream: StreamId) {
        let Some(id) = self.hosts.get(&token).and_then(|h| h.streams.get(&stream).copied()) else { return };
        match self.calls.get(&id) {
            Some(Call { mode: Mode::Collect(_), .. }) => self.complete(id),
            Some(_) => self.events.push_back(HostEvent::Finished { call: id }),
            None => {}
        }
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
            (Mode::Stream, Err(error)) => HostEvent::Failed { call: id, error },
            (Mode::Stream, Ok(_)) => HostEvent::Finished { call: id },
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
                    self.dirty.insert(call.host);
                }
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

    /// Gives back the credit of an event that is dealt with.
    pub fn release(&mut self, call: CallId, cost: u32) {
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
        // A session without calls is kept for a while; asking here costs nothing in the calls' way.
        for (token, host) in &self.hosts {
            if host.streams.is_empty() && host.waiting.is_empty() {
                self.timers.set_if_absent(TimerKey::Idle(*token), now_ms + IDLE_CLOSE_MS);
            }
        }
    }

    /// The session, or the attempt to make one, is over: every call on it fails.
    fn session_ended(&mut self, token: Token, reason: &str, now_ms: u64) {
        let Some(host) = self.hosts.get_mut(&token).filter(|h| h.link.is_some()) else { return };
        log::warn!("host {}: no session with {}: {reason}", host.host_id, host.address);
        if host.is_ready {
            // A session that worked may be dialled again at once.
            self.drop_link(token);
            self.fail_calls(token, reason);
        } else {
            self.drop_link(token);
            self.attempt_failed(token, reason, now_ms);
        }
    }

    fn attempt_failed(&mut self, token: Token, reason: &str, now_ms: u64) {
        if let Some(host) = self.hosts.get_mut(&token) {
            host.backoff_ms = (host.backoff_ms * 2).clamp(FIRST_BACKOFF_MS, MAX_BACKOFF_MS);
            host.failed = Some((now_ms + host.backoff_ms, reason.to_string()));
        }
        self.fail_calls(token, reason);
    }

    /// Fails every call of a host that has no session.
    fn fail_calls(&mut self, token: Token, reason: &str) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        let address = host.address.clone();
        let waiting: Vec<CallId> = host.waiting.drain(..).collect();
        let under_way: Vec<CallId> = host.streams.drain().map(|s| s.1).collect();
        for call in waiting {
            let (address, reason) = (address.clone(), reason.to_string());
            self.end(call, Err(HostError::Unreachable { address, reason }));
        }
        for call in under_way {
            let (address, reason) = (address.clone(), reason.to_string());
            self.end(call, Err(HostError::Lost { address, reason }));
        }
    }

    fn close_session(&mut self, token: Token, reason: &str) {
        if let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) {
            link.session.close();
            link.flush();
        }
        self.drop_link(token);
        self.fail_calls(token, reason);
    }

    fn drop_link(&mut self, token: Token) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        host.is_ready = false;
        if let Some(mut link) = host.link.take() {
            // The peer is told why, if it can still be.
            link.flush();
            if let Err(error) = self.registry.deregister(link.stream_mut()) {
                log::debug!("deregister: {error}");
            }
        }
        for key in [TimerKey::Session(token), TimerKey::Connect(token), TimerKey::Idle(token)] {
            self.timers.clear(key);
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

fn release(host: &mut Host, stream: StreamId, cost: u32) {
    if let Some(link) = &mut host.link {
        link.session.release(stream, cost);
    }
}

fn reason_of(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused; is wrenn-agent running there?".to_string(),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "no route to it".to_string(),
        _ => error.to_string(),
    }
}

fn open_error(error: OpenError, address: &str) -> HostError {
    match error {
        OpenError::TooManyStreams => HostError::Busy,
        OpenError::TooLong => HostError::Remote(Error::new(Code::InvalidRequest, "the request is too long")),
        OpenError::NotReady | OpenError::GoingAway | OpenError::Exhausted => {
            HostError::Unreachable { address: address.to_string(), reason: error.to_string() }
        }
    }
}

fn send_error(error: SendError) -> HostError {
    match error {
        SendError::TooLong => HostError::Remote(Error::new(Code::InvalidRequest, "the request is too long")),
        SendError::QueueFull => HostError::Busy,
        SendError::NoStream => {
            HostError::BadReply("the stream ended before the request was sent".to_string())
        }
    }
}
