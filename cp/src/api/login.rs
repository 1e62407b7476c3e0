//! `/v1/auth`: logins and tokens.

use super::fields::Fields;
use super::principal::{Principal, forbidden, unauthorized};
use crate::audit::Actor;
use crate::auth::id::Kind;
use crate::auth::jwt::{self, UserClaims};
use crate::auth::limiter::{Attempt, Refusal};
use crate::auth::password::StoredPassword;
use crate::db::users::User;
use crate::db::{Sql, Stop, Timestamp, teams, users};
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::json;
use std::sync::Arc;

fn wrong() -> Response {
    unauthorized("the e-mail address or the password is wrong")
}

/// 429 for a password that is not looked at.
pub(super) fn refused(refusal: Refusal) -> Response {
    match refusal {
        Refusal::Wait(seconds) => {
            let message = format!("too many failed logins; try again in {seconds} seconds");
            Response::error(429, "rate_limited", &message).with_header("retry-after", seconds.to_string())
        }
        Refusal::Busy => Response::error(429, "rate_limited", "too many logins at once; try again")
            .with_header("retry-after", "1"),
    }
}

/// The answer to a login: a new token for `user`, acting for `team_id`.
///
/// # Errors
/// 500 when the token cannot be written.
pub fn auth_response(context: &Context, user: &User, team_id: &str) -> Result<Response, Response> {
    let claims = UserClaims::new(&user.id, team_id, Timestamp::now().seconds());
    let token = jwt::sign(&context.jwt_secret, &claims).map_err(|error| {
        Response::error(500, "internal_error", &format!("the token cannot be written: {error}"))
    })?;
    Ok(Response::json(
        200,
        &json!({
            "token": token,
            "user_id": user.id,
            "team_id": team_id,
            "email": user.email,
            "name": user.name,
        }),
    ))
}

/// `POST /v1/auth/login`.
pub fn login(request: Request, context: &Arc<Context>) -> Flow {
    let fields = Fields::of(&request)?;
    let email = fields.required_text("email", 254)?.trim().to_lowercase();
    let password = fields.required_text("password", 1024)?;
    let attempt = Attempt::start(request.peer, &email, Timestamp::now().seconds()).map_err(refused)?;
    let context = Arc::clone(context);
    Step::database(move |db| {
        let user = db.read(|sql| Ok(users::find_by_email(sql, &email)?))?;
        Step::compute(move || check(&context, user, &password, attempt))
    })
}

fn check(context: &Arc<Context>, user: Option<User>, password: &str, attempt: Attempt) -> Flow {
    // Unknown addresses take as long as known ones.
    let stored = user.as_ref().and_then(|u| u.password.as_deref()).and_then(StoredPassword::parse);
    let is_right = stored.clone().unwrap_or_else(StoredPassword::unknown).matches(password);
    let Some((user, stored)) = user.zip(stored).filter(|(user, _)| is_right && user.is_active) else {
        attempt.finish(false);
        return Err(wrong());
    };
    attempt.finish(true);
    let renewed = stored.is_outdated().then(|| StoredPassword::new(password).to_text());
    let context = Arc::clone(context);
    Step::database(move |db| {
        let team_id = db.read(|sql| {
            if let Some(renewed) = &renewed {
                users::set_password(sql, &user.id, renewed, false)?;
            }
            default_team(sql, &user.id)
        })?;
        log::info!("login of {}", user.id);
        Step::respond(auth_response(&context, &user, &team_id)?)
    })
}

fn default_team(sql: &mut dyn Sql, user_id: &str) -> Result<String, Stop> {
    let first = teams::of_user(sql, user_id)?.into_iter().next();
    Ok(first
        .map(|m| m.team.id)
        .ok_or_else(|| forbidden("this account is in no team; ask to be added to one"))?)
}

/// `POST /v1/auth/switch-team`.
pub fn switch_team(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (user, team_id) = db.read(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            let team_id = Fields::of(&request)?.required_text("team_id", 64)?;
            if !Kind::Team.accepts(&team_id) || teams::find(sql, &team_id)?.is_none() {
                return Err(Response::error(404, "not_found", "there is no such team").into());
            }
            let user = own_account(sql, &principal)?;
            if teams::find_member(sql, &team_id, &user.id)?.is_none() {
                return Err(forbidden("you are not in that team").into());
            }
            Ok((user, team_id))
        })?;
        Step::respond(auth_response(&context, &user, &team_id)?)
    })
}

/// The account of the person who acts.
///
/// # Errors
/// 401 when it is not there any more, or an API key acts.
pub fn own_account(sql: &mut dyn Sql, principal: &Principal) -> Result<User, Stop> {
    let gone = || unauthorized("the account is not there any more");
    match &principal.actor {
        Actor::User { id, .. } => Ok(users::find(sql, id)?.ok_or_else(gone)?),
        _ => Err(gone().into()),
    }
}
