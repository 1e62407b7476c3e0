//! The agent's wire sessions: taking control planes' connections, moving bytes on every session that was
//! touched, and answering.

use crate::agent::{Agent, Dirty};
use crate::capsule::lifecycle::Event as LifeEvent;
use crate::capsule::{Capsule, CapsuleKey, CapsuleTimer};
use crate::context::{PeerId, Source, TimerKey, nonce};
use crate::service::{CP_IDENTITY, Peer, StreamUse};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use wire::message::{Code, Error as ErrorMessage, Message};
use wire::reactor::{Link, Socket};
use wire::session::{Limits, Session, StreamId};

/// Connections of control planes at once, those that have not authenticated yet included.
pub const MAX_PEERS: usize = 64;
/// Connections taken in one turn.
const ACCEPT_BUDGET: usize = 16;
/// How often sessions are gone over in one turn before others have theirs.
const PUMP_BUDGET: usize = 4096;

impl Agent {
    /// Takes the connections that wait, up to a budget.
    pub(crate) fn accept_peers(&mut self) {
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
            if self.is_stopping() {
                log::debug!("connection from {address} refused: shutting down");
                continue;
            }
            if self.peers.len() >= MAX_PEERS && !self.drop_oldest_stranger() {
                log::warn!("connection from {address} refused: {MAX_PEERS} control planes are connected");
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

    /// Closes the connection that has been without proof of who it is for longest, so that strangers who
    /// connect and say nothing cannot keep control planes out. False when there is none.
    fn drop_oldest_stranger(&mut self) -> bool {
        let stranger = self.peers.iter().find(|(_, peer)| !peer.link.session.is_ready());
        let Some((id, address)) = stranger.map(|(id, peer)| (*id, peer.address)) else { return false };
        log::warn!("connection from {address} closed: {MAX_PEERS} are open and it has not said who it is");
        self.close_peer(id);
        true
    }

    /// Reads, deals with and writes everything that sessions have, up to a budget; what is left has its
    /// turn after the next look at the kernel.
    pub(crate) fn pump_all(&mut self) {
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
    pub fn on_peer_stream_gone(&mut self, id: PeerId, stream: StreamId, stream_use: StreamUse) {
        match stream_use {
            StreamUse::Creating(key) => {
                if let Some(capsule) = self.capsules.get_mut(&key) {
                    capsule.creator = None;
                    self.apply(key, LifeEvent::Cancel);
                }
            }
            StreamUse::Calling(key) => {
                // What was begun is finished all the same.
                if let Some(capsule) = self.capsules.get_mut(&key) {
                    capsule.caller = None;
                }
            }
            StreamUse::Destroying(key) => {
                if let Some(capsule) = self.capsules.get_mut(&key) {
                    capsule.destroyers.retain(|w| *w != (id, stream));
                }
            }
            // What was begun is finished all the same.
            StreamUse::Changing | StreamUse::AwaitCreate(_) => {}
            StreamUse::Forward(forward) => {
                let Some(capsule) = self.capsules.get_mut(&forward.capsule) else { return };
                if capsule.forwards.remove(&forward.inner).is_some()
                    && let Some(guest) = capsule.session()
                {
                    guest.link.session.reset(forward.inner, Code::Cancelled, "the caller is gone");
                    self.mark(Dirty::Guest(forward.capsule));
                }
                self.give_back(id, &forward);
            }
            StreamUse::AwaitInner(_) | StreamUse::Listing(_) | StreamUse::Answered => {}
        }
    }

    /// Sends the one answer of a stream and ends this side's half.
    pub fn answer<M: Message>(&mut self, waiter: (PeerId, StreamId), message: &M) {
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
    pub fn answer_error(&mut self, waiter: (PeerId, StreamId), code: Code, text: impl Into<String>) {
        self.answer(waiter, &ErrorMessage::new(code, text));
    }

    /// Answers [`wire::session::Event::Authenticate`] of a control plane.
    pub fn authenticate(&mut self, id: PeerId, identity: &str) {
        let verifier = (identity == CP_IDENTITY).then(|| self.verifier.clone());
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.link.session.provide_verifier(verifier, &self.decoy_key);
    }
}
