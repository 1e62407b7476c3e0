//! The way to a capsule's guest daemon: connecting until it answers, the session, and the greeting.

use super::{Capsule, CapsuleTimer, Source};
use crate::context::{Context, Source as LoopSource, TimerKey, nonce, random_bytes};
use crate::net::ENVD_PORT;
use mio::Token;
use mio::net::TcpStream;
use std::time::{SystemTime, UNIX_EPOCH};
use wire::codec::{Bytes, DecodeError};
use wire::message::{CapsuleState, Code, Done, Error, GuestInit, Health, HealthReply, expect};
use wire::reactor::{Link, Socket};
use wire::session::{Event, Limits, Session, StreamId};

/// Who the agent is to guest daemons.
pub const IDENTITY: &str = "agent";
/// The wait between two attempts to connect while the guest boots: its kernel is up by then, its daemon
/// about to listen.
pub const ATTEMPT_INTERVAL_MS: u64 = 10;
/// The wait after a session that failed. Each costs a key derivation of some milliseconds on the event
/// loop, so a guest that breaks every session must not set the pace.
pub const SESSION_RETRY_MS: u64 = 200;
/// The longest wait between two attempts once a capsule was running.
pub const MAX_ATTEMPT_INTERVAL_MS: u64 = 2_000;
/// How much of what a guest daemon says of itself or of an error is kept, in characters: it is the
/// guest's word, and a guest may be hostile.
const MAX_GUEST_TEXT: usize = 200;
/// How long the first attempt may take. A guest that has not booted drops what is sent to it, and TCP
/// itself would only try again after a second.
pub const ATTEMPT_TIMEOUT_MS: u64 = 150;
/// How much longer each further attempt may take: on a host so busy that a guest answers late, an attempt
/// has to be waited for some time.
pub const ATTEMPT_TIMEOUT_STEP_MS: u64 = 10;
/// The longest that an attempt may take.
pub const MAX_ATTEMPT_TIMEOUT_MS: u64 = 2_000;
/// Random bytes that a guest gets for its pool.
const ENTROPY_BYTES: usize = 64;

/// Where the connection stands.
pub enum GuestLink {
    /// Nobody wants one.
    Down,
    /// The next attempt waits for its time.
    Waiting,
    /// An attempt is under way.
    Connecting(TcpStream, Token),
    /// There is a connection; its session may not be ready yet.
    Up(Box<GuestSession>),
}

/// A connection to a guest daemon.
pub struct GuestSession {
    /// The session and its transport.
    pub link: Link,
    token: Token,
    init: Option<StreamId>,
    health: Option<StreamId>,
    initialised: bool,
    healthy: bool,
}

/// What a guest daemon's control message came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Greeting {
    /// There is more to come.
    Pending,
    /// It is well and knows what it needs.
    Welcome,
    /// It is ready to be saved, or will not get any readier.
    Prepared,
    /// It refused, and why.
    Refused(String),
}

impl GuestSession {
    /// Whether the guest daemon has answered everything, so that streams may be opened for others.
    pub fn is_welcome(&self) -> bool {
        self.initialised && self.healthy && self.link.session.is_ready()
    }
}

impl Capsule {
    /// Starts an attempt to connect.
    pub fn connect_guest(&mut self, ctx: &mut Context) {
        self.drop_guest(ctx);
        let Some(network) = &self.network else { return };
        self.guest_attempts += 1;
        let attempt = network.connect_guest(ENVD_PORT).map_err(|e| e.to_string()).and_then(|mut stream| {
            let source = LoopSource::Capsule(self.key, Source::Guest);
            let token = ctx.watch(&mut stream, source).map_err(|e| e.to_string())?;
            Ok((stream, token))
        });
        match attempt {
            Ok((stream, token)) => {
                self.guest = GuestLink::Connecting(stream, token);
                let longer = u64::from(self.guest_attempts) * ATTEMPT_TIMEOUT_STEP_MS;
                let timeout = (ATTEMPT_TIMEOUT_MS + longer).min(MAX_ATTEMPT_TIMEOUT_MS);
                self.set_timer(ctx, CapsuleTimer::Guest, timeout);
            }
            Err(e) => self.retry_guest(ctx, e),
        }
    }

