//! Forwarded streams: a control plane's stream that goes on into a capsule.
//!
//! The control plane opens a stream with `Forward`; its next message opens a stream to the guest daemon,
//! and from there on the two are one, each direction a [`Pipe`].

use crate::agent::{Agent, Dirty};
use crate::capsule::CapsuleKey;
use crate::context::PeerId;
use crate::service::StreamUse;
use wire::message::{self as message, Code};
use wire::session::{OpenError, StreamId};
use wire::splice::{Flow, Pipe};

/// A stream of a control plane and the one in the capsule that it is joined to.
pub struct Forward {
    /// The capsule.
    pub capsule: CapsuleKey,
    /// The stream of the guest session.
    pub inner: StreamId,
    to_guest: Pipe,
    to_peer: Pipe,
}

impl Agent {
    pub(crate) fn on_forward(&mut self, waiter: (PeerId, StreamId), request: &message::Forward) {
        if let Some(key) = self.find(waiter, &request.capsule_id) {
            self.use_stream(waiter, StreamUse::AwaitInner(key));
        }
    }

    /// A further message of a control plane's stream.
    pub(crate) fn on_peer_message(
        &mut self,
        id: PeerId,
        stream: StreamId,
        kind: u16,
        body: &[u8],
        cost: u32,
    ) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        match peer.streams.get_mut(&stream) {
            Some(StreamUse::Forward(forward)) => {
                forward.to_guest.push_message(kind, body, cost);
                self.pump_forward(id, stream);
            }
            Some(StreamUse::AwaitCreate(policy)) => {
                let policy = std::mem::take(&mut **policy);
                peer.link.session.release(stream, cost);
                self.on_create_with((id, stream), policy, kind, body);
            }
            Some(StreamUse::AwaitInner(key)) => {
                let key = *key;
                peer.link.session.release(stream, cost);
                self.open_inner((id, stream), key, kind, body);
            }
            // A request is one message; what follows it is of no use.
            _ => peer.link.session.release(stream, cost),
        }
    }

    /// Bytes of a control plane's stream.
    pub(crate) fn on_peer_data(
        &mut self,
        id: PeerId,
        stream: StreamId,
        channel: u8,
        bytes: Vec<u8>,
        cost: u32,
    ) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        match peer.streams.get_mut(&stream) {
            Some(StreamUse::Forward(forward)) => {
                forward.to_guest.push_data(channel, bytes, cost);
                self.pump_forward(id, stream);
            }
            _ => peer.link.session.release(stream, cost),
        }
    }

    /// A control plane has ended its half of a stream.
    pub(crate) fn on_peer_finished(&mut self, id: PeerId, stream: StreamId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        match peer.streams.get_mut(&stream) {
            Some(StreamUse::Forward(forward)) => {
                forward.to_guest.push_end();
                self.pump_forward(id, stream);
            }
            Some(StreamUse::AwaitCreate(_)) => {
                let text =
                    "a CapsuleNetwork message without a capsule id has to be followed by CapsuleCreate";
                self.answer_error((id, stream), Code::InvalidRequest, text);
            }
            Some(StreamUse::Changing) => {}
            Some(StreamUse::AwaitInner(_)) => {
                let text = "a Forward message has to be followed by a message for the capsule";
                self.answer_error((id, stream), Code::InvalidRequest, text);
            }
            Some(StreamUse::Answered) => {
                peer.streams.remove(&stream);
            }
            // The answer is still to come on the other half.
            Some(
                StreamUse::Creating(_)
                | StreamUse::Calling(_)
                | StreamUse::Destroying(_)
                | StreamUse::Listing(_),
            )
            | None => {}
        }
    }

    fn open_inner(&mut self, waiter: (PeerId, StreamId), key: CapsuleKey, kind: u16, body: &[u8]) {
        let Some(capsule) = self.capsules.get_mut(&key) else {
            self.answer_error(waiter, Code::NotFound, "the capsule was destroyed");
            return;
        };
        let state = capsule.state();
        if let Some(why) = capsule.why_stalled() {
            self.answer_error(waiter, Code::Unavailable, why.to_string());
            return;
        }
        let Some(guest) = capsule.welcome_guest() else {
            let (code, text) = if state == message::CapsuleState::Running {
                (Code::Unavailable, "its guest daemon does not answer at the moment; try again".to_string())
            } else {
                (Code::InvalidState, format!("the capsule is {}, not running", state.name()))
            };
            self.answer_error(waiter, code, text);
            return;
        };
        let mut payload = Vec::with_capacity(2 + body.len());
        payload.extend_from_slice(&kind.to_be_bytes());
        payload.extend_from_slice(body);
        match guest.link.session.open_raw(payload, false) {
            Ok(inner) => {
                capsule.forwards.insert(inner, waiter);
                capsule.note_use(&mut self.ctx);
                let forward =
                    Forward { capsule: key, inner, to_guest: Pipe::default(), to_peer: Pipe::default() };
                self.use_stream(waiter, StreamUse::Forward(Box::new(forward)));
                self.mark(Dirty::Guest(key));
            }
            Err(e) => {
                let code = match e {
                    OpenError::TooManyStreams => Code::ResourceExhausted,
                    OpenError::TooLong => Code::InvalidRequest,
                    OpenError::NotReady | OpenError::GoingAway | OpenError::Exhausted => Code::Unavailable,
                };
                self.answer_error(waiter, code, format!("the capsule's connection: {e}"));
            }
        }
    }

    /// Something has come from a guest for a forwarded stream.
    pub(crate) fn relay_from_guest(
        &mut self,
        key: CapsuleKey,
        inner: StreamId,
        push: impl FnOnce(&mut Pipe),
    ) {
        let Some(waiter) = self.capsules.get(&key).and_then(|c| c.forwards.get(&inner)).copied() else {
            return;
        };
        let (id, stream) = waiter;
        if let Some(StreamUse::Forward(forward)) =
            self.peers.get_mut(&id).and_then(|p| p.streams.get_mut(&stream))
        {
            push(&mut forward.to_peer);
            self.pump_forward(id, stream);
        }
    }

    /// Moves what a forwarded stream holds, both ways.
    pub(crate) fn pump_forward(&mut self, id: PeerId, stream: StreamId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let Some(StreamUse::Forward(forward)) = peer.streams.get_mut(&stream) else { return };
        let (key, inner) = (forward.capsule, forward.inner);
        let Some(guest) = self.capsules.get_mut(&key).and_then(|c| c.session()) else { return };
        let (outer, inside) = (&mut peer.link.session, &mut guest.link.session);
        let before = (outer.output().len(), inside.output().len());
        let (inward, spent) = forward.to_guest.pump(&mut (&mut *inside, inner));
        outer.release(stream, spent);
        let (outward, spent) = forward.to_peer.pump(&mut (&mut *outer, stream));
        inside.release(inner, spent);
        // Only where something moved: a stalled stream that is tried again must not keep the loop awake.
        let (outer_moved, inside_moved) =
            (outer.output().len() != before.0, inside.output().len() != before.1);
        if outer_moved {
            self.mark(Dirty::Peer(id));
        }
        if inside_moved {
            self.mark(Dirty::Guest(key));
        }
        match (inward, outward) {
            (Flow::Ended, Flow::Ended) => self.end_forward(id, stream),
            (Flow::Broken, _) | (_, Flow::Broken) => {
                // One side is gone and its reset is on the way to us, or has just been dealt with.
                if let Some((peer, outer)) = self.end_forward_of(key, inner) {
                    self.reset_peer_stream(
                        peer,
                        outer,
                        Code::Cancelled,
                        "the other end of the stream is gone",
                    );
                }
            }
            (Flow::Stalled, _) | (_, Flow::Stalled) => {
                self.stalled.insert((id, stream));
            }
            _ => {}
        }
    }

    fn end_forward(&mut self, id: PeerId, stream: StreamId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if let Some(StreamUse::Forward(forward)) = peer.streams.remove(&stream)
            && let Some(capsule) = self.capsules.get_mut(&forward.capsule)
        {
            capsule.forwards.remove(&forward.inner);
            capsule.note_use(&mut self.ctx);
        }
    }

    fn end_forward_of(&mut self, key: CapsuleKey, inner: StreamId) -> Option<(PeerId, StreamId)> {
        let capsule = self.capsules.get_mut(&key)?;
        if let Some(guest) = capsule.session() {
            guest.link.session.reset(inner, Code::Cancelled, "the caller is gone");
        }
        capsule.forwards.remove(&inner)
    }

    /// Ends a control plane's stream at once.
    pub(crate) fn reset_peer_stream(&mut self, id: PeerId, stream: StreamId, code: Code, reason: &str) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let stream_use = peer.streams.remove(&stream);
        peer.link.session.reset(stream, code, reason);
        if let Some(StreamUse::Forward(forward)) = stream_use {
            self.give_back(id, &forward);
        }
        self.mark(Dirty::Peer(id));
    }

    /// Gives back the credit of what a forwarded stream held when it was given up. The streams' own ended
    /// with them; the sessions' would be lost, and a session without credit stands still.
    pub(crate) fn give_back(&mut self, id: PeerId, forward: &Forward) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.link.session.release(0, forward.to_guest.owed());
        }
        if let Some(guest) = self.capsules.get_mut(&forward.capsule).and_then(|c| c.session()) {
            guest.link.session.release(0, forward.to_peer.owed());
            self.mark(Dirty::Guest(forward.capsule));
        }
    }

    /// Ends all forwarded streams of a capsule whose guest session is gone.
    pub(crate) fn reset_forwards(&mut self, key: CapsuleKey, code: Code, reason: &str) {
        let Some(capsule) = self.capsules.get_mut(&key) else { return };
        for (_, (id, stream)) in std::mem::take(&mut capsule.forwards) {
            self.reset_peer_stream(id, stream, code, reason);
        }
    }
}
