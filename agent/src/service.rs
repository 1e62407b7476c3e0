//! What the agent does for a control plane: the requests of one wire session.

use crate::agent::{Agent, Dirty, MAX_CAPSULES};
use crate::capsule::admission::{self, Promised};
use crate::capsule::failure::Failure;
use crate::capsule::lifecycle::{Event as LifeEvent, Part, Work};
use crate::capsule::spec::{self, MAX_DEADLINE_MS};
use crate::capsule::{Capsule, CapsuleKey, CapsuleTimer, MAX_WAITERS, SnapshotOrder, Spec};
use crate::context::{PeerId, Report, SnapshotsReport, TimerKey};
use crate::forward::Forward;
use crate::net::Policy;
use crate::snapshots::{self, SnapshotError};
use mio::Token;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use wire::codec::DecodeError;
use wire::message::{
    self as message, CapsuleCreate, CapsuleDestroy, CapsuleGet, CapsuleList, CapsulePause, CapsulePing,
    CapsuleResume, CapsuleSnapshot, CapsuleState, Code, Done, Health, HealthReply, HostStatus,
    HostStatusReply, Message, SnapshotDelete, SnapshotList,
};
use wire::reactor::Link;
use wire::session::{Event, SendError, StreamId};

/// Who a control plane says it is.
pub const CP_IDENTITY: &str = "cp";

/// A control plane's connection.
pub struct Peer {
    /// The session and its transport.
    pub link: Link,
    /// The connection's token.
    pub token: Token,
    /// From where.
    pub address: SocketAddr,
    /// What its open streams are for.
    pub streams: BTreeMap<StreamId, StreamUse>,
}

/// What a control plane's stream is for.
pub enum StreamUse {
    /// It waits for a capsule to run.
    Creating(CapsuleKey),
    /// It waits for a capsule to be paused, resumed or made a snapshot of.
    Calling(CapsuleKey),
    /// It waits for a capsule to be gone.
    Destroying(CapsuleKey),
    /// It waits for a capsule's network to be changed.
    Changing,
    /// The next message makes a capsule, which may reach this.
    AwaitCreate(Box<Policy>),
    /// It is to go on into a capsule and its first message has not come.
    AwaitInner(CapsuleKey),
    /// It goes on into a capsule.
    Forward(Box<Forward>),
    /// It is told of these capsules, as fast as it takes them.
    Listing(VecDeque<CapsuleKey>),
    /// It is answered; the caller's half is still open.
    Answered,
}

/// The error code that the far end gets.
fn snapshot_code(error: &SnapshotError) -> Code {
    match error {
        SnapshotError::Io { .. } => Code::Internal,
        SnapshotError::Name(_) => Code::InvalidRequest,
        SnapshotError::NotThere(_) => Code::NotFound,
        SnapshotError::Exists(_) => Code::AlreadyExists,
        SnapshotError::TooMany => Code::ResourceExhausted,
        SnapshotError::OtherVmm { .. } => Code::InvalidState,
        SnapshotError::Replaced(_) => Code::Unavailable,
    }
}

impl Agent {
    /// Takes an event of a control plane's session.
    pub fn on_peer_event(&mut self, id: PeerId, event: Event) {
        match event {
            Event::Authenticate { identity } => self.authenticate(id, &identity),
            Event::Ready { peer_name, .. } => {
                if let Some(peer) = self.peers.get(&id) {
                    log::info!("control plane {} connected: {peer_name}", peer.address);
                }
            }
            Event::Opened { stream, kind, body } => self.on_request(id, stream, kind, &body),
            Event::Message { stream, kind, body, cost } => {
                self.on_peer_message(id, stream, kind, &body, cost);
            }
            Event::Data { stream, channel, bytes, cost } => {
                self.on_peer_data(id, stream, channel, bytes, cost);
            }
            Event::Finished { stream } => self.on_peer_finished(id, stream),
            Event::Reset { stream, .. } => {
                if let Some(stream_use) = self.peers.get_mut(&id).and_then(|p| p.streams.remove(&stream)) {
                    self.on_peer_stream_gone(id, stream, stream_use);
                }
            }
            Event::Writable { stream } => self.pump_forward(id, stream),
            Event::GoingAway { reason, .. } => log::debug!("a control plane is going away: {reason}"),
            Event::Closed { error } => {
                if let Some(peer) = self.peers.get(&id) {
                    log::info!("control plane {}: {error}", peer.address);
                }
            }
        }
    }

