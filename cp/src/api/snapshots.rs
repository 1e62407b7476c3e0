//! Snapshots and clones: `POST /v1/snapshots`, `DELETE /v1/snapshots/{name}`,
//! `POST /v1/capsules/{id}/clone`. [`super::templates`] lists snapshots.
//!
//! A snapshot lies on the host of its capsule, and capsules that are made of it run there. A clone is a
//! capsule made of a snapshot that nobody gets to see.

use super::capsule_access::{Target, find, target};
use super::capsule_create::is_template_name;
use super::fields::{Fields, invalid};
use super::principal::Principal;
use crate::audit::{self, Event};
use crate::auth::id::Kind;
use crate::auth::random;
use crate::db::capsules::{self, Capsule, NewCapsule};
use crate::db::snapshots::{self, Snapshot};
use crate::db::{Sql, Stop, hosts};
use crate::hosts::scheduler::Refusal;
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, HostError, Request, Response, Step};
use serde_json::{Value, json};
use std::sync::Arc;
use wire::message::{
    CapsuleCreate, CapsuleInfo, CapsuleSnapshot, CapsuleState, Code, Done, SnapshotDelete, SnapshotInfo,
};

/// How long a host may take to write a snapshot, in milliseconds: much memory goes to a slow disk.
const SNAPSHOT_TIMEOUT_MS: u64 = 120_000;
/// How long a host may take to start one clone, in milliseconds, and how much of it is for the way back.
const CLONE_TIMEOUT_MS: u64 = 27_000;
const ANSWER_MS: u64 = 1_500;
/// How long a host may take to delete a snapshot, in milliseconds.
const DELETE_TIMEOUT_MS: u64 = 20_000;
/// What that is called in the audit log.
pub(super) const DELETED: &str = "template.snapshot.delete";
/// The most clones that one request makes.
const MAX_CLONES: i32 = 20;

/// A snapshot as the API tells it.
pub(super) fn shown(snapshot: &Snapshot) -> Value {
    json!({
        "name": snapshot.name, "type": "snapshot", "vcpus": snapshot.vcpus, "memory_mb": snapshot.memory_mb,
        "size_bytes": snapshot.size_bytes, "created_at": snapshot.created_at, "platform": false,
        "protected": false, "metadata": {},
    })
}

/// What becomes of a snapshot once its host has it.
#[derive(Debug, Clone)]
enum Purpose {
    Keep { name: String, overwrite: bool },
    Clone { count: i32, timeout_sec: i32 },
}

/// A snapshot on its way.
#[derive(Debug, Clone)]
struct Taking {
    principal: Principal,
    target: Target,
    host_name: String,
    capsule: Capsule,
    purpose: Purpose,
}

/// `POST /v1/snapshots`.
pub fn create(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let taking = db.transaction(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let fields = Fields::of(&request)?;
            let id = fields.required_text("sandbox_id", 64)?;
            let capsule = find(sql, &principal, &id)?;
            let name = fields.text("name", 200)?.filter(|name| !name.is_empty());
            let name = name.unwrap_or_else(|| format!("template-{}", random::hex(&random::bytes::<4>())));
            if !is_template_name(&name) {
                return Err(invalid(&format!(
                    "{name:?} cannot be a snapshot's name: 1 to 63 of A-Z a-z 0-9 . _ -, beginning with a \
                     letter or digit"
                ))
                .into());
            }
            let overwrite = match request.query("overwrite") {
                None | Some("" | "false") => false,
                Some("true") => true,
                Some(other) => {
                    return Err(invalid(&format!("overwrite must be true or false, not {other:?}")).into());
                }
            };
            let is_base = capsules::base_templates(sql, &principal.team_id)?.contains(&name);
            if is_base || (!overwrite && snapshots::find(sql, &principal.team_id, &name)?.is_some()) {
                return Err(name_taken(&name).into());
            }
            begin(sql, principal, capsule, Purpose::Keep { name, overwrite })
        })?;
        taking.ask()
    })
}

