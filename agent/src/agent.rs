//! The running agent: one event loop thread that owns every connection and capsule.
//!
//! A turn of the loop: wait for readiness, a worker's report or a timer; feed what came to the state
//! machine that it belongs to; do what that says; move bytes on every session that was touched.

use crate::capsule::lifecycle::{Action, Event as LifeEvent, Goal, Work};
use crate::capsule::record::Record;
use crate::capsule::table::Table;
use crate::capsule::{
    Capsule, CapsuleKey, CapsuleTimer, GuestLink, LeftPaused, LeftRunning, Source as CapsuleSource, Spec,
};
use crate::context::{Context, PeerId, Report, Source, TimerKey, random_bytes};
use crate::ending::Progress;
use crate::metrics::keeping::Keeper;
use crate::registration::Registration;
use crate::service::Peer;
use mio::net::TcpListener;
use mio::{Events, Poll, Token};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use wire::auth::Verifier;
use wire::message::{CapsuleState, Code, Done};
use wire::reactor::sys::signals::Signals;
use wire::session::StreamId;

/// Readiness events taken from the kernel at a time.
const EVENTS: usize = 1024;
/// Capsules that the agent keeps at once, those that have ended and wait to be destroyed included.
pub const MAX_CAPSULES: usize = 4096;
/// The wait of a capsule that is to hibernate while another's memory is being packed.
const PACKING_RETRY_MS: u64 = 5_000;
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
    /// Every capsule is as it was to be.
    Clean,
    /// This many capsules are not; the next start looks at them again.
    Remains(usize),
}

