//! `GET /v1/snapshots`: the templates that capsules can be made of.

use super::fields::invalid;
use super::principal::Principal;
use super::snapshots::shown;
use crate::db::{capsules, snapshots};
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /v1/snapshots`. Base templates are those that the team's hosts say they have; snapshots are the
/// team's own.
pub fn list(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (base, own) = db.read(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let (wants_base, wants_own) = match request.query("type") {
                None | Some("") => (true, true),
                Some("base") => (true, false),
                Some("snapshot") => (false, true),
                Some(other) => {
                    return Err(invalid(&format!("type must be base or snapshot, not {other:?}")).into());
                }
            };
            let base =
                if wants_base { capsules::base_templates(sql, &principal.team_id)? } else { Vec::new() };
            let own = if wants_own { snapshots::list(sql, &principal.team_id)? } else { Vec::new() };
            Ok((base, own))
        })?;
        let as_base =
            |name: &String| json!({"name": name, "type": "base", "platform": true, "protected": true});
        let templates: Vec<Value> = base.iter().map(as_base).chain(own.iter().map(shown)).collect();
        Step::respond(Response::json(200, &templates))
    })
}