fn name_taken(name: &str) -> Response {
    let message = format!("there is a template {name:?} already; take another name, or ?overwrite=true");
    Response::error(409, "conflict", &message)
}

/// `POST /v1/capsules/{id}/clone`.
pub fn clone(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let taking = db.transaction(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let capsule = find(sql, &principal, request.param("id"))?;
            let fields = Fields::of_optional(&request)?;
            let count = fields.integer("count", 1..=MAX_CLONES)?.unwrap_or(1);
            let timeout_sec = fields.integer("timeout_sec", 0..=31_536_000)?.unwrap_or(capsule.timeout_sec);
            begin(sql, principal, capsule, Purpose::Clone { count, timeout_sec })
        })?;
        taking.ask()
    })
}

/// Checks that a snapshot can be made now, and keeps others from beginning anything.
fn begin(
    sql: &mut dyn Sql,
    principal: Principal,
    capsule: Capsule,
    purpose: Purpose,
) -> Result<Taking, Stop> {
    let target = target(&capsule)?;
    let (from, to) = (CapsuleState::Running, CapsuleState::Snapshotting);
    if !capsules::change_state(sql, &capsule.id, &[from], to, None)? {
        let message = "the capsule's state has just changed; look at it again";
        return Err(Response::error(409, "invalid_state", message).into());
    }
    Ok(Taking { principal, target, host_name: Kind::Snapshot.new_id(), capsule, purpose })
}

impl Taking {
    fn ask(self) -> Flow {
        let message = CapsuleSnapshot {
            capsule_id: self.target.capsule_id.clone(),
            name: self.host_name.clone(),
            overwrite: false,
        };
        HostCall::new(&self.target.host_id, &self.target.address, &message, SNAPSHOT_TIMEOUT_MS)
            .until::<SnapshotInfo>()
            .detached()
            .then(move |result| match result.and_then(|reply| reply.message::<SnapshotInfo>()) {
                Ok(info) => self.taken(info),
                Err(error) => self.fail(error),
            })
    }

    fn runs_on(&self, sql: &mut dyn Sql) -> Result<(), Stop> {
        let (from, to) = (CapsuleState::Snapshotting, CapsuleState::Running);
        capsules::change_state(sql, &self.target.capsule_id, &[from], to, None)?;
        Ok(capsules::touch(sql, &self.target.capsule_id)?)
    }

    fn taken(self, info: SnapshotInfo) -> Flow {
        Step::database(move |db| match self.purpose.clone() {
            Purpose::Keep { name, overwrite } => {
                let noted = db.transaction(|sql| {
                    self.runs_on(sql)?;
                    let team_id = &self.principal.team_id;
                    let before = snapshots::find(sql, team_id, &name)?;
                    let by = self.principal.actor.id();
                    let host_id = &self.target.host_id;
                    if !snapshots::put(sql, (team_id, &name), host_id, &info, by, overwrite)? {
                        return Ok(Err(name_taken(&name)));
                    }
                    let event = Event::new(Some(team_id), "template.snapshot.create", &name);
                    audit::write(sql, &self.principal.actor, &event)?;
                    Ok(Ok((before, snapshots::find(sql, team_id, &name)?)))
                })?;
                match noted {
                    Ok((before, Some(snapshot))) => {
                        let answer = Response::json(201, &shown(&snapshot));
                        match before {
                            Some(old) => Ok(delete_unseen(&old, answer)),
                            None => Step::respond(answer),
                        }
                    }
                    Ok((_, None)) => {
                        Err(Response::error(409, "conflict", "the snapshot was deleted meanwhile"))
                    }
                    // Somebody else was faster.
                    Err(taken) => Ok(self.forget(taken)),
                }
            }
            Purpose::Clone { count, timeout_sec } => {
                db.transaction(|sql| self.runs_on(sql))?;
                Cloning { taking: self, info, left: count, timeout_sec, made: Vec::new() }.next(db)
            }
        })
    }

