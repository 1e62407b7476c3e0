//! The running agent: one event loop thread that owns every connection and capsule.
//!
//! A turn of the loop: wait for readiness, a worker's report or a timer; feed what came to the state
//! machine that it belongs to; do what that says; move bytes on every session that was touched.

use crate::capsule::lifecycle::{Action, Event as LifeEvent};
use crate::capsule::{Capsule, CapsuleKey, CapsuleTimer, GuestLink, Source as CapsuleSource};
use crate::context::{Context, PeerId, Report, Source, TimerKey, nonce, random_bytes};
use crate::registration::Registration;
use crate::service::{Peer, StreamUse};
use crate::sys::signals::Signals;
use mio::net::TcpListener;
use mio::{Events, Poll, Token};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;
use wire::auth::Verifier;
use wire::message::{Code, Done, Error as ErrorMessage};
use wire::reactor::{Link, Socket};
use wire::session::{Limits, Session};

/// Readiness events taken from the kernel at a time.
const EVENTS: usize = 1024;
/// Connections of control planes at once, those that have not authenticated yet included.
pub const MAX_PEERS: usize = 64;
/// Connections taken in one turn.
const ACCEPT_BUDGET: usize = 16;
/// Capsules that the agent keeps at once, those that have ended and wait to be destroyed included.
pub const MAX_CAPSULES: usize = 4096;
/// How often sessions are gone over in one turn before others have theirs.
const PUMP_BUDGET: usize = 4096;
/// How long a shutdown may take before the agent ends with capsules left, for the next start to clear.
pub const SHUTDOWN_TIMEOUT_MS: u64 = 45_000;
/// The longest wait of a turn: the clock is read at least this often.
const MAX_WAIT_MS: u64 = 60_000;

/// A session that may have something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dirty {
    /// A control plane's.
    Peer(PeerId),
    /// A capsule's guest daemon's.
    Guest(CapsuleKey),
    /// A capsule's VMM has something to say.
    Machine(CapsuleKey),
}

/// How the agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every capsule is gone.
    Clean,
    /// This many capsules could not be removed; the next start clears them away.
    Remains(usize),
}

/// Everything that the event loop owns.
pub struct Agent {
    /// What all parts share.
    pub ctx: Context,
    poll: Poll,
    listener: TcpListener,
    signals: Signals,
    /// Calls to the control plane.
    pub registration: Registration,
    /// Proves control planes right.
    pub verifier: Verifier,
    /// Makes a wrong identity look like a wrong secret.
    decoy_key: [u8; 32],
    /// Connections of control planes.
    pub peers: BTreeMap<PeerId, Peer>,
    next_peer: PeerId,
    /// All capsules.
    pub capsules: BTreeMap<CapsuleKey, Capsule>,
    /// Their keys by id.
    pub ids: BTreeMap<String, CapsuleKey>,
    next_capsule: CapsuleKey,
    dirty: BTreeSet<Dirty>,
    /// Streams that have to be tried again, see [`crate::pipe::Flow::Stalled`].
    pub stalled: BTreeSet<(PeerId, u32)>,
    listener_ready: bool,
    stopping: bool,
    outcome: Option<Outcome>,
}

/// What [`Agent::new`] is made of.
pub struct Parts {
    /// What all parts share.
    pub context: Context,
    /// The event loop.
    pub poll: Poll,
    /// Where control planes connect.
    pub listener: TcpListener,
    /// SIGTERM and SIGINT.
    pub signals: Signals,
    /// Calls to the control plane.
    pub registration: Registration,
    /// Proves control planes right.
    pub verifier: Verifier,
}

impl Agent {
    /// An agent that is ready to run.
    ///
    /// # Errors
    /// The kernel refuses to watch the listener or the signals.
    pub fn new(parts: Parts) -> io::Result<Agent> {
        let Parts { mut context, poll, mut listener, signals, registration, verifier } = parts;
        context.watch(&mut listener, Source::Listener)?;
        context.watch(&mut mio::unix::SourceFd(&signals.fd()), Source::Signals)?;
        Ok(Agent {
            ctx: context,
            poll,
            listener,
            signals,
            registration,
            verifier,
            decoy_key: random_bytes(),
            peers: BTreeMap::new(),
            next_peer: 1,
            capsules: BTreeMap::new(),
            ids: BTreeMap::new(),
            next_capsule: 1,
            dirty: BTreeSet::new(),
            stalled: BTreeSet::new(),
            listener_ready: true,
            stopping: false,
            outcome: None,
        })
    }

