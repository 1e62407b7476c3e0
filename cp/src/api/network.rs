//! `/v1/capsules/{id}/network`: what a capsule may reach, and changing that while it runs.

use super::capsule_access::{Target, find, no_such_capsule, target};
use super::fields::invalid;
use super::principal::Principal;
use crate::audit::{self, Event};
use crate::db::networks;
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, HostError, Request, Response, Step};
use crate::network::Network;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use wire::message::{CapsuleState, Done};

/// How long a host may take to replace a capsule's rules, in milliseconds.
pub(super) const CHANGE_TIMEOUT_MS: u64 = 15_000;
/// After how long a change is no longer waited for, in seconds: its control plane was stopped meanwhile.
pub(super) const ABANDONED_SEC: f64 = 20.0;
/// What it is called in the audit log.
pub(super) const EVENT: &str = "capsule.network";

/// `GET /v1/capsules/{id}/network`.
pub fn get(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let network = db.read(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let capsule = find(sql, &principal, request.param("id"))?;
            if capsule.status == CapsuleState::Stopped {
                return Err(no_such_capsule().into());
            }
            Ok(networks::get(sql, &capsule.id)?)
        })?;
        Step::respond(Response::json(200, &network))
    })
}

/// `PATCH /v1/capsules/{id}/network`. Answered once the host has changed it, for connections that exist as
/// well.
pub fn change(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let change = db.transaction(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let capsule = find(sql, &principal, request.param("id"))?;
            let target = target(&capsule)?;
            let fields = fields(&request)?;
            let stored = networks::begin(sql, &capsule.id, ABANDONED_SEC)?.ok_or_else(|| {
                let message = "another change of the capsule's network is under way; look at what holds then, \
                               and try again";
                Response::error(409, "conflict", message)
            })?;
            let network = stored.network.with("", &fields).map_err(|e| invalid(&e.to_string()))?;
            Ok(Change { principal, target, network, revision: stored.revision })
        })?;
        let Target { host_id, address, capsule_id } = &change.target;
        let message = change.network.message(capsule_id, change.revision);
        HostCall::new(host_id, address, &message, CHANGE_TIMEOUT_MS)
            .until::<Done>()
            .detached()
            .then(move |result| change.finish(result.and_then(|reply| reply.message::<Done>())))
    })
}

fn fields(request: &Request) -> Result<Map<String, Value>, Response> {
    match request.json()? {
        Value::Object(fields) if fields.values().any(|value| !value.is_null()) => Ok(fields),
        Value::Object(_) => Err(invalid(
            "there is nothing to change: give at least one of allow_internet, allow, deny, limits",
        )),
        _ => Err(invalid("the request body must be a JSON object")),
    }
}

/// A change on its way.
struct Change {
    principal: Principal,
    target: Target,
    network: Network,
    revision: u64,
}

impl Change {
    fn finish(self, result: Result<Done, HostError>) -> Flow {
        Step::database(move |db| {
            let id = &self.target.capsule_id;
            let details = json!({"network": self.network});
            let event = Event::new(Some(&self.principal.team_id), EVENT, id).with(details);
            match result {
                Ok(_) => {
                    db.transaction(|sql| {
                        networks::end(sql, id, self.revision)?;
                        // Where a later change was noted first, that is what holds on the host as well.
                        networks::finish(sql, id, &self.network, self.revision)?;
                        Ok(audit::write(sql, &self.principal.actor, &event)?)
                    })?;
                    Step::respond(Response::json(200, &self.network))
                }
                Err(error) => {
                    let reason = error.to_string();
                    db.transaction(|sql| {
                        networks::end(sql, id, self.revision)?;
                        Ok(audit::write(sql, &self.principal.actor, &event.clone().failed(&reason))?)
                    })?;
                    Err(error.into())
                }
            }
        })
    }
}