    fn fail(self, error: HostError) -> Flow {
        log::warn!("a snapshot of capsule {}: {error}", self.target.capsule_id);
        // Where nobody knows what became of it, the reconciler asks.
        let is_as_before = error.is_untouched()
            || matches!(&error, HostError::Remote(remote) if remote.code() != Code::InvalidState);
        let answer = match error.remote_code() {
            Some(Code::Internal) => {
                let message = format!(
                    "the capsule could not be saved: its host failed; it runs on, and the server's log has \
                     why, at {}",
                    self.target.capsule_id
                );
                Response::error(502, "agent_error", &message)
            }
            _ => error.into(),
        };
        Step::database(move |db| {
            if is_as_before {
                db.transaction(|sql| self.runs_on(sql))?;
            }
            Err(answer)
        })
    }

    /// Answers, and has the host forget what it has written.
    fn forget(&self, answer: Response) -> Step {
        delete_on_host(&self.target.host_id, &self.target.address, &self.host_name, answer)
    }
}

fn delete_unseen(snapshot: &Snapshot, answer: Response) -> Step {
    let address = snapshot.host_address.clone().unwrap_or_default();
    delete_on_host(&snapshot.host_id, &address, &snapshot.host_name, answer)
}

/// Has a host delete a snapshot.
pub(super) fn deletion(host_id: &str, address: &str, host_name: &str) -> HostCall {
    let message = SnapshotDelete { name: host_name.to_string() };
    HostCall::new(host_id, address, &message, DELETE_TIMEOUT_MS).until::<Done>()
}

/// Answers, and then deletes a snapshot that is on no record.
fn delete_on_host(host_id: &str, address: &str, host_name: &str, answer: Response) -> Step {
    let name = host_name.to_string();
    let call = deletion(host_id, address, host_name).detached().then(move |result| {
        if let Err(error) = result {
            log::warn!("snapshot {name} is left for the reconciler: {error}");
        }
        Step::respond(Response::no_content())
    });
    match call {
        Ok(call) => Step::RespondThen(answer, Box::new(call)),
        Err(_) => Step::Respond(answer),
    }
}

/// Clones on their way, one after the other: they take their memory from the same file.
#[derive(Debug)]
struct Cloning {
    taking: Taking,
    info: SnapshotInfo,
    left: i32,
    timeout_sec: i32,
    made: Vec<Capsule>,
}

impl Cloning {
    fn next(mut self, db: &mut crate::db::Database) -> Flow {
        if self.left == 0 {
            return self.finish(None);
        }
        self.left -= 1;
        let id = Kind::Capsule.new_id();
        let placed = db.transaction(|sql| self.insert(sql, &id));
        if let Err(stop) = placed {
            let answer = Response::from(stop);
            return self.finish(Some(answer));
        }
        let message = CapsuleCreate {
            capsule_id: id.clone(),
            template: self.taking.host_name.clone(),
            vcpus: self.info.vcpus,
            memory_mb: self.info.memory_mb,
            disk_size_mb: 0,
            timeout_sec: self.timeout_sec.unsigned_abs(),
            deadline_ms: u32::try_from(CLONE_TIMEOUT_MS - ANSWER_MS).unwrap_or(u32::MAX),
            allow_internet: false,
            environment: Vec::new(),
        };
        let Target { host_id, address, .. } = self.taking.target.clone();
        HostCall::new(&host_id, &address, &message, CLONE_TIMEOUT_MS).until::<CapsuleInfo>().detached().then(
            move |result| match result.and_then(|reply| reply.message::<CapsuleInfo>()) {
                Ok(info) => self.made(info),
                Err(error) => self.failed(id, error),
            },
        )
    }