    fn on_request(&mut self, id: PeerId, stream: StreamId, kind: u16, body: &[u8]) {
        let waiter = (id, stream);
        let handled = match kind {
            Health::KIND => Health::decode(body).map(|_| self.on_health(waiter)),
            HostStatus::KIND => HostStatus::decode(body).map(|_| self.on_host_status(waiter)),
            CapsuleCreate::KIND => CapsuleCreate::decode(body).map(|m| self.on_create(waiter, &m, None)),
            CapsuleDestroy::KIND => CapsuleDestroy::decode(body).map(|m| self.on_destroy(waiter, &m)),
            CapsulePause::KIND => CapsulePause::decode(body).map(|m| self.on_pause(waiter, &m)),
            CapsuleResume::KIND => CapsuleResume::decode(body).map(|m| self.on_resume(waiter, &m)),
            CapsuleSnapshot::KIND => CapsuleSnapshot::decode(body).map(|m| self.on_snapshot(waiter, m)),
            SnapshotList::KIND => SnapshotList::decode(body).map(|_| self.on_snapshot_list(waiter)),
            SnapshotDelete::KIND => SnapshotDelete::decode(body).map(|m| self.on_snapshot_delete(waiter, m)),
            CapsulePing::KIND => CapsulePing::decode(body).map(|m| self.on_ping(waiter, &m)),
            CapsuleGet::KIND => CapsuleGet::decode(body).map(|m| self.on_get(waiter, &m)),
            CapsuleList::KIND => CapsuleList::decode(body).map(|_| self.on_list(waiter)),
            message::CapsuleNetwork::KIND => {
                message::CapsuleNetwork::decode(body).map(|m| self.on_network(waiter, &m))
            }
            message::CapsuleMetrics::KIND => {
                message::CapsuleMetrics::decode(body).map(|m| self.on_metrics(waiter, &m))
            }
            message::Forward::KIND => message::Forward::decode(body).map(|m| self.on_forward(waiter, &m)),
            _ => {
                let text = format!("message kind {kind:#06x} is not one that a host agent answers");
                self.answer_error(waiter, Code::Unimplemented, text);
                Ok(())
            }
        };
        if let Err(e) = handled {
            self.answer_malformed(waiter, kind, e);
        }
    }

    pub(crate) fn answer_malformed(&mut self, waiter: (PeerId, StreamId), kind: u16, error: DecodeError) {
        let text = format!("message kind {kind:#06x} is malformed: {error}");
        self.answer_error(waiter, Code::InvalidRequest, text);
    }

    fn on_health(&mut self, waiter: (PeerId, StreamId)) {
        let uptime = self.ctx.started().elapsed();
        let reply = HealthReply {
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_ms: u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
        };
        self.answer(waiter, &reply);
    }

    fn on_host_status(&mut self, waiter: (PeerId, StreamId)) {
        let host = &self.ctx.host;
        let (capacity, promised) = (spec::capacity(host), self.promised(None));
        let left = admission::left(&capacity, &promised);
        let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let reply = HostStatusReply {
            version: env!("CARGO_PKG_VERSION").into(),
            arch: std::env::consts::ARCH.into(),
            cpu_cores: host.cpu_cores,
            memory_mb: host.memory_mb,
            memory_reserved_mb: narrow(capacity.memory_mb.saturating_sub(left.memory_mb)),
            vcpus_reserved: narrow(promised.vcpus),
            disk_mb: capacity.disk_mb,
            disk_free_mb: left.disk_mb,
            vmm: host.vmm.describe(),
            templates: host.layout.templates(),
        };
        self.answer(waiter, &reply);
    }

    /// What capsules were promised and do not have yet, but for one that may be about to be promised it again.
    fn promised(&self, but: Option<CapsuleKey>) -> Promised {
        let overhead_mb = self.ctx.host.vmm.overhead_mb();
        let others = self.capsules.values().filter(|c| Some(c.key) != but);
        others.fold(Promised::default(), |sum, c| c.add_promised(sum, overhead_mb))
    }

    /// Makes a capsule, with what it may reach where that was said.
    pub(crate) fn on_create(
        &mut self,
        waiter: (PeerId, StreamId),
        request: &CapsuleCreate,
        policy: Option<Policy>,
    ) {
        let refusal = |code: Code, text: String| Err((code, text));
        let admitted = if self.is_stopping() {
            refusal(Code::ShuttingDown, "the host agent is shutting down; try another host".into())
        } else if self.ids.contains_key(&request.capsule_id) {
            refusal(Code::AlreadyExists, format!("there is a capsule {} already", request.capsule_id))
        } else if self.capsules.len() >= MAX_CAPSULES {
            refusal(Code::ResourceExhausted, format!("this host has {MAX_CAPSULES} capsules already"))
        } else {
            Spec::admit(request, &self.ctx.host, &self.promised(None)).map_err(|e| (e.code(), e.to_string()))
        };
        let begun = admitted.and_then(|spec| self.begin_create(waiter, spec, policy));
        if let Err((code, text)) = begun {
            log::info!("capsule {:?} not admitted: {text}", request.capsule_id);
            self.answer_error(waiter, code, text);
        }
    }

