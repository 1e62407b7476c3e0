//! `/v1/api-keys`.

use super::fields::Fields;
use super::principal::Principal;
use crate::audit::{self, Event};
use crate::auth::id::Kind;
use crate::auth::{random, secret};
use crate::db::api_keys::{self, NewApiKey};
use crate::db::teams;
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::json;
use std::sync::Arc;
use wire::auth::{ITERATIONS, Verifier};

/// The most keys that a team may have.
pub const MAX_KEYS: i64 = 500;

/// `POST /v1/api-keys`. The key itself is in this answer and nowhere else.
pub fn create(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let principal = db.read(|sql| Principal::person(sql, &context, &request))?;
        let name = Fields::of_optional(&request)?.text("name", 100)?.map(|name| name.trim().to_string());
        let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| "Unnamed API Key".to_string());
        let key = secret::new_api_key();
        let id = Kind::ApiKey.new_id();
        // 4096 rounds of HMAC: a few milliseconds.
        let verifier = Verifier::new(key.as_bytes(), &random::bytes::<16>(), ITERATIONS).to_text();
        let made = db.transaction(|sql| {
            // They may have been removed meanwhile, and with them the keys that they had until then.
            if !teams::hold_member(sql, &principal.team_id, principal.actor.id())? {
                return Err(
                    Response::error(403, "forbidden", "you are no member of this team any more").into()
                );
            }
            if api_keys::count(sql, &principal.team_id)? >= MAX_KEYS {
                let message = format!("the team has {MAX_KEYS} API keys; delete those that are not needed");
                return Err(Response::error(409, "conflict", &message).into());
            }
            let made = api_keys::insert(
                sql,
                &NewApiKey {
                    id: &id,
                    team_id: &principal.team_id,
                    name: &name,
                    key_hash: &secret::hash(&key),
                    key_prefix: &secret::shown_prefix(&key),
                    wire_verifier: &verifier,
                    created_by: principal.actor.id(),
                },
            )?;
            let event = Event::new(Some(&principal.team_id), "api_key.create", &id);
            audit::write(sql, &principal.actor, &event.with(json!({"name": name})))?;
            Ok(made)
        })?;
        let mut body = json!(made);
        body["key"] = json!(key);
        Step::respond(Response::json(201, &body))
    })
}

/// `GET /v1/api-keys`.
pub fn list(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let keys = db.read(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            Ok(api_keys::of_team(sql, &principal.team_id)?)
        })?;
        Step::respond(Response::json(200, &keys))
    })
}

/// `DELETE /v1/api-keys/{id}`. A key is void as soon as this is answered.
pub fn delete(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        db.transaction(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            let id = request.param("id");
            let name = match Kind::ApiKey.accepts(id) {
                true => api_keys::delete(sql, &principal.team_id, id)?,
                false => None,
            };
            let name = name
                .ok_or_else(|| Response::error(404, "not_found", "there is no such API key in your team"))?;
            let event = Event::new(Some(&principal.team_id), "api_key.delete", id);
            Ok(audit::write(sql, &principal.actor, &event.with(json!({"name": name})))?)
        })?;
        Step::respond(Response::no_content())
    })
}