    /// Takes the room for one more on the host of the origin.
    fn insert(&self, sql: &mut dyn Sql, id: &str) -> Result<(), Stop> {
        let origin = &self.taking.capsule;
        let candidate = hosts::candidate_for_update(sql, &self.taking.target.host_id)?;
        let wanted = crate::hosts::scheduler::Wanted {
            memory_mb: u64::from(self.info.memory_mb),
            vcpus: u64::from(self.info.vcpus),
            template: origin.template.clone(),
        };
        if candidate.is_none_or(|c| !c.fits(&wanted)) {
            return Err(Response::error(503, "host_unavailable", &Refusal::Full.to_string()).into());
        }
        capsules::insert(
            sql,
            &NewCapsule {
                id,
                team_id: &self.taking.principal.team_id,
                host_id: &self.taking.target.host_id,
                template: &origin.template,
                vcpus: origin.vcpus,
                memory_mb: origin.memory_mb,
                timeout_sec: self.timeout_sec,
                metadata: &json!({"cloned_from": origin.id}),
                created_by: self.taking.principal.actor.id(),
            },
        )?;
        Ok(())
    }

    fn made(mut self, info: CapsuleInfo) -> Flow {
        Step::database(move |db| {
            let Taking { principal, target, .. } = &self.taking;
            let capsule = db.transaction(|sql| {
                if capsules::set_running(sql, &target.host_id, &info, None)? {
                    let event = Event::new(Some(&principal.team_id), "capsule.create", &info.capsule_id);
                    let event = event.with(json!({"cloned_from": target.capsule_id}));
                    audit::write(sql, &principal.actor, &event)?;
                }
                Ok(capsules::find(sql, &principal.team_id, &info.capsule_id)?)
            })?;
            self.made.extend(capsule);
            self.next(db)
        })
    }

    fn failed(self, id: String, error: HostError) -> Flow {
        log::warn!("capsule {id}, a clone: {error}");
        Step::database(move |db| {
            let reason = "the clone could not be started: its host failed or had no room";
            db.transaction(|sql| {
                let from = [CapsuleState::Starting, CapsuleState::Running];
                Ok(capsules::change_state(sql, &id, &from, CapsuleState::Error, Some(reason))?)
            })?;
            let answer = match error.remote_code() {
                Some(Code::Internal) | None => Response::error(502, "agent_error", reason),
                Some(_) => error.into(),
            };
            self.finish(Some(answer))
        })
    }

    /// All that were made; where there are none, why.
    fn finish(self, failure: Option<Response>) -> Flow {
        let answer = match failure {
            Some(failure) if self.made.is_empty() => failure,
            _ => Response::json(201, &self.made),
        };
        Ok(self.taking.forget(answer))
    }
}

/// `DELETE /v1/snapshots/{name}`.
pub fn delete(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (principal, snapshot) = db.transaction(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let snapshot = snapshots::find(sql, &principal.team_id, request.param("name"))?;
            let missing = || Response::error(404, "not_found", "there is no such snapshot in your team");
            Ok((principal, snapshot.ok_or_else(missing)?))
        })?;
        let address = snapshot.host_address.clone().unwrap_or_default();
        deletion(&snapshot.host_id, &address, &snapshot.host_name).detached().then(move |result| match result
        {
            Ok(_) => deleted(principal, snapshot),
            Err(error) if error.remote_code() == Some(Code::NotFound) => deleted(principal, snapshot),
            Err(error) => Err(error.into()),
        })
    })
}

fn deleted(principal: Principal, snapshot: Snapshot) -> Flow {
    Step::database(move |db| {
        db.transaction(|sql| {
            if let Some((team_id, name)) = snapshots::forget(sql, &snapshot.host_id, &snapshot.host_name)? {
                let event = Event::new(Some(&team_id), DELETED, &name);
                audit::write(sql, &principal.actor, &event)?;
            }
            Ok(())
        })?;
        Step::respond(Response::no_content())
    })
}
