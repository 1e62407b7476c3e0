//! `GET /v1/snapshots`: the templates that capsules can be made of.

use super::fields::invalid;
use super::principal::Principal;
use crate::db::capsules;
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /v1/snapshots`. Base templates are those that the team's hosts say they have.
pub fn list(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let templates = db.read(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            match request.query("type") {
                None | Some("" | "base") => Ok(capsules::base_templates(sql, &principal.team_id)?),
                Some("snapshot") => Ok(Vec::new()),
                Some(other) => Err(invalid(&format!("type must be base or snapshot, not {other:?}")).into()),
            }
        })?;
        let base = |name: &String| json!({"name": name, "type": "base", "platform": true, "protected": true});
        let templates: Vec<Value> = templates.iter().map(base).collect();
        Step::respond(Response::json(200, &templates))
    })
}