    fn begin_create(
        &mut self,
        waiter: (PeerId, StreamId),
        spec: Spec,
        policy: Option<Policy>,
    ) -> Result<(), (Code, String)> {
        let directory =
            self.ctx.host.layout.capsule(&spec.id).map_err(|e| (Code::InvalidRequest, e.to_string()))?;
        let slot = self.ctx.slots.allocate();
        let slot = slot.ok_or((Code::ResourceExhausted, "all network slots are in use".to_string()))?;
        let now_ms = self.ctx.now_ms();
        let deadline_ms = now_ms + spec.deadline_ms;
        log::info!(
            "capsule {}: creating from {}, {} vCPUs, {} MiB",
            spec.id,
            spec.template,
            spec.vcpus,
            spec.memory_mb
        );
        let key = self.insert_capsule(|key| {
            let mut capsule = Capsule::new(key, spec, directory, slot, now_ms);
            capsule.creator = Some(waiter);
            if let Some(policy) = policy {
                capsule.policy = policy;
            }
            capsule
        });
        self.use_stream(waiter, StreamUse::Creating(key));
        self.ctx.timers.set(TimerKey::Capsule(key, CapsuleTimer::Deadline), deadline_ms);
        self.apply(key, LifeEvent::Create);
        Ok(())
    }

    fn on_destroy(&mut self, waiter: (PeerId, StreamId), request: &CapsuleDestroy) {
        let Some(key) = self.find(waiter, &request.capsule_id) else { return };
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        if capsule.destroyers.len() >= MAX_WAITERS {
            let text = "too many requests wait for this capsule's end already";
            self.answer_error(waiter, Code::ResourceExhausted, text);
            return;
        }
        capsule.destroyers.push(waiter);
        self.use_stream(waiter, StreamUse::Destroying(key));
        self.apply(key, LifeEvent::Destroy);
    }

    fn on_pause(&mut self, waiter: (PeerId, StreamId), request: &CapsulePause) {
        let Some(key) = self.find(waiter, &request.capsule_id) else { return };
        if let Err((code, text)) = self.begin_work(waiter, key, Work::Pause) {
            self.answer_error(waiter, code, text);
        }
    }

    fn on_resume(&mut self, waiter: (PeerId, StreamId), request: &CapsuleResume) {
        let Some(key) = self.find(waiter, &request.capsule_id) else { return };
        let deadline_ms = match request.deadline_ms {
            0 => self.ctx.host.create_deadline_ms,
            asked => u64::from(asked.min(MAX_DEADLINE_MS)),
        };
        if let Some(capsule) = self.capsules.get_mut(&key) {
            capsule.spec.deadline_ms = deadline_ms;
        }
        match self.begin_work(waiter, key, Work::Resume) {
            Ok(()) => {
                let at = self.ctx.now_ms() + deadline_ms;
                self.ctx.timers.set(TimerKey::Capsule(key, CapsuleTimer::Deadline), at);
            }
            Err((code, text)) => self.answer_error(waiter, code, text),
        }
    }

    fn on_ping(&mut self, waiter: (PeerId, StreamId), request: &CapsulePing) {
        let Some(key) = self.find(waiter, &request.capsule_id) else { return };
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        let state = capsule.state();
        if state == CapsuleState::Running {
            capsule.note_use(&mut self.ctx);
            self.answer(waiter, &Done {});
        } else {
            let text = format!("the capsule is {}, not running", state.name());
            self.answer_error(waiter, Code::InvalidState, text);
        }
    }

    fn on_snapshot(&mut self, waiter: (PeerId, StreamId), request: CapsuleSnapshot) {
        let Some(key) = self.find(waiter, &request.capsule_id) else { return };
        let CapsuleSnapshot { name, overwrite, .. } = request;
        if let Err(e) = snapshots::check_name(&self.ctx.host.layout, &name, overwrite) {
            self.answer_error(waiter, snapshot_code(&e), e.to_string());
            return;
        }
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        if let Err(text) = capsule.lifecycle.check(Work::Snapshot) {
            self.answer_error(waiter, Code::InvalidState, text);
            return;
        }
        capsule.order_snapshot(SnapshotOrder { name, overwrite });
        if let Err((code, text)) = self.begin_work(waiter, key, Work::Snapshot) {
            self.answer_error(waiter, code, text);
        }
    }