    /// Drops the connection or attempt that there is.
    pub fn drop_guest(&mut self, ctx: &mut Context) {
        ctx.timers.clear(TimerKey::Capsule(self.key, CapsuleTimer::Guest));
        ctx.timers.clear(TimerKey::Capsule(self.key, CapsuleTimer::GuestSession));
        match std::mem::replace(&mut self.guest, GuestLink::Down) {
            GuestLink::Down | GuestLink::Waiting => {}
            GuestLink::Connecting(_, token) => ctx.forget(token),
            GuestLink::Up(guest) => ctx.forget(guest.token),
        }
    }

    /// Plans the next attempt after a connection or a session that failed.
    pub fn retry_guest(&mut self, ctx: &mut Context, reason: String) {
        let had_session = matches!(self.guest, GuestLink::Up(_));
        let was_running = self.lifecycle.state() == CapsuleState::Running;
        self.drop_guest(ctx);
        self.guest = GuestLink::Waiting;
        let wait = match (was_running, had_session) {
            (true, _) => (SESSION_RETRY_MS << self.guest_attempts.min(8)).min(MAX_ATTEMPT_INTERVAL_MS),
            (false, true) => SESSION_RETRY_MS,
            (false, false) => ATTEMPT_INTERVAL_MS,
        };
        log::trace!("capsule {}: guest daemon, attempt {}: {reason}", self.spec.id, self.guest_attempts);
        self.last_guest_error = reason;
        self.set_timer(ctx, CapsuleTimer::Guest, wait);
    }

    /// The time of an attempt, or of the wait before one, is over.
    pub fn on_guest_timer(&mut self, ctx: &mut Context) {
        match self.guest {
            GuestLink::Waiting => self.connect_guest(ctx),
            GuestLink::Connecting(..) => {
                self.last_guest_error = "no answer to a TCP connection".into();
                self.connect_guest(ctx);
            }
            GuestLink::Down | GuestLink::Up(_) => {}
        }
    }

    /// The guest has asked for its metadata, so its network is up: what was sent to it before is lost.
    pub fn on_metadata_fetched(&mut self, ctx: &mut Context) {
        log::debug!("capsule {}: metadata fetched after {} ms", self.spec.id, ctx.now_ms() - self.begun_ms);
        if matches!(self.guest, GuestLink::Waiting | GuestLink::Connecting(..)) {
            self.connect_guest(ctx);
        }
    }

    /// The connection's socket is ready.
    pub fn on_guest_ready(&mut self, ctx: &mut Context, readable: bool, writable: bool) {
        match std::mem::replace(&mut self.guest, GuestLink::Down) {
            GuestLink::Connecting(stream, token) => match is_connected(&stream) {
                Ok(true) => {
                    ctx.timers.clear(TimerKey::Capsule(self.key, CapsuleTimer::Guest));
                    let name = concat!("wrenn-agent/", env!("CARGO_PKG_VERSION"));
                    let limits = Limits::default();
                    let session =
                        Session::client(IDENTITY, &self.secret, name, nonce(), limits, ctx.now_ms());
                    log::debug!(
                        "capsule {}: connected after {} ms, {} attempts",
                        self.spec.id,
                        ctx.now_ms() - self.begun_ms,
                        self.guest_attempts
                    );
                    self.guest = GuestLink::Up(Box::new(GuestSession {
                        link: Link::new(Socket::new(stream), session),
                        token,
                        init: None,
                        health: None,
                        initialised: false,
                        healthy: false,
                    }));
                }
                Ok(false) => self.guest = GuestLink::Connecting(stream, token),
                Err(e) => {
                    ctx.forget(token);
                    self.retry_guest(ctx, e.to_string());
                }
            },
            GuestLink::Up(mut guest) => {
                guest.link.socket.on_ready(readable, writable);
                self.guest = GuestLink::Up(guest);
            }
            other => self.guest = other,
        }
    }

