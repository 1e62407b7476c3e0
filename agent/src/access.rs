//! What capsules may reach, as a control plane asks for it: with their making, and while they run.

use crate::agent::Agent;
use crate::context::PeerId;
use crate::net::{NetError, Policy};
use crate::service::StreamUse;
use wire::message::{CapsuleCreate, CapsuleNetwork, Code, Done, Message};
use wire::session::StreamId;

impl Agent {
    /// Changes a capsule's network, or waits for the message that makes the capsule.
    pub(crate) fn on_network(&mut self, waiter: (PeerId, StreamId), request: &CapsuleNetwork) {
        let policy = match Policy::of(request) {
            Ok(policy) => policy,
            Err(e) => return self.answer_error(waiter, Code::InvalidRequest, e.to_string()),
        };
        if request.capsule_id.is_empty() {
            self.use_stream(waiter, StreamUse::AwaitCreate(Box::new(policy)));
            return;
        }
        let Some(key) = self.find(waiter, &request.capsule_id) else { return };
        let Some(capsule) = self.capsules.get(&key) else { return };
        match capsule.change_network(&self.ctx, policy, waiter) {
            Ok(()) => self.use_stream(waiter, StreamUse::Changing),
            Err(text) => self.answer_error(waiter, Code::InvalidState, text),
        }
    }

    /// The message after the one that said what the new capsule may reach.
    pub(crate) fn on_create_with(
        &mut self,
        waiter: (PeerId, StreamId),
        policy: Policy,
        kind: u16,
        body: &[u8],
    ) {
        if kind != CapsuleCreate::KIND {
            let text = "a CapsuleNetwork message without a capsule id has to be followed by CapsuleCreate";
            return self.answer_error(waiter, Code::InvalidRequest, text);
        }
        match CapsuleCreate::decode(body) {
            Ok(request) => self.on_create(waiter, &request, Some(policy)),
            Err(e) => self.answer_malformed(waiter, kind, e),
        }
    }

    /// A change of a capsule's network is made, or not.
    pub(crate) fn on_network_changed(
        &mut self,
        waiter: (PeerId, StreamId),
        capsule_id: &str,
        result: Result<(), NetError>,
    ) {
        match result {
            Ok(()) => {
                log::info!("capsule {capsule_id}: its network policy has changed");
                self.answer(waiter, &Done {});
            }
            Err(e) => {
                log::warn!("capsule {capsule_id}: changing its network policy: {e}");
                let code = match e {
                    NetError::Ended | NetError::Superseded { .. } => Code::InvalidState,
                    _ => Code::Internal,
                };
                self.answer_error(waiter, code, format!("changing the network policy: {e}"));
            }
        }
    }
}