    fn on_snapshot_list(&mut self, waiter: (PeerId, StreamId)) {
        self.use_stream(waiter, StreamUse::Answered);
        let host = self.ctx.host.clone();
        self.ctx.workers.submit(move || {
            let found = snapshots::list(&host.layout);
            let infos = found.iter().map(|(name, snapshot)| snapshot.info(name)).collect();
            Report::Snapshots(waiter, SnapshotsReport::Listed(infos))
        });
    }

    fn on_snapshot_delete(&mut self, waiter: (PeerId, StreamId), request: SnapshotDelete) {
        self.use_stream(waiter, StreamUse::Answered);
        let host = self.ctx.host.clone();
        self.ctx.workers.submit(move || {
            let deleted = snapshots::delete(&host.layout, &request.name);
            Report::Snapshots(waiter, SnapshotsReport::Deleted(deleted))
        });
    }

    /// What a worker has done about snapshots is told to whoever asked.
    pub(crate) fn on_snapshots_report(&mut self, waiter: (PeerId, StreamId), report: SnapshotsReport) {
        match report {
            SnapshotsReport::Listed(infos) => {
                let Some(peer) = self.peers.get_mut(&waiter.0) else { return };
                // A few KiB for each hundred; what does not fit into the session's bound is not told.
                for info in infos {
                    if let Err(e) = peer.link.session.send(waiter.1, &info) {
                        log::warn!("a list of snapshots to {} broke off: {e}", peer.address);
                        let text = "the host has more snapshots than fit into one answer";
                        self.answer_error(waiter, Code::ResourceExhausted, text);
                        return;
                    }
                }
                self.answer(waiter, &Done {});
            }
            SnapshotsReport::Deleted(Ok(())) => self.answer(waiter, &Done {}),
            SnapshotsReport::Deleted(Err(e)) => {
                self.answer_error(waiter, snapshot_code(&e), e.to_string());
            }
        }
    }

    /// Begins what a stream then waits for, where the capsule's state and the host allow it.
    fn begin_work(
        &mut self,
        waiter: (PeerId, StreamId),
        key: CapsuleKey,
        work: Work,
    ) -> Result<(), (Code, String)> {
        if self.is_stopping() {
            return Err((Code::ShuttingDown, "the host agent is shutting down; try again".into()));
        }
        let promised = self.promised(Some(key));
        let now_ms = self.ctx.now_ms();
        let Some(capsule) = self.capsules.get_mut(&key) else { return Ok(()) };
        capsule.lifecycle.check(work).map_err(|text| (Code::InvalidState, text))?;
        let event = match work {
            Work::Pause => LifeEvent::Pause,
            Work::Snapshot => LifeEvent::Snapshot,
            Work::Resume => {
                spec::readmit(&capsule.spec, &self.ctx.host, &promised)
                    .map_err(|e| (Code::ResourceExhausted, e.to_string()))?;
                LifeEvent::Resume
            }
        };
        capsule.caller = Some(waiter);
        capsule.begun_ms = now_ms;
        self.use_stream(waiter, StreamUse::Calling(key));
        self.apply(key, event);
        Ok(())
    }

    fn on_get(&mut self, waiter: (PeerId, StreamId), request: &CapsuleGet) {
        let Some(key) = self.find(waiter, &request.capsule_id) else { return };
        if let Some(info) = self.capsules.get(&key).map(|c| c.info(&self.ctx)) {
            self.answer(waiter, &info);
        }
    }

    fn on_list(&mut self, waiter: (PeerId, StreamId)) {
        self.use_stream(waiter, StreamUse::Listing(self.capsules.keys().copied().collect()));
        self.continue_list(waiter);
    }

    /// Sends as much of a list as the session takes; what is left has its turn after the session has
    /// heard from its peer.
    pub(crate) fn continue_list(&mut self, waiter: (PeerId, StreamId)) {
        let (id, stream) = waiter;
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let Some(StreamUse::Listing(left)) = peer.streams.get_mut(&stream) else { return };
        let before = peer.link.session.output().len();
        while let Some(key) = left.front() {
            // One that is gone by now is not there to tell of.
            if let Some(capsule) = self.capsules.get(key) {
                match peer.link.session.send(stream, &capsule.info(&self.ctx)) {
                    Ok(()) => {}
                    Err(SendError::QueueFull) => {
                        let moved = peer.link.session.output().len() != before;
                        self.stalled.insert(waiter);
                        if moved {
                            self.mark(Dirty::Peer(id));
                        }
                        return;
                    }
                    Err(e) => return log::debug!("a list to {} broke off: {e}", peer.address),
                }
            }
            left.pop_front();
        }
        self.answer(waiter, &Done {});
    }

