//! `/v1/me`: one's own account.

use super::fields::{Fields, invalid};
use super::login::{auth_response, own_account, refused};
use super::principal::{Principal, unauthorized};
use super::teams::{end, revoke_keys_of};
use crate::audit::{self, Event};
use crate::auth::limiter::Attempt;
use crate::auth::password::{self, StoredPassword};
use crate::db::teams::{self, Role};
use crate::db::{Timestamp, users};
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::json;
use std::sync::Arc;

/// `GET /v1/me`.
pub fn get(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let user = db.read(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            own_account(sql, &principal)
        })?;
        Step::respond(Response::json(
            200,
            &json!({
                "name": user.name,
                "email": user.email,
                "has_password": user.password.is_some(),
                "providers": [],
            }),
        ))
    })
}

/// `PATCH /v1/me`: another name.
pub fn rename(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (user, team_id) = db.transaction(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            let name = Fields::of(&request)?.required_text("name", 100)?;
            let mut user = own_account(sql, &principal)?;
            users::rename(sql, &user.id, &name)?;
            user.name = name;
            Ok((user, principal.team_id))
        })?;
        Step::respond(auth_response(&context, &user, &team_id)?)
    })
}

/// `POST /v1/me/password`: another password. All tokens that were issued before are void afterwards. Wrong
/// passwords count as failed logins do.
pub fn change_password(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let user = db.read(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            own_account(sql, &principal)
        })?;
        let fields = Fields::of(&request)?;
        let new = fields.required_text("new_password", password::MAX_BYTES)?;
        password::check(&new).map_err(|error| invalid(&error.to_string()))?;
        let current = match &user.password {
            Some(_) => fields.required_text("current_password", password::MAX_BYTES)?,
            None if fields.text("confirm_password", password::MAX_BYTES)?.as_ref() == Some(&new) => {
                String::new()
            }
            None => return Err(invalid("confirm_password is not the same as new_password")),
        };
        let attempt =
            Attempt::start(request.peer, &user.email, Timestamp::now().seconds()).map_err(refused)?;
        Step::compute(move || {
            let is_right = user
                .password
                .as_ref()
                .is_none_or(|stored| StoredPassword::parse(stored).is_some_and(|s| s.matches(&current)));
            let stored = is_right.then(|| StoredPassword::new(&new).to_text());
            attempt.finish(is_right);
            let stored = stored.ok_or_else(|| unauthorized("current_password is wrong"))?;
            Step::database(move |db| {
                db.transaction(|sql| Ok(users::set_password(sql, &user.id, &stored, true)?))?;
                Step::respond(Response::no_content())
            })
        })
    })
}

/// `DELETE /v1/me`: closes the account, and the teams that nobody else is in.
pub fn delete(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        db.transaction(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            let user = own_account(sql, &principal)?;
            let confirmation = Fields::of(&request)?.required_text("confirmation", 254)?;
            if confirmation.trim().to_lowercase() != user.email {
                return Err(invalid("confirmation must be the account's e-mail address").into());
            }
            for membership in teams::of_user(sql, &user.id)? {
                if membership.role != Role::Owner {
                    revoke_keys_of(sql, &principal, &membership.team.id, &user.id)?;
                    continue;
                }
                if teams::members(sql, &membership.team.id)?.len() > 1 {
                    let message = format!(
                        "you own the team {:?}, which has other members; remove them or delete it first",
                        membership.team.name
                    );
                    return Err(Response::error(409, "conflict", &message).into());
                }
                end(sql, &principal, &membership.team.id)?;
            }
            users::delete(sql, &user.id)?;
            let event = Event::new(None, "user.delete", &user.id);
            Ok(audit::write(sql, &principal.actor, &event)?)
        })?;
        Step::respond(Response::no_content())
    })
}
