//! From a request to the capsule that it is about, ready to be talked to.

use super::principal::{Credential, Principal, authenticate, credential};
use crate::auth::id::Kind;
use crate::db::capsules::{self, Capsule};
use crate::db::{Sql, Stop};
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use std::sync::Arc;
use wire::message::CapsuleState;

/// A running capsule and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its host.
    pub host_id: String,
    /// Where its host's agent listens, `IP:PORT`.
    pub address: String,
    /// `cl-…`
    pub capsule_id: String,
}

/// 404 for a capsule that is not there, or not the team's.
pub fn no_such_capsule() -> Response {
    Response::error(404, "not_found", "there is no such capsule in your team")
}

/// The team's capsule, whatever its state.
///
/// # Errors
/// 404 when the team has none of that id.
pub fn find(sql: &mut dyn Sql, principal: &Principal, id: &str) -> Result<Capsule, Stop> {
    if !Kind::Capsule.accepts(id) {
        return Err(no_such_capsule().into());
    }
    Ok(capsules::find(sql, &principal.team_id, id)?.ok_or_else(no_such_capsule)?)
}

/// 409 for a capsule that is not in the state that this needs.
pub fn wrong_state(capsule: &Capsule, needed: &str) -> Response {
    let why = match (&capsule.failure, capsule.status) {
        (Some(failure), CapsuleState::Error | CapsuleState::Missing) => format!(" ({failure})"),
        _ => String::new(),
    };
    let message = format!("the capsule is {}{why}; this needs one that is {needed}", capsule.status.name());
    Response::error(409, "invalid_state", &message)
}

/// How to reach a capsule.
///
/// # Errors
/// 409 when it does not run, 503 when its host is silent.
pub fn target(capsule: &Capsule) -> Result<Target, Response> {
    target_in(capsule, &[CapsuleState::Running])
}

/// How to reach the host of a capsule that has to be in one of some states; the first is what is asked for.
///
/// # Errors
/// 409 when it is in another, 503 when its host is silent.
pub fn target_in(capsule: &Capsule, states: &[CapsuleState]) -> Result<Target, Response> {
    if !states.contains(&capsule.status) {
        return Err(wrong_state(capsule, states.first().map_or("", |state| state.name())));
    }
    match (&capsule.host_id, &capsule.host_address) {
        (Some(host_id), Some(address)) if capsule.is_host_live => {
            Ok(Target { host_id: host_id.clone(), address: address.clone(), capsule_id: capsule.id.clone() })
        }
        _ => Err(Response::error(
            503,
            "host_unavailable",
            "the capsule's host has not been heard of in the last 90 seconds; try again later",
        )),
    }
}

/// Authenticates by the request's headers, finds the running capsule of the route's `{id}`, notes its use
/// and goes on with it.
///
/// # Errors
/// 401 without a credential.
pub fn with_capsule(
    request: &Request,
    context: &Arc<Context>,
    then: impl FnOnce(Target) -> Flow + Send + 'static,
) -> Flow {
    with_capsule_as(credential(request)?, request.param("id"), context, then)
}

/// The same with a credential from elsewhere.
///
/// # Errors
/// Never by itself; the step that it gives ends with 401, 404, 409 or 503.
pub fn with_capsule_as(
    credential: Credential,
    capsule_id: &str,
    context: &Arc<Context>,
    then: impl FnOnce(Target) -> Flow + Send + 'static,
) -> Flow {
    let (capsule_id, context) = (capsule_id.to_string(), Arc::clone(context));
    Step::database(move |db| {
        let target = db.read(|sql| {
            let principal = authenticate(sql, &context, &credential)?;
            let capsule = find(sql, &principal, &capsule_id)?;
            let target = target(&capsule)?;
            capsules::touch(sql, &capsule.id)?;
            Ok(target)
        })?;
        then(target)
    })
}
