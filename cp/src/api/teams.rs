//! `/v1/teams`: teams and their members. The team of a route must be the one that the token acts for.

use super::fields::{Fields, invalid};
use super::principal::{Principal, forbidden};
use crate::audit::{self, Event};
use crate::auth::id::{Kind, new_slug};
use crate::db::teams::{self, Member, Role};
use crate::db::{Sql, Stop, api_keys, capsules, users};
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::json;
use std::sync::Arc;

/// The most teams that one person may own or be in.
pub const MAX_TEAMS: usize = 100;
/// The most members of a team.
pub const MAX_MEMBERS: usize = 500;

/// Whether a team's name may have this character.
pub(super) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == ' ' || c == '_'
}

fn name(fields: &Fields) -> Result<String, Response> {
    let name = fields.required_text("name", 128)?;
    if !name.chars().all(is_name_char) || name.trim().is_empty() {
        return Err(invalid("the name of a team is 1 to 128 of A-Z a-z 0-9, space and _"));
    }
    Ok(name)
}

/// The person who asks, for the team of the route.
fn member(sql: &mut dyn Sql, context: &Context, request: &Request) -> Result<Principal, Stop> {
    let principal = Principal::person(sql, context, request)?;
    if principal.team_id == request.param("id") {
        return Ok(principal);
    }
    Err(forbidden("the token acts for another team; switch to this one (POST /v1/auth/switch-team)").into())
}

/// The same, for owners and admins.
fn manager(sql: &mut dyn Sql, context: &Context, request: &Request) -> Result<Principal, Stop> {
    let principal = member(sql, context, request)?;
    if principal.role >= Role::Admin {
        return Ok(principal);
    }
    Err(forbidden("only owners and admins of the team may do this").into())
}

/// The member of the route, whom a manager may change: the owner may not be.
fn changeable(sql: &mut dyn Sql, principal: &Principal, request: &Request) -> Result<Member, Stop> {
    let found = teams::find_member(sql, &principal.team_id, request.param("uid"))?;
    let found = found.ok_or_else(|| Response::error(404, "not_found", "they are not in the team"))?;
    if found.role == Role::Owner {
        return Err(forbidden("the owner of a team stays what they are").into());
    }
    Ok(found)
}

/// `GET /v1/teams`.
pub fn list(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let teams = db.read(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            Ok(teams::of_user(sql, principal.actor.id())?)
        })?;
        Step::respond(Response::json(200, &teams))
    })
}

/// `POST /v1/teams`.
pub fn create(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let team = db.transaction(|sql| {
            let principal = Principal::person(sql, &context, &request)?;
            let name = name(&Fields::of(&request)?)?;
            if teams::of_user(sql, principal.actor.id())?.len() >= MAX_TEAMS {
                return Err(invalid(&format!("you are in {MAX_TEAMS} teams already")).into());
            }
            let id = Kind::Team.new_id();
            let team = teams::insert(sql, &id, &name, &new_slug(), principal.actor.id())?;
            audit::write(sql, &principal.actor, &Event::new(Some(&id), "team.create", &id))?;
            Ok(team)
        })?;
        Step::respond(Response::json(201, &team))
    })
}

/// `GET /v1/teams/{id}`.
pub fn get(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (team, members) = db.read(|sql| {
            let principal = member(sql, &context, &request)?;
            let team = teams::find(sql, &principal.team_id)?
                .ok_or_else(|| Response::error(404, "not_found", "there is no such team"))?;
            Ok((team, teams::members(sql, &principal.team_id)?))
        })?;
        Step::respond(Response::json(200, &json!({"team": team, "members": members})))
    })
}

/// `PATCH /v1/teams/{id}`.
pub fn rename(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        db.transaction(|sql| {
            let principal = manager(sql, &context, &request)?;
            let name = name(&Fields::of(&request)?)?;
            teams::rename(sql, &principal.team_id, &name)?;
            let event = Event::new(Some(&principal.team_id), "team.rename", &principal.team_id);
            Ok(audit::write(sql, &principal.actor, &event.with(json!({"name": name})))?)
        })?;
        Step::respond(Response::no_content())
    })
}

/// Deletes a team, with the audit entry. Its capsules are destroyed behind the answer.
pub(super) fn end(sql: &mut dyn Sql, principal: &Principal, team_id: &str) -> Result<(), Stop> {
    let capsules = capsules::stop_all(sql, team_id)?;
    teams::delete(sql, team_id)?;
    let event = Event::new(Some(team_id), "team.delete", team_id).with(json!({"capsules": capsules}));
    Ok(audit::write(sql, &principal.actor, &event)?)
}

