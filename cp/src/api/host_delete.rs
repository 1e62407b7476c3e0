//! The end of a host: what would go with it, and its deletion.

use super::hosts::managed;
use crate::audit::{self, Event};
use crate::db::{Sql, Stop, capsules, hosts};
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, HostError, Request, Response, Step};
use serde_json::json;
use std::sync::Arc;
use wire::message::{CapsuleDestroy, CapsuleState, Code};

/// How long a host may take to destroy one capsule, in milliseconds.
pub const DESTROY_TIMEOUT_MS: u64 = 20_000;

/// `GET /v1/hosts/{id}/delete-preview`.
pub fn preview(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (host, ids) = db.transaction(|sql| {
            let (_, host) = managed(sql, &context, &request)?;
            let ids = capsules::ids_on_host(sql, &host.id)?;
            Ok((host, ids))
        })?;
        Step::respond(Response::json(200, &json!({"host": host, "sandbox_ids": ids})))
    })
}

/// `DELETE /v1/hosts/{id}`, with `?force=true` also when it has capsules: they are destroyed.
pub fn delete(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let is_forced = match request.query("force") {
            None | Some("" | "false" | "0") => false,
            Some("true" | "1") => true,
            Some(other) => {
                let message = format!("force must be true or false, not {other:?}");
                return Err(Response::error(400, "invalid_request", &message));
            }
        };
        let (address, ids) = db.transaction(|sql| {
            let (_, host) = managed(sql, &context, &request)?;
            let ids = capsules::ids_on_host(sql, &host.id)?;
            if !ids.is_empty() && !is_forced {
                return Err(has_capsules(&ids).into());
            }
            for id in &ids {
                begin_end(sql, id)?;
            }
            Ok((host.address, ids))
        })?;
        let end = HostEnd { request, context, address: address.unwrap_or_default(), ids };
        end.destroy_next()
    })
}

fn has_capsules(ids: &[String]) -> Response {
    Response::error_with(
        409,
        "host_has_capsules",
        "the host has capsules; destroy them first, or delete it with ?force=true",
        json!({"capsule_ids": ids, "sandbox_ids": ids}),
    )
}

/// Any state in which a capsule is there.
pub(super) const ALIVE: [CapsuleState; 9] = [
    CapsuleState::Pending,
    CapsuleState::Starting,
    CapsuleState::Running,
    CapsuleState::Pausing,
    CapsuleState::Paused,
    CapsuleState::Resuming,
    CapsuleState::Snapshotting,
    CapsuleState::Hibernated,
    CapsuleState::Stopping,
];

fn begin_end(sql: &mut dyn Sql, id: &str) -> Result<(), Stop> {
    capsules::change_state(sql, id, &ALIVE, CapsuleState::Stopping, None)?;
    Ok(())
}

struct HostEnd {
    request: Request,
    context: Arc<Context>,
    address: String,
    /// The capsules that are still to be destroyed.
    ids: Vec<String>,
}

impl HostEnd {
    fn destroy_next(mut self) -> Flow {
        let Some(id) = self.ids.pop() else { return self.delete_record() };
        let host_id = self.request.param("id").to_string();
        let message = CapsuleDestroy { capsule_id: id.clone() };
        HostCall::new(&host_id, &self.address, &message, DESTROY_TIMEOUT_MS).detached().then(move |result| {
            match result {
                Ok(_) => self.destroy_next(),
                Err(error) if error.remote_code() == Some(Code::NotFound) => self.destroy_next(),
                // A host that cannot be reached is deleted all the same: that is what force is for.
                // Should it ever come back, its token is void and nobody reaches its capsules.
                Err(HostError::Unreachable { .. } | HostError::BadAddress { .. }) => self.delete_record(),
                Err(error) => Err(error.into()),
            }
        })
    }

    fn delete_record(self) -> Flow {
        Step::database(move |db| {
            db.transaction(|sql| {
                let (principal, host) = managed(sql, &self.context, &self.request)?;
                for id in capsules::ids_on_host(sql, &host.id)? {
                    capsules::change_state(
                        sql,
                        &id,
                        &[CapsuleState::Stopping],
                        CapsuleState::Stopped,
                        Some("its host was deleted"),
                    )?;
                }
                let left = capsules::ids_on_host(sql, &host.id)?;
                if !left.is_empty() {
                    return Err(has_capsules(&left).into());
                }
                hosts::delete(sql, &host.id)?;
                let event = Event::new(host.team_id.as_deref(), "host.delete", &host.id);
                Ok(audit::write(sql, &principal.actor, &event)?)
            })?;
            Step::respond(Response::no_content())
        })
    }
}
