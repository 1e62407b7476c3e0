//! `/v1/hosts` for the hosts themselves: registration, heartbeats, new tokens.

use super::fields::{Fields, invalid};
use super::principal::{forbidden, unauthorized};
use crate::audit::{self, Actor, Event};
use crate::auth::id::Kind;
use crate::auth::jwt::{self, HostClaims};
use crate::auth::secret;
use crate::db::hosts::{self, Facts};
use crate::db::{DbError, Sql, Stop, Timestamp, host_tokens};
use crate::hosts::credential::credential;
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use wire::auth::{ITERATIONS, Verifier, hmac_sha256};

/// Separates the salt of verifiers from all other uses of `JWT_SECRET`.
const SALT_CONTEXT: &[u8] = b"wrenn host credential salt v1";

/// What a host is given: who it is, its tokens, and the verifier of the secret with which control planes
/// open wire sessions to it. The verifier stays the same as long as `JWT_SECRET` does.
fn credentials(sql: &mut dyn Sql, context: &Context, host_id: &str, generation: i32) -> Result<Value, Stop> {
    let host = hosts::find(sql, host_id)?
        .ok_or_else(|| DbError::Bug("a host that was just found is not there".into()))?;
    let claims = HostClaims::new(host_id, generation, Timestamp::now().seconds());
    let token = jwt::sign(&context.jwt_secret, &claims).map_err(|error| {
        Response::error(500, "internal_error", &format!("the token cannot be written: {error}"))
    })?;
    let refresh_token = secret::new_token();
    host_tokens::set_refresh(sql, &Kind::RefreshToken.new_id(), host_id, &secret::hash(&refresh_token))?;
    let salt = hmac_sha256(&context.jwt_secret, &[SALT_CONTEXT, host_id.as_bytes()]);
    let password = credential(&context.jwt_secret, host_id);
    let verifier = Verifier::new(password.as_bytes(), &salt[..16], ITERATIONS).to_text();
    Ok(json!({"host": host, "token": token, "refresh_token": refresh_token, "wire_verifier": verifier}))
}

/// `POST /v1/hosts/register`: a host comes with its one-time token.
pub fn register(request: Request, context: &Arc<Context>) -> Flow {
    let fields = Fields::of(&request)?;
    let token = fields.required_text("token", 256)?;
    let address = fields.required_text("address", 64)?;
    if !address.parse::<SocketAddr>().is_ok_and(|a| a.port() != 0 && !a.ip().is_unspecified()) {
        let message = format!(
            "address must be an IP address and port by which the control plane reaches the \
                               agent, such as 10.0.0.5:50051, not {address:?}"
        );
        return Err(invalid(&message));
    }
    let arch = fields.text("arch", 32)?.filter(|arch| !arch.is_empty());
    let cpu_cores = fields.integer("cpu_cores", 1..=65_536)?;
    let memory_mb = fields.integer("memory_mb", 1..=1 << 30)?;
    let disk_gb = fields.integer("disk_gb", 0..=1 << 30)?;
    let context = Arc::clone(context);
    Step::database(move |db| {
        let body = db.transaction(|sql| {
            let taken = match secret::is_token(&token) {
                true => host_tokens::take_registration(sql, &secret::hash(&token))?,
                false => None,
            };
            let host_id = taken.ok_or_else(|| {
                unauthorized(
                    "the registration token is not known, was used already, or is older than an hour",
                )
            })?;
            let facts = Facts { arch: arch.as_deref(), cpu_cores, memory_mb, disk_gb, address: &address };
            let generation = hosts::register(sql, &host_id, &facts)?;
            let body = credentials(sql, &context, &host_id, generation)?;
            let team_id = body["host"]["team_id"].as_str();
            let event = Event::new(team_id, "host.register", &host_id).with(json!({"address": address}));
            audit::write(sql, &Actor::Host { id: host_id.clone() }, &event)?;
            Ok(body)
        })?;
        Step::respond(Response::json(201, &body))
    })
}

fn host_claims(request: &Request, context: &Context) -> Result<HostClaims, Response> {
    let token = request.header("x-host-token").map(str::trim).unwrap_or_default();
    if token.is_empty() {
        return Err(unauthorized("send the host's token in X-Host-Token"));
    }
    jwt::verify(&context.jwt_secret, token, Timestamp::now().seconds())
        .map_err(|error| unauthorized(&error.to_string()))
}

/// `POST /v1/hosts/{id}/heartbeat`.
pub fn heartbeat(request: Request, context: &Arc<Context>) -> Flow {
    let claims = host_claims(&request, context)?;
    if claims.sub != request.param("id") {
        return Err(forbidden("the token is another host's"));
    }
    Step::database(move |db| {
        if db.transaction(|sql| Ok(hosts::heartbeat(sql, &claims.sub, claims.generation)?))? {
            return Step::respond(Response::no_content());
        }
        Err(unauthorized("the host is not known any more, or has newer tokens than this"))
    })
}

/// `POST /v1/hosts/auth/refresh`: new tokens for a refresh token, which is used up.
pub fn refresh(request: Request, context: &Arc<Context>) -> Flow {
    let token = Fields::of(&request)?.required_text("refresh_token", 256)?;
    let context = Arc::clone(context);
    Step::database(move |db| {
        let body = db.transaction(|sql| {
            let taken = match secret::is_token(&token) {
                true => host_tokens::take_refresh(sql, &secret::hash(&token))?,
                false => None,
            };
            let host_id = taken.ok_or_else(|| {
                unauthorized("the refresh token is not known, was used already, or is older than 60 days")
            })?;
            let generation = hosts::next_generation(sql, &host_id)?;
            credentials(sql, &context, &host_id, generation)
        })?;
        Step::respond(Response::json(200, &body))
    })
}