/// `DELETE /v1/teams/{id}`.
pub fn delete(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        db.transaction(|sql| {
            let principal = member(sql, &context, &request)?;
            if principal.role != Role::Owner {
                return Err(forbidden("only the owner may delete the team").into());
            }
            end(sql, &principal, &principal.team_id)
        })?;
        Step::respond(Response::no_content())
    })
}

/// `GET /v1/teams/{id}/members`.
pub fn members(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let members = db.read(|sql| {
            let principal = member(sql, &context, &request)?;
            Ok(teams::members(sql, &principal.team_id)?)
        })?;
        Step::respond(Response::json(200, &members))
    })
}

/// `POST /v1/teams/{id}/members`.
pub fn add_member(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let added = db.transaction(|sql| {
            let principal = manager(sql, &context, &request)?;
            let email = Fields::of(&request)?.required_text("email", 254)?.trim().to_lowercase();
            let user = users::find_by_email(sql, &email)?.filter(|user| user.is_active);
            let user = user
                .ok_or_else(|| Response::error(404, "not_found", "there is no account with this address"))?;
            if teams::find_member(sql, &principal.team_id, &user.id)?.is_some() {
                return Err(invalid("they are in the team already").into());
            }
            if teams::members(sql, &principal.team_id)?.len() >= MAX_MEMBERS {
                return Err(invalid(&format!("a team may have {MAX_MEMBERS} members")).into());
            }
            teams::add_member(sql, &principal.team_id, &user.id, Role::Member)?;
            let event = Event::new(Some(&principal.team_id), "member.add", &user.id);
            audit::write(sql, &principal.actor, &event)?;
            Ok(teams::find_member(sql, &principal.team_id, &user.id)?)
        })?;
        Step::respond(Response::json(201, &added))
    })
}

/// `PATCH /v1/teams/{id}/members/{uid}`.
pub fn set_role(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        db.transaction(|sql| {
            let principal = manager(sql, &context, &request)?;
            let name = Fields::of(&request)?.required_text("role", 16)?;
            let role = Role::from_name(&name).filter(|role| *role != Role::Owner);
            let role = role.ok_or_else(|| invalid(&format!("role must be admin or member, not {name:?}")))?;
            let member = changeable(sql, &principal, &request)?;
            teams::set_role(sql, &principal.team_id, &member.user_id, role)?;
            let event = Event::new(Some(&principal.team_id), "member.role", &member.user_id);
            Ok(audit::write(sql, &principal.actor, &event.with(json!({"role": name})))?)
        })?;
        Step::respond(Response::no_content())
    })
}

/// Revokes the keys that somebody has made for a team that they leave, each with an audit entry: whoever made
/// a key may have kept it, and would act for the team with it as before.
pub(super) fn revoke_keys_of(
    sql: &mut dyn Sql,
    principal: &Principal,
    team_id: &str,
    user_id: &str,
) -> Result<(), Stop> {
    for (id, name) in api_keys::delete_made_by(sql, team_id, user_id)? {
        let details = json!({"name": name, "reason": "who made it has left the team"});
        let event = Event::new(Some(team_id), "api_key.delete", &id).with(details);
        audit::write(sql, &principal.actor, &event)?;
    }
    Ok(())
}

/// `DELETE /v1/teams/{id}/members/{uid}`.
pub fn remove_member(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        db.transaction(|sql| {
            let principal = manager(sql, &context, &request)?;
            let member = changeable(sql, &principal, &request)?;
            teams::remove_member(sql, &principal.team_id, &member.user_id)?;
            revoke_keys_of(sql, &principal, &principal.team_id, &member.user_id)?;
            let event = Event::new(Some(&principal.team_id), "member.remove", &member.user_id);
            Ok(audit::write(sql, &principal.actor, &event)?)
        })?;
        Step::respond(Response::no_content())
    })
}

/// `POST /v1/teams/{id}/leave`.
pub fn leave(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        db.transaction(|sql| {
            let principal = member(sql, &context, &request)?;
            if principal.role == Role::Owner {
                return Err(forbidden("the owner cannot leave the team; delete it instead").into());
            }
            teams::remove_member(sql, &principal.team_id, principal.actor.id())?;
            revoke_keys_of(sql, &principal, &principal.team_id, principal.actor.id())?;
            let event = Event::new(Some(&principal.team_id), "member.leave", principal.actor.id());
            Ok(audit::write(sql, &principal.actor, &event)?)
        })?;
        Step::respond(Response::no_content())
    })
}
