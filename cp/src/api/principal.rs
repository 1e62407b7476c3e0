//! Who a request comes from.

use crate::audit::Actor;
use crate::auth::jwt::{self, UserClaims};
use crate::auth::secret;
use crate::db::api_keys::{self, KeyHolder};
use crate::db::teams::Role;
use crate::db::{DbError, Sql, Stop, Timestamp, users};
use crate::http::context::Context;
use crate::http::handler::{Request, Response};

/// Who acts, and for which team.
#[derive(Debug, Clone)]
pub struct Principal {
    /// Who acts.
    pub actor: Actor,
    /// For which team.
    pub team_id: String,
    /// What they are in it; programs with an API key are members.
    pub role: Role,
    /// Whether they administer the whole installation.
    pub is_admin: bool,
}

/// 401 `unauthorized`.
pub fn unauthorized(message: &str) -> Response {
    Response::error(401, "unauthorized", message).with_header("www-authenticate", "Bearer")
}

/// 403 `forbidden`.
pub fn forbidden(message: &str) -> Response {
    Response::error(403, "forbidden", message)
}

/// What a request is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// An API key or a user's token, as the client sent it.
    Secret(String),
    /// The id of an API key that the client has proven to hold.
    ProvenKey(String),
}

/// The credential that a request carries: the key that its connection has proven, the API key, or else the
/// bearer token.
///
/// # Errors
/// 401 when it carries none.
pub fn credential(request: &Request) -> Result<Credential, Response> {
    if let Some(id) = &request.proven_key {
        return Ok(Credential::ProvenKey(id.clone()));
    }
    if let Some(key) = request.header("x-api-key") {
        return Ok(Credential::Secret(key.trim().to_string()));
    }
    let bearer = request.header("authorization").and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_string())
    });
    bearer.map(Credential::Secret).ok_or_else(|| {
        unauthorized("send an API key in X-API-Key, or a token from /v1/auth/login as Authorization: Bearer")
    })
}

/// Who a credential stands for: an API key or a user's token.
///
/// # Errors
/// 401 when it is wrong, expired or revoked.
pub fn authenticate(
    sql: &mut dyn Sql,
    context: &Context,
    credential: &Credential,
) -> Result<Principal, Stop> {
    let credential = match credential {
        Credential::ProvenKey(id) => return of_key_holder(sql, |sql| api_keys::find(sql, id)),
        Credential::Secret(key) if key.starts_with(secret::API_KEY_PREFIX) => return of_api_key(sql, key),
        Credential::Secret(token) => token,
    };
    let claims: UserClaims = jwt::verify(&context.jwt_secret, credential, Timestamp::now().seconds())
        .map_err(|error| unauthorized(&format!("{error}; log in again")))?;
    let session = users::session(sql, &claims.sub, &claims.team_id, claims.iat)?
        .ok_or_else(|| unauthorized("the token was revoked; log in again"))?;
    Ok(Principal {
        actor: Actor::User { id: claims.sub, email: session.email },
        team_id: claims.team_id,
        role: session.role,
        is_admin: session.is_admin,
    })
}

fn of_api_key(sql: &mut dyn Sql, key: &str) -> Result<Principal, Stop> {
    if !secret::is_api_key(key) {
        return Err(unknown_key().into());
    }
    of_key_holder(sql, |sql| api_keys::find_by_hash(sql, &secret::hash(key)))
}

fn unknown_key() -> Response {
    unauthorized("the API key is not known; it may have been deleted")
}

fn of_key_holder(
    sql: &mut dyn Sql,
    find: impl FnOnce(&mut dyn Sql) -> Result<Option<KeyHolder>, DbError>,
) -> Result<Principal, Stop> {
    let holder = find(sql)?.ok_or_else(unknown_key)?;
    if holder.is_use_stale {
        api_keys::note_use(sql, &holder.id)?;
    }
    Ok(Principal {
        actor: Actor::ApiKey { id: holder.id, name: holder.name },
        team_id: holder.team_id,
        role: Role::Member,
        is_admin: false,
    })
}

impl Principal {
    /// Who a request comes from.
    ///
    /// # Errors
    /// 401 when it carries no credential that is good.
    pub fn of(sql: &mut dyn Sql, context: &Context, request: &Request) -> Result<Principal, Stop> {
        authenticate(sql, context, &credential(request)?)
    }

    /// Who a request comes from, where only people may act.
    ///
    /// # Errors
    /// 401 when it carries no credential that is good, 403 for API keys.
    pub fn person(sql: &mut dyn Sql, context: &Context, request: &Request) -> Result<Principal, Stop> {
        let principal = Principal::of(sql, context, request)?;
        match principal.actor {
            Actor::User { .. } => Ok(principal),
            _ => Err(forbidden("an API key cannot do this; log in and send the token").into()),
        }
    }

    /// Whether they manage the team.
    pub fn manages_team(&self, team_id: &str) -> bool {
        self.team_id == team_id && self.role >= Role::Admin
    }
}