    /// Runs until a signal has ended it.
    ///
    /// # Errors
    /// The event loop itself fails.
    pub fn run(&mut self) -> io::Result<Outcome> {
        let mut events = Events::with_capacity(EVENTS);
        self.ctx.update_clock();
        self.plan_registration();
        loop {
            let timeout = self.next_wait();
            match self.poll.poll(&mut events, Some(timeout)) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
                _ => {}
            }
            self.ctx.update_clock();
            for event in &events {
                // An error or a hang-up is learnt by reading and writing.
                let closed = event.is_error() || event.is_read_closed() || event.is_write_closed();
                let (readable, writable) = (event.is_readable() || closed, event.is_writable() || closed);
                self.on_ready(event.token(), readable, writable);
            }
            self.accept_peers();
            while let Some(report) = self.ctx.workers.next_result() {
                self.on_report(report);
            }
            let now_ms = self.ctx.now_ms();
            while let Some(timer) = self.ctx.timers.pop_due(now_ms) {
                self.on_timer(timer);
            }
            self.pump_all();
            if self.stopping && self.capsules.is_empty() {
                self.outcome = Some(Outcome::Clean);
            }
            if let Some(outcome) = self.outcome {
                return Ok(outcome);
            }
        }
    }

    /// Something is to be done on a session.
    pub fn mark(&mut self, dirty: Dirty) {
        self.dirty.insert(dirty);
    }

    /// Whether the agent takes no new work.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    fn next_wait(&self) -> Duration {
        if !self.dirty.is_empty() || self.listener_ready {
            return Duration::ZERO;
        }
        let now_ms = self.ctx.now_ms();
        let wait = self.ctx.timers.next_ms().map_or(MAX_WAIT_MS, |at| at.saturating_sub(now_ms));
        Duration::from_millis(wait.min(MAX_WAIT_MS))
    }

    fn on_ready(&mut self, token: Token, readable: bool, writable: bool) {
        match self.ctx.source(token) {
            Some(Source::Listener) => self.listener_ready = true,
            Some(Source::Signals) => self.on_signals(),
            Some(Source::Peer(id)) => {
                if let Some(peer) = self.peers.get_mut(&id) {
                    peer.link.socket.on_ready(readable, writable);
                    self.mark(Dirty::Peer(id));
                }
            }
            Some(Source::Capsule(key, source)) => {
                self.on_capsule_ready(key, source, token, readable, writable);
            }
            Some(Source::Waker) | None => {}
        }
    }

    fn on_capsule_ready(
        &mut self,
        key: CapsuleKey,
        source: CapsuleSource,
        token: Token,
        readable: bool,
        writable: bool,
    ) {
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        match source {
            CapsuleSource::Exit => {
                if let Some(event) = capsule.reap(&mut self.ctx) {
                    self.apply(key, event);
                }
            }
            CapsuleSource::Monitor | CapsuleSource::Console => self.mark(Dirty::Machine(key)),
            CapsuleSource::Metadata | CapsuleSource::MetadataConnection => {
                capsule.on_metadata_ready(&mut self.ctx, token, source);
            }
            CapsuleSource::Guest => {
                capsule.on_guest_ready(&mut self.ctx, readable, writable);
                self.mark(Dirty::Guest(key));
            }
        }
    }

    fn on_signals(&mut self) {
        // The kernel keeps at most one of each number.
        while let Ok(Some(signal)) = self.signals.next() {
            if self.stopping {
                log::info!("signal {signal}: already shutting down");
                continue;
            }
            log::info!("signal {signal}: destroying {} capsules, then ending", self.capsules.len());
            self.stopping = true;
            let at = self.ctx.now_ms() + SHUTDOWN_TIMEOUT_MS;
            self.ctx.timers.set(TimerKey::Shutdown, at);
            for (id, peer) in &mut self.peers {
                peer.link.session.drain("the host agent is shutting down");
                self.dirty.insert(Dirty::Peer(*id));
            }
            let keys: Vec<CapsuleKey> = self.capsules.keys().copied().collect();
            for key in keys {
                self.apply(key, LifeEvent::Shutdown);
            }
        }
    }

    fn accept_peers(&mut self) {
        if !self.listener_ready {
            return;
        }
        for _ in 0..ACCEPT_BUDGET {
            let (mut stream, address) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.listener_ready = false;
                    return;
                }
                Err(e) => {
                    // Out of descriptors, or a connection that is gone again: the next event tries again.
                    log::warn!("accepting a connection: {e}");
                    self.listener_ready = false;
                    return;
                }
            };
            if self.stopping {
                log::debug!("connection from {address} refused: shutting down");
                continue;
            }
            if self.peers.len() >= MAX_PEERS {
                log::warn!("connection from {address} refused: {MAX_PEERS} are open");
                continue;
            }
            let id = self.next_peer;
            self.next_peer += 1;
            let token = match self.ctx.watch(&mut stream, Source::Peer(id)) {
                Ok(token) => token,
                Err(e) => {
                    log::warn!("watching the connection from {address}: {e}");
                    continue;
                }
            };
            let name = concat!("wrenn-agent/", env!("CARGO_PKG_VERSION"));
            let session = Session::server(name, nonce(), Limits::default(), self.ctx.now_ms());
            let peer = Peer {
                link: Link::new(Socket::new(stream), session),
                token,
                address,
                streams: BTreeMap::new(),
            };
            self.peers.insert(id, peer);
            self.mark(Dirty::Peer(id));
        }
    }

    fn on_report(&mut self, report: Report) {
        match report {
            Report::Capsule(key, report) => {
                let Some(capsule) = self.capsules.get_mut(&key) else {
                    // A capsule is forgotten only when no job of its is under way.
                    log::error!("a report came for a capsule that is forgotten");
                    return;
                };
                if let Some(event) = capsule.on_report(&mut self.ctx, report) {
                    self.apply(key, event);
                }
            }
            Report::Registration(report) => {
                self.registration.on_report(report, self.ctx.now_ms());
                if let Some(verifier) = self.registration.take_new_verifier() {
                    self.verifier = verifier;
                }
                self.plan_registration();
            }
        }
    }

    fn plan_registration(&mut self) {
        if let Some(at) = self.registration.next_ms() {
            self.ctx.timers.set(TimerKey::Registration, at);
        }
    }

    fn on_timer(&mut self, timer: TimerKey) {
        let now_ms = self.ctx.now_ms();
        match timer {
            TimerKey::Peer(id) => {
                if let Some(peer) = self.peers.get_mut(&id) {
                    peer.link.session.handle_timeout(now_ms);
                    self.mark(Dirty::Peer(id));
                }
            }
            TimerKey::Registration => {
                if let Some(job) = self.registration.begin(now_ms) {
                    self.ctx.workers.submit(move || Report::Registration(job()));
                }
            }
            TimerKey::Shutdown => {
                log::error!("{} capsules are left after the time for shutting down", self.capsules.len());
                self.outcome = Some(Outcome::Remains(self.capsules.len()));
            }
            TimerKey::Capsule(key, timer) => self.on_capsule_timer(key, timer, now_ms),
        }
    }

    fn on_capsule_timer(&mut self, key: CapsuleKey, timer: CapsuleTimer, now_ms: u64) {
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        match timer {
            CapsuleTimer::Deadline => {
                let event = LifeEvent::Deadline(capsule.deadline_failure());
                self.apply(key, event);
            }
            CapsuleTimer::Kill => {
                let event = capsule.kill_timed_out();
                self.apply(key, event);
            }
            CapsuleTimer::Retry => self.apply(key, LifeEvent::RetryDue),
            CapsuleTimer::Guest => {
                capsule.on_guest_timer(&mut self.ctx);
                self.mark(Dirty::Guest(key));
            }
            CapsuleTimer::GuestSession => {
                if let GuestLink::Up(guest) = &mut capsule.guest {
                    guest.link.session.handle_timeout(now_ms);
                    self.mark(Dirty::Guest(key));
                }
            }
            CapsuleTimer::Metadata => capsule.on_metadata_timer(&mut self.ctx),
        }
    }

    /// A new capsule, not yet begun.
    pub fn insert_capsule(&mut self, make: impl FnOnce(CapsuleKey) -> Capsule) -> CapsuleKey {
        let key = self.next_capsule;
        self.next_capsule += 1;
        let capsule = make(key);
        self.ids.insert(capsule.spec.id.clone(), key);
        self.capsules.insert(key, capsule);
        key
    }

    /// Feeds a capsule's state machine and does what it says.
    pub fn apply(&mut self, key: CapsuleKey, event: LifeEvent) {
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        let had_guest = capsule.is_connecting();
        let actions = capsule.handle(&mut self.ctx, event);
        if had_guest && !capsule.is_connecting() {
            self.reset_forwards(key, Code::NotFound, "the capsule is being destroyed");
        }
        for action in actions {
            self.do_action(key, action);
        }
    }

    fn do_action(&mut self, key: CapsuleKey, action: Action) {
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        let id = capsule.spec.id.clone();
        let elapsed_ms = self.ctx.now_ms() - capsule.begun_ms;
        match action {
            Action::Created => {
                log::info!("capsule {id}: running after {elapsed_ms} ms");
                let waiter = capsule.creator.take();
                let info = capsule.info(&self.ctx);
                if let Some(waiter) = waiter {
                    self.answer(waiter, &info);
                }
            }
            Action::CreateFailed(failure) => {
                log::warn!("capsule {id}: not created: {failure}");
                if let Some(waiter) = capsule.creator.take() {
                    self.answer(waiter, &failure.to_error());
                }
            }
            Action::Destroyed => {
                log::info!("capsule {id}: destroyed");
                for waiter in std::mem::take(&mut capsule.destroyers) {
                    self.answer(waiter, &Done {});
                }
            }
            Action::DestroyFailed(failure) => {
                log::error!("capsule {id}: {failure}");
                let waiters = std::mem::take(&mut capsule.destroyers);
                let waiters: Vec<_> = waiters.into_iter().chain(capsule.creator.take()).collect();
                for waiter in waiters {
                    self.answer(waiter, &failure.to_error());
                }
            }
            Action::Ended => {
                let why = capsule.lifecycle.failure().map(ToString::to_string).unwrap_or_default();
                log::warn!("capsule {id}: ended: {why}");
            }
            Action::Forget => {
                self.ids.remove(&id);
                self.capsules.remove(&key);
            }
            Action::Make(_) | Action::Remove(_) | Action::RetryAfter(_) => {
                unreachable!("the capsule does these itself")
            }
        }
    }

    /// Reads, deals with and writes everything that sessions have, up to a budget; what is left has its
    /// turn after the next look at the kernel.
    fn pump_all(&mut self) {
        let mut again = BTreeSet::new();
        for _ in 0..PUMP_BUDGET {
            let Some(dirty) = self.dirty.pop_first() else { break };
            match dirty {
                Dirty::Peer(id) => self.pump_peer(id),
                Dirty::Guest(key) => self.pump_guest(key),
                Dirty::Machine(key) => {
                    if self.capsules.get_mut(&key).is_some_and(Capsule::pump_machine) {
                        again.insert(dirty);
                    }
                }
            }
        }
        self.dirty.append(&mut again);
        for (peer, stream) in std::mem::take(&mut self.stalled) {
            self.pump_forward(peer, stream);
            self.continue_list((peer, stream));
        }
    }

    fn pump_peer(&mut self, id: PeerId) {
        let now_ms = self.ctx.now_ms();
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.link.read(now_ms);
        loop {
            while let Some(event) = self.peers.get_mut(&id).and_then(|p| p.link.session.poll_event()) {
                self.on_peer_event(id, event);
            }
            let Some(peer) = self.peers.get_mut(&id) else { return };
            if !peer.link.flush() {
                break;
            }
        }
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if peer.link.session.is_closed() {
            self.close_peer(id);
            return;
        }
        if peer.link.is_readable() {
            self.dirty.insert(Dirty::Peer(id));
        }
        if let Some(at) = peer.link.session.next_timeout_ms() {
            self.ctx.timers.set(TimerKey::Peer(id), at);
        }
    }

    fn pump_guest(&mut self, key: CapsuleKey) {
        let now_ms = self.ctx.now_ms();
        let Some(guest) = self.capsules.get_mut(&key).and_then(Capsule::session) else { return };
        guest.link.read(now_ms);
        loop {
            while let Some(event) = self
                .capsules
                .get_mut(&key)
                .and_then(Capsule::session)
                .and_then(|g| g.link.session.poll_event())
            {
                self.on_guest_session_event(key, event);
            }
            let Some(guest) = self.capsules.get_mut(&key).and_then(Capsule::session) else { return };
            if !guest.link.flush() {
                break;
            }
        }
        let Some(guest) = self.capsules.get_mut(&key).and_then(Capsule::session) else { return };
        if guest.link.is_readable() {
            self.dirty.insert(Dirty::Guest(key));
        }
        if let Some(at) = guest.link.session.next_timeout_ms() {
            self.ctx.timers.set(TimerKey::Capsule(key, CapsuleTimer::GuestSession), at);
        }
    }

    fn close_peer(&mut self, id: PeerId) {
        let Some(peer) = self.peers.remove(&id) else { return };
        self.ctx.forget(peer.token);
        self.ctx.timers.clear(TimerKey::Peer(id));
        log::debug!("connection from {} closed", peer.address);
        for (stream, stream_use) in peer.streams {
            self.on_peer_stream_gone(id, stream, stream_use);
        }
    }

    /// Whoever was at the other end of a control plane's stream hears that it is gone.
    pub fn on_peer_stream_gone(&mut self, id: PeerId, stream: u32, stream_use: StreamUse) {
        match stream_use {
            StreamUse::Creating(key) => {
                if let Some(capsule) = self.capsules.get_mut(&key) {
                    capsule.creator = None;
                    self.apply(key, LifeEvent::Cancel);
                }
            }
            StreamUse::Destroying(key) => {
                if let Some(capsule) = self.capsules.get_mut(&key) {
                    capsule.destroyers.retain(|w| *w != (id, stream));
                }
            }
            StreamUse::Forward(forward) => {
                let Some(capsule) = self.capsules.get_mut(&forward.capsule) else { return };
                if capsule.forwards.remove(&forward.inner).is_some()
                    && let Some(guest) = capsule.session()
                {
                    guest.link.session.reset(forward.inner, Code::Cancelled, "the caller is gone");
                    self.mark(Dirty::Guest(forward.capsule));
                }
            }
            StreamUse::AwaitInner(_) | StreamUse::Listing(_) | StreamUse::Answered => {}
        }
    }

    /// Sends the one answer of a stream and ends this side's half.
    pub fn answer<M: wire::message::Message>(&mut self, waiter: (PeerId, u32), message: &M) {
        let (id, stream) = waiter;
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if let Err(e) = peer.link.session.send_last(stream, message) {
            log::debug!("an answer to {} was not sent: {e}", peer.address);
        }
        match peer.streams.get_mut(&stream) {
            Some(stream_use) if peer.link.session.has_stream(stream) => *stream_use = StreamUse::Answered,
            _ => {
                peer.streams.remove(&stream);
            }
        }
        self.mark(Dirty::Peer(id));
    }

    /// Sends an error as the one answer of a stream.
    pub fn answer_error(&mut self, waiter: (PeerId, u32), code: Code, text: impl Into<String>) {
        self.answer(waiter, &ErrorMessage::new(code, text));
    }

    /// Answers [`SessionEvent::Authenticate`] of a control plane.
    pub fn authenticate(&mut self, id: PeerId, identity: &str) {
        let verifier = (identity == crate::service::CP_IDENTITY).then(|| self.verifier.clone());
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.link.session.provide_verifier(verifier, &self.decoy_key);
    }
}
