//! `/v1/hosts` for people: records, registration tokens, tags.
//!
//! Who administers the installation manages all hosts. Owners and admins of a team manage those that
//! the team brought; its members see them.

use super::fields::{Fields, invalid};
use super::principal::{Principal, forbidden};
use crate::audit::{self, Event};
use crate::auth::id::Kind;
use crate::auth::secret;
use crate::db::hosts::{self, Host, NewHost};
use crate::db::{Sql, Stop, host_tokens};
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::json;
use std::sync::Arc;

/// The most tags that a host may have.
pub const MAX_TAGS: usize = 50;

fn no_such_host() -> Response {
    Response::error(404, "not_found", "there is no such host")
}

/// The host of the route's `{id}`, locked, for somebody who may manage it.
pub(super) fn managed(
    sql: &mut dyn Sql,
    context: &Context,
    request: &Request,
) -> Result<(Principal, Host), Stop> {
    let principal = Principal::person(sql, context, request)?;
    let host = visible(sql, &principal, request.param("id"), true)?;
    let manages = host.team_id.as_deref().is_some_and(|team| principal.manages_team(team));
    if principal.is_admin || manages {
        return Ok((principal, host));
    }
    Err(forbidden("only administrators, and owners and admins of the team that brought a host, may do this")
        .into())
}

/// The host, for somebody who may see it.
fn visible(sql: &mut dyn Sql, principal: &Principal, id: &str, locked: bool) -> Result<Host, Stop> {
    let host = match (Kind::Host.accepts(id), locked) {
        (false, _) => None,
        (true, true) => hosts::find_for_update(sql, id)?,
        (true, false) => hosts::find(sql, id)?,
    };
    let may_see = |host: &Host| principal.is_admin || host.team_id.as_ref() == Some(&principal.team_id);
    Ok(host.filter(may_see).ok_or_else(no_such_host)?)
}

fn issue_token(sql: &mut dyn Sql, principal: &Principal, host_id: &str) -> Result<String, Stop> {
    let token = secret::new_token();
    let id = Kind::RegistrationToken.new_id();
    host_tokens::set_registration(sql, &id, host_id, &secret::hash(&token), principal.actor.id())?;
    Ok(token)
}

/// `POST /v1/hosts`.
pub fn create(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (host, token) = db.transaction(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            let fields = Fields::of(&request)?;
            let kind = fields.required_text("type", 16)?;
            let team_id = fields.text("team_id", 64)?;
            match kind.as_str() {
                "regular" if !principal.is_admin => {
                    return Err(forbidden("only administrators may add hosts that serve everyone").into());
                }
                "regular" if team_id.is_some() => {
                    return Err(invalid("a regular host belongs to no team; leave team_id out").into());
                }
                "regular" => {}
                "byoc" => {
                    let team_id = team_id.as_deref().ok_or_else(|| invalid("team_id is missing"))?;
                    if !principal.is_admin && !principal.manages_team(team_id) {
                        return Err(forbidden("only owners and admins of a team may bring hosts").into());
                    }
                    if crate::db::teams::find(sql, team_id)?.is_none() {
                        return Err(invalid("there is no team with this team_id").into());
                    }
                }
                other => {
                    return Err(invalid(&format!("type must be regular or byoc, not {other:?}")).into());
                }
            }
            let optional = |name| Ok::<_, Response>(fields.text(name, 64)?.filter(|text| !text.is_empty()));
            let id = Kind::Host.new_id();
            hosts::insert(
                sql,
                &NewHost {
                    id: &id,
                    team_id: team_id.as_deref(),
                    provider: optional("provider")?.as_deref(),
                    availability_zone: optional("availability_zone")?.as_deref(),
                    created_by: principal.actor.id(),
                },
            )?;
            let token = issue_token(sql, &principal, &id)?;
            let event = Event::new(team_id.as_deref(), "host.create", &id);
            audit::write(sql, &principal.actor, &event)?;
            Ok((visible(sql, &principal, &id, false)?, token))
        })?;
        Step::respond(Response::json(201, &json!({"host": host, "registration_token": token})))
    })
}

/// `GET /v1/hosts`.
pub fn list(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let hosts = db.read(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            let team_id = (!principal.is_admin).then_some(principal.team_id.as_str());
            Ok(hosts::list(sql, team_id)?)
        })?;
        Step::respond(Response::json(200, &hosts))
    })
}

/// `GET /v1/hosts/{id}`.
pub fn get(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let host = db.read(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            visible(sql, &principal, request.param("id"), false)
        })?;
        Step::respond(Response::json(200, &host))
    })
}

/// `POST /v1/hosts/{id}/token`: another registration token for a host that never registered.
pub fn renew_token(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (host, token) = db.transaction(|sql| {
            let (principal, host) = managed(sql, &context, &request)?;
            if host.status != "pending" {
                let message = "the host has registered already; delete it and create a new one to start over";
                return Err(Response::error(409, "invalid_state", message).into());
            }
            let token = issue_token(sql, &principal, &host.id)?;
            let event = Event::new(host.team_id.as_deref(), "host.token", &host.id);
            audit::write(sql, &principal.actor, &event)?;
            Ok((host, token))
        })?;
        Step::respond(Response::json(201, &json!({"host": host, "registration_token": token})))
    })
}

/// `GET /v1/hosts/{id}/tags`.
pub fn tags(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let tags = db.read(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            let host = visible(sql, &principal, request.param("id"), false)?;
            Ok(hosts::tags(sql, &host.id)?)
        })?;
        Step::respond(Response::json(200, &tags))
    })
}

fn is_tag(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= 64
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"._:/=-".contains(&b))
}

/// `POST /v1/hosts/{id}/tags`.
pub fn add_tag(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        db.transaction(|sql| {
            let (_, host) = managed(sql, &context, &request)?;
            let tag = Fields::of(&request)?.required_text("tag", 64)?;
            if !is_tag(&tag) {
                let message = "a tag is 1 to 64 of A-Z a-z 0-9 . _ : / = - and starts with a letter or digit";
                return Err(invalid(message).into());
            }
            let tags = hosts::tags(sql, &host.id)?;
            if tags.len() >= MAX_TAGS && !tags.contains(&tag) {
                return Err(invalid(&format!("a host may have {MAX_TAGS} tags")).into());
            }
            Ok(hosts::add_tag(sql, &host.id, &tag)?)
        })?;
        Step::respond(Response::no_content())
    })
}

/// `DELETE /v1/hosts/{id}/tags/{tag}`.
pub fn remove_tag(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        db.transaction(|sql| {
            let (_, host) = managed(sql, &context, &request)?;
            if hosts::remove_tag(sql, &host.id, request.param("tag"))? {
                return Ok(());
            }
            Err(Response::error(404, "not_found", "the host has no such tag").into())
        })?;
        Step::respond(Response::no_content())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_have_a_form() {
        for good in ["a", "gpu", "zone=eu-1/a", "1.2:3", &"x".repeat(64)] {
            assert!(is_tag(good), "{good}");
        }
        for bad in ["", "-a", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert!(!is_tag(bad), "{bad}");
        }
    }
}