    /// The handshake is done: tells the daemon what it needs and asks whether it is well.
    pub fn greet_guest(&mut self) {
        let environment = self.spec.environment.clone();
        let GuestLink::Up(guest) = &mut self.guest else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let init = GuestInit {
            time_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
            default_user: String::new(),
            environment,
            entropy: Bytes(random_bytes::<ENTROPY_BYTES>().to_vec()),
        };
        // The session is ready and has no stream open: these can only fail where it just broke, and
        // then its end is the next event.
        guest.init = guest.link.session.open(&init, true).ok();
        guest.health = guest.link.session.open(&Health {}, true).ok();
    }

    /// Takes an event of one of the greeting's streams; `None` when it is of another.
    pub fn on_greeting_event(&mut self, event: &Event) -> Option<Greeting> {
        let preparing = self.preparing;
        let GuestLink::Up(guest) = &mut self.guest else { return None };
        let stream = match event {
            Event::Message { stream, .. }
            | Event::Data { stream, .. }
            | Event::Finished { stream }
            | Event::Writable { stream }
            | Event::Reset { stream, .. } => *stream,
            _ => return None,
        };
        if preparing == Some(stream) {
            if let Event::Message { cost, .. } = event {
                guest.link.session.release(stream, *cost);
            }
            // Whatever it says: it has had its chance.
            return Some(Greeting::Prepared);
        }
        let is_init = guest.init == Some(stream);
        if !is_init && guest.health != Some(stream) {
            return None;
        }
        let answer = match event {
            Event::Message { kind, body, cost, .. } => {
                guest.link.session.release(stream, *cost);
                if is_init {
                    read_init_answer(*kind, body).map(|()| None)
                } else {
                    read_health_answer(*kind, body).map(Some)
                }
            }
            Event::Reset { reason, .. } => Err(reason.clone()),
            _ => return Some(Greeting::Pending),
        };
        Some(match answer {
            Ok(version) => {
                guest.initialised |= is_init;
                guest.healthy |= !is_init;
                self.envd_version = version.unwrap_or_else(|| std::mem::take(&mut self.envd_version));
                if guest.is_welcome() { Greeting::Welcome } else { Greeting::Pending }
            }
            Err(reason) => Greeting::Refused(reason),
        })
    }
}

fn read_init_answer(kind: u16, body: &[u8]) -> Result<(), String> {
    expect::<Done>(kind, body).map(drop).map_err(|e| refusal(kind, body, e))
}

fn read_health_answer(kind: u16, body: &[u8]) -> Result<String, String> {
    expect::<HealthReply>(kind, body).map(|reply| shown(&reply.version)).map_err(|e| refusal(kind, body, e))
}

/// Why the daemon did not answer as it should: its own error where it sent one.
fn refusal(kind: u16, body: &[u8], decoding: DecodeError) -> String {
    match expect::<Error>(kind, body) {
        Ok(error) => shown(&format!("the guest daemon refused its initialisation: {error}")),
        Err(_) => format!("the guest daemon's answer makes no sense ({}): {decoding}", Code::Protocol.name()),
    }
}

/// A guest's text, fit for a message.
fn shown(text: &str) -> String {
    text.chars().take(MAX_GUEST_TEXT).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Whether a non-blocking connect has come through.
fn is_connected(stream: &TcpStream) -> std::io::Result<bool> {
    if let Some(e) = stream.take_error()? {
        return Err(e);
    }
    match stream.peer_addr() {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotConnected => Ok(false),
        Err(e) => Err(e),
    }
}