    /// The capsule with this id; where there is none, that is the answer.
    pub fn find(&mut self, waiter: (PeerId, StreamId), capsule_id: &str) -> Option<CapsuleKey> {
        let key = self.ids.get(capsule_id).copied();
        if key.is_none() {
            let shown: String = capsule_id.chars().take(80).collect();
            self.answer_error(waiter, Code::NotFound, format!("this host has no capsule {shown:?}"));
        }
        key
    }

    /// Remembers what a stream is for.
    pub fn use_stream(&mut self, waiter: (PeerId, StreamId), stream_use: StreamUse) {
        if let Some(peer) = self.peers.get_mut(&waiter.0) {
            peer.streams.insert(waiter.1, stream_use);
        }
    }

    /// Takes an event of a capsule's guest session.
    pub fn on_guest_session_event(&mut self, key: CapsuleKey, event: Event) {
        use crate::capsule::Greeting;
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        if let Some(greeting) = capsule.on_greeting_event(&event) {
            match greeting {
                Greeting::Pending => {}
                Greeting::Prepared => capsule.on_prepared(&mut self.ctx),
                Greeting::Welcome => {
                    if let Some(event) = capsule.on_welcome(&mut self.ctx) {
                        self.apply(key, event);
                    }
                }
                Greeting::Refused(reason) if capsule.state() == CapsuleState::Running => {
                    self.lose_guest(key, reason);
                }
                // Asking again would bring the same answer.
                Greeting::Refused(reason) => {
                    let failure = Failure::Make { part: Part::Guest, reason };
                    self.apply(key, LifeEvent::GuestRefused(failure));
                }
            }
            return;
        }
        match event {
            Event::Ready { peer_name, .. } => {
                log::debug!("capsule {}: session with {peer_name}", capsule.spec.id);
                capsule.greet_guest();
            }
            Event::Message { stream, kind, body, cost } => {
                self.relay_from_guest(key, stream, |pipe| pipe.push_message(kind, &body, cost));
            }
            Event::Data { stream, channel, bytes, cost } => {
                self.relay_from_guest(key, stream, |pipe| pipe.push_data(channel, bytes, cost));
            }
            Event::Finished { stream } => self.relay_from_guest(key, stream, |pipe| pipe.push_end()),
            Event::Writable { stream } => {
                if let Some((peer, outer)) = capsule.forwards.get(&stream).copied() {
                    self.pump_forward(peer, outer);
                }
            }
            Event::Reset { stream, code, reason } => {
                if let Some((peer, outer)) = capsule.forwards.remove(&stream) {
                    self.reset_peer_stream(peer, outer, Code::from_number(code), &reason);
                }
            }
            Event::Opened { stream, .. } => {
                // A guest has nothing to ask of its host.
                if let Some(guest) = capsule.session() {
                    guest.link.session.reset(stream, Code::Unimplemented, "the host answers no requests");
                }
            }
            Event::Closed { error } => self.lose_guest(key, error.to_string()),
            Event::GoingAway { .. } | Event::Authenticate { .. } => {}
        }
    }

    /// The session to a guest daemon is over or useless: everything on it ends, and unless the capsule is
    /// going down it is made again.
    fn lose_guest(&mut self, key: CapsuleKey, reason: String) {
        self.reset_forwards(key, Code::Unavailable, "the connection to the capsule was lost; try again");
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        log::debug!("capsule {}: guest session: {reason}", capsule.spec.id);
        if capsule.state() == CapsuleState::Running {
            log::warn!("capsule {}: lost the guest daemon: {reason}", capsule.spec.id);
        }
        match capsule.state() {
            // Nobody needs it now; after a snapshot it is looked for again.
            CapsuleState::Pausing | CapsuleState::Snapshotting => {
                capsule.drop_guest(&mut self.ctx);
                capsule.on_prepared(&mut self.ctx);
            }
            _ => capsule.retry_guest(&mut self.ctx, reason),
        }
        self.apply(key, LifeEvent::GuestLost);
        self.mark(Dirty::Guest(key));
    }
}