/// Everything that the event loop owns.
pub struct Agent {
    /// What all parts share.
    pub ctx: Context,
    poll: Poll,
    pub(crate) listener: TcpListener,
    pub(crate) signals: Signals,
    /// Calls to the control plane.
    pub registration: Registration,
    /// Proves control planes right.
    pub verifier: Verifier,
    /// Makes a wrong identity look like a wrong secret.
    pub(crate) decoy_key: [u8; 32],
    /// Connections of control planes.
    pub peers: BTreeMap<PeerId, Peer>,
    pub(crate) next_peer: PeerId,
    /// All capsules.
    pub capsules: Table<Capsule>,
    /// Their keys by id.
    pub ids: BTreeMap<String, CapsuleKey>,
    pub(crate) dirty: BTreeSet<Dirty>,
    /// Streams that have to be tried again, see [`wire::splice::Flow::Stalled`].
    pub stalled: BTreeSet<(PeerId, StreamId)>,
    pub(crate) listener_ready: bool,
    pub(crate) keeper: Keeper,
    pub(crate) ending: Option<Progress>,
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
    /// [`crate::ending::Ending::SIGNALS`].
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
            capsules: Table::default(),
            ids: BTreeMap::new(),
            dirty: BTreeSet::new(),
            stalled: BTreeSet::new(),
            listener_ready: true,
            keeper: Keeper::default(),
            ending: None,
            outcome: None,
        })
    }

    /// Takes over the capsules that an agent before this one has left.
    pub fn take_over(&mut self, paused: Vec<LeftPaused>, running: Vec<LeftRunning>) {
        for left in paused {
            let Some((known, directory)) = self.known(&left.record) else { continue };
            let now_ms = self.ctx.now_ms();
            let key = self.insert_capsule(|key| Capsule::left_paused(key, known, directory, left, now_ms));
            if let Some(capsule) = self.capsules.get_mut(&key) {
                capsule.note_use(&mut self.ctx);
            }
        }
        for left in running {
            let Some((known, directory)) = self.known(&left.record) else { continue };
            let now_ms = self.ctx.now_ms();
            let key = self.insert_capsule(|key| Capsule::left_running(key, known, directory, left, now_ms));
            let Some(capsule) = self.capsules.get_mut(&key) else { continue };
            if let Err(e) = capsule.adopt_machine(&mut self.ctx) {
                log::warn!("capsule {}: runs without its metadata service: {e}", capsule.spec.id);
            }
            capsule.note_use(&mut self.ctx);
            self.apply(key, LifeEvent::GuestLost);
            if let Some(capsule) = self.capsules.get_mut(&key) {
                // It is there already: no reason to wait as after a failure.
                capsule.connect_guest(&mut self.ctx);
            }
        }
    }

    fn known(&self, record: &Record) -> Option<((Spec, Vec<u8>), PathBuf)> {
        let id = &record.capsule_id;
        let known = record.spec(self.ctx.host.create_deadline_ms);
        let directory = self.ctx.host.layout.capsule(id).ok();
        if known.is_none() || directory.is_none() {
            log::error!("capsule {id}: left as it is: its record lacks what is needed to go on with it");
        }
        Some((known?, directory?))
    }

    /// Runs until a signal has ended it.
    ///
    /// # Errors
    /// The event loop itself fails.
    pub fn run(&mut self) -> io::Result<Outcome> {
        let mut events = Events::with_capacity(EVENTS);
        self.ctx.update_clock();
        self.plan_registration();
        self.sample_usage();
        self.begin_mending();
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
            self.outcome = self.outcome.or_else(|| self.continue_ending());
            if let Some(outcome) = self.outcome {
                self.keep_all_usage();
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
        self.ending.is_some()
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
            // The workers' waker, whose reports are looked for in every turn, or something closed by now.
            None => {}
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

    fn on_report(&mut self, report: Report) {
        match report {
            Report::Capsule(key, report) => {
                let Some(capsule) = self.capsules.get_mut(&key) else {
                    // A capsule is forgotten only when no job of its is under way.
                    log::error!("a report came for a capsule that is forgotten");
                    return;
                };
                for event in capsule.on_report(&mut self.ctx, report) {
                    self.apply(key, event);
                }
            }
            Report::NetworkChanged { waiter, capsule_id, result } => {
                self.on_network_changed(waiter, &capsule_id, result);
            }
            Report::Snapshots(waiter, report) => self.on_snapshots_report(waiter, report),
            Report::Mended(result) => self.on_mended(result),
            Report::UsageKept(outcomes) => self.on_usage_kept(outcomes),
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
                    self.ctx.workers.submit_apart(move || Report::Registration(job()));
                }
            }
            TimerKey::Sample => self.sample_usage(),
            TimerKey::Mend => self.begin_mending(),
            TimerKey::Shutdown => self.outcome = Some(self.give_up_ending()),
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
            CapsuleTimer::Idle => {
                if capsule.is_idle(&mut self.ctx) {
                    log::info!("capsule {}: idle for {} s", capsule.spec.id, capsule.spec.timeout_sec);
                    capsule.begun_ms = now_ms;
                    self.apply(key, LifeEvent::Pause);
                }
            }
            CapsuleTimer::RunTime if self.ending.is_some() => {}
            CapsuleTimer::RunTime => {
                if capsule.has_run_out(&mut self.ctx) {
                    log::info!(
                        "capsule {}: has run for as long as WRENN_MAX_RUN_SEC allows",
                        capsule.spec.id
                    );
                    capsule.begun_ms = now_ms;
                    self.apply(key, LifeEvent::Pause);
                }
            }
            CapsuleTimer::Hibernate if self.ending.is_some() => {}
            CapsuleTimer::Hibernate => {
                let has_machine = capsule.lifecycle.holds_machine();
                if has_machine || self.capsules.values().any(|c| c.lifecycle.is_packing()) {
                    // One after the other, each when its machine has ended: it is never urgent.
                    let again = TimerKey::Capsule(key, CapsuleTimer::Hibernate);
                    self.ctx.timers.set(again, now_ms + PACKING_RETRY_MS);
                } else {
                    self.apply(key, LifeEvent::Hibernate);
                }
            }
            CapsuleTimer::Prepare => {
                log::warn!("capsule {}: its guest did not get ready to be saved in time", capsule.spec.id);
                capsule.on_prepared(&mut self.ctx);
            }
        }
    }

    /// A new capsule, not yet begun.
    pub fn insert_capsule(&mut self, make: impl FnOnce(CapsuleKey) -> Capsule) -> CapsuleKey {
        let key = self.capsules.insert(make);
        if let Some(capsule) = self.capsules.get(&key) {
            self.ids.insert(capsule.spec.id.clone(), key);
        }
        key
    }

    /// Feeds a capsule's state machine and does what it says.
    pub fn apply(&mut self, key: CapsuleKey, event: LifeEvent) {
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        let had_guest = capsule.is_connecting();
        let actions = capsule.handle(&mut self.ctx, event);
        let goal = capsule.lifecycle.goal();
        if had_guest && !capsule.is_connecting() {
            match goal {
                Goal::Paused => self.reset_forwards(key, Code::InvalidState, "the capsule was paused"),
                _ => self.reset_forwards(key, Code::NotFound, "the capsule is being destroyed"),
            }
        }
        // The event may have left something to be sent, or a machine with something to say.
        self.mark(Dirty::Guest(key));
        self.mark(Dirty::Machine(key));
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
                capsule.note_use(&mut self.ctx);
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
            Action::Finished(work) => {
                log::info!("capsule {id}: {} after {elapsed_ms} ms", work.done());
                capsule.note_change(&mut self.ctx);
                let caller = capsule.caller.take();
                let (info, snapshot) = (capsule.info(&self.ctx), capsule.made_snapshot.take());
                if work == Work::Pause {
                    self.keep_usage_of_paused(key);
                }
                match (caller, snapshot) {
                    (Some(caller), Some(snapshot)) => self.answer(caller, &snapshot),
                    (Some(caller), None) => self.answer(caller, &info),
                    (None, _) => {}
                }
            }
            Action::Failed(work, failure) => {
                let state = capsule.state();
                log::warn!("capsule {id}: not {}: {failure}", work.done());
                capsule.note_use(&mut self.ctx);
                if let Some(caller) = capsule.caller.take() {
                    let text = match state {
                        CapsuleState::Running => format!("{failure}; it runs on"),
                        CapsuleState::Paused | CapsuleState::Hibernated => {
                            format!("{failure}; it is still paused")
                        }
                        _ => failure.to_string(),
                    };
                    self.answer_error(caller, failure.code(), text);
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
            Action::RemainsStay(failure) => log::error!("capsule {id}: paused and whole, but {failure}"),
            Action::Ended => {
                let why = capsule.lifecycle.failure().map(ToString::to_string).unwrap_or_default();
                log::warn!("capsule {id}: ended: {why}");
            }
            Action::Forget => {
                self.ids.remove(&id);
                self.capsules.remove(&key);
            }
            Action::Make(_)
            | Action::Remove(_)
            | Action::RetryAfter(_)
            | Action::Save
            | Action::MakeSnapshot
            | Action::Pack
            | Action::StopPacking => {
                unreachable!("the capsule does these itself")
            }
        }
    }
}
