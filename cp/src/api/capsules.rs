//! `/v1/capsules`: the team's capsules. [`super::capsule_create`] makes them.

use super::capsule_access::{find, no_such_capsule};
use super::host_delete::{ALIVE, DESTROY_TIMEOUT_MS};
use super::principal::Principal;
use crate::audit::{self, Event};
use crate::db::capsules;
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, HostError, Request, Response, Step};
use std::sync::Arc;
use wire::message::{CapsuleDestroy, CapsuleState, Code};

/// `GET /v1/capsules`.
pub fn list(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let capsules = db.read(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            Ok(capsules::list(sql, &principal.team_id)?)
        })?;
        Step::respond(Response::json(200, &capsules))
    })
}

/// `GET /v1/capsules/{id}`.
pub fn get(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let capsule = db.read(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            find(sql, &principal, request.param("id"))
        })?;
        Step::respond(Response::json(200, &capsule))
    })
}

/// `DELETE /v1/capsules/{id}`. Answered once nothing of it is left on its host. When the host cannot be
/// reached now, the reconciler destroys it as soon as it can.
pub fn delete(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (principal, capsule, is_there) = db.transaction(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let capsule = find(sql, &principal, request.param("id"))?;
            if capsule.status == CapsuleState::Stopped {
                return Err(no_such_capsule().into());
            }
            let is_there = capsules::change_state(sql, &capsule.id, &ALIVE, CapsuleState::Stopping, None)?;
            Ok((principal, capsule, is_there))
        })?;
        let id = capsule.id;
        let destroyed = {
            let id = id.clone();
            move || destroyed(&principal, &id)
        };
        match (is_there, capsule.host_id, capsule.host_address) {
            (true, Some(host_id), Some(address)) => {
                let message = CapsuleDestroy { capsule_id: id };
                HostCall::new(&host_id, &address, &message, DESTROY_TIMEOUT_MS).detached().then(
                    move |result| match result {
                        Ok(_) => destroyed(),
                        Err(error) if error.remote_code() == Some(Code::NotFound) => destroyed(),
                        Err(error) => Err(postponed(error)),
                    },
                )
            }
            // It failed, its host does not know it, or its host was deleted: only the record is left.
            _ => destroyed(),
        }
    })
}

fn destroyed(principal: &Principal, id: &str) -> Flow {
    let (principal, id) = (principal.clone(), id.to_string());
    Step::database(move |db| {
        db.transaction(|sql| {
            let from = [CapsuleState::Stopping, CapsuleState::Error, CapsuleState::Missing];
            // Another request or the reconciler may have been faster; it is one destruction.
            if capsules::change_state(sql, &id, &from, CapsuleState::Stopped, None)? {
                let event = Event::new(Some(&principal.team_id), "capsule.destroy", &id);
                audit::write(sql, &principal.actor, &event)?;
            }
            Ok(())
        })?;
        Step::respond(Response::no_content())
    })
}

fn postponed(error: HostError) -> Response {
    let message = format!("{error}; the capsule will be destroyed as soon as its host can be reached");
    let response = Response::from(error);
    let code = if response.status == 503 { "host_unavailable" } else { "agent_error" };
    Response::error(if response.status == 503 { 503 } else { 502 }, code, &message)
}
