//! `POST /v1/capsules`: from the request to a running capsule, or to nothing at all.
//!
//! The answer comes when the capsule runs, so that it can be used at once. Until then the record is
//! `starting`; the host undoes what it began when it cannot finish. Hosts that could not be asked or
//! that decline are passed over for the next best, while there is time.

use super::fields::{Fields, invalid};
use super::principal::Principal;
use crate::audit::{self, Event};
use crate::auth::id::Kind;
use crate::db::capsules::{self, NewCapsule};
use crate::db::snapshots::{self, Snapshot};
use crate::db::{Database, Sql, Stop, hosts, networks};
use crate::hosts::scheduler::{self, Candidate, Refusal, Wanted};
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, HostError, Request, Response, Step, encode};
use crate::network::Network;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Instant;
use wire::message::{CapsuleCreate, CapsuleDestroy, CapsuleInfo, CapsuleState, Code};

/// How long all of it may take, in milliseconds. Clients give up after 30 s by default; they should get
/// an answer.
pub const CREATE_TIMEOUT_MS: u64 = 27_000;
/// How much of it is kept for the way back, in milliseconds.
const ANSWER_MS: u64 = 1_500;
/// Below this much time another host is not tried, in milliseconds.
const MIN_ATTEMPT_MS: u64 = 5_000;
/// How long a host whose agent cannot be reached, while there is no other, is asked again, in milliseconds
/// from the request: an agent that is being restarted is back in a moment.
const AGENT_PATIENCE_MS: u64 = 8_000;
/// The pause before it is asked again, in milliseconds.
const AGENT_PAUSE_MS: u64 = 400;
/// How many hosts are asked at most.
const MAX_ATTEMPTS: usize = 3;
/// The most labels.
const MAX_LABELS: usize = 20;
/// The size of a root disk when none is asked for, in MiB. It takes on the host what is written to it.
const DEFAULT_DISK_MB: i32 = 10_240;
/// The longest label value, in characters.
const MAX_LABEL: usize = 256;

/// What was asked for.
#[derive(Debug, Clone)]
struct Order {
    template: String,
    vcpus: i32,
    memory_mb: i32,
    timeout_sec: i32,
    disk_size_mb: i32,
    network: Network,
    labels: Value,
    /// The team's snapshot that the template is.
    snapshot: Option<Snapshot>,
}

/// Whether a text may name a template.
pub(super) fn is_template_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 63
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

impl Order {
    fn of(request: &Request) -> Result<Order, Response> {
        let fields = Fields::of(request)?;
        let template = fields.text("template", 200)?.filter(|t| !t.is_empty());
        let template = template.unwrap_or_else(|| "minimal".to_string());
        if !is_template_name(&template) {
            return Err(invalid(&format!(
                "{template:?} is not the name of a template: 1 to 63 of A-Z a-z 0-9 . _ -, beginning with a \
                 letter or digit"
            )));
        }
        let labels = fields.pairs("metadata", MAX_LABELS, MAX_LABEL)?;
        if let Some((key, _)) = labels.iter().find(|(key, _)| key.len() > 64 || !is_label_key(key)) {
            return Err(invalid(&format!(
                "{key:?} is not a key for metadata: 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or \
                 digit"
            )));
        }
        let labels: Map<String, Value> = labels.into_iter().map(|(k, v)| (k, Value::String(v))).collect();
        Ok(Order {
            template,
            vcpus: fields.integer("vcpus", 1..=64)?.unwrap_or(1),
            memory_mb: fields.integer("memory_mb", 128..=1_048_576)?.unwrap_or(512),
            timeout_sec: fields.integer("timeout_sec", 0..=31_536_000)?.unwrap_or(0),
            disk_size_mb: fields.integer("disk_size_mb", 256..=16_777_216)?.unwrap_or(DEFAULT_DISK_MB),
            network: match fields.object("network")? {
                Some(fields) => {
                    Network::default().with("network.", fields.all()).map_err(|e| invalid(&e.to_string()))?
                }
                None => Network::default(),
            },
            labels: Value::Object(labels),
            snapshot: None,
        })
    }

    /// Looks whether the template is a snapshot of the team's. Its machine is as it was.
    fn find_snapshot(&mut self, db: &mut Database, principal: &Principal) -> Result<(), Response> {
        self.snapshot = db.read(|sql| Ok(snapshots::find(sql, &principal.team_id, &self.template)?))?;
        if let Some(snapshot) = &self.snapshot {
            (self.vcpus, self.memory_mb, self.disk_size_mb) = (snapshot.vcpus, snapshot.memory_mb, 0);
        }
        Ok(())
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            memory_mb: u64::from(self.memory_mb.unsigned_abs()),
            vcpus: u64::from(self.vcpus.unsigned_abs()),
            template: self.template.clone(),
        }
    }
}

fn is_label_key(key: &str) -> bool {
    let mut bytes = key.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// `POST /v1/capsules`.
pub fn create(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    let began = Instant::now();
    Step::database(move |db| {
        let principal = db.read(|sql| Principal::of(sql, &context, &request))?;
        let mut order = Order::of(&request)?;
        order.find_snapshot(db, &principal)?;
        let mut making =
            Making { id: Kind::Capsule.new_id(), principal, order, began, tried: Vec::new(), place: None };
        let place = db.transaction(|sql| making.insert(sql))?;
        making.place = Some(place);
        making.ask()
    })
}

/// Where a capsule is being made.
#[derive(Debug, Clone)]
struct Place {
    host_id: String,
    address: String,
}

/// A capsule on its way.
#[derive(Debug, Clone)]
struct Making {
    id: String,
    principal: Principal,
    order: Order,
    began: Instant,
    /// The hosts that were asked before.
    tried: Vec<String>,
    place: Option<Place>,
}

fn refusal(refusal: &Refusal) -> Response {
    match refusal {
        Refusal::TooLarge { .. } => invalid(&refusal.to_string()),
        _ => Response::error(503, "host_unavailable", &refusal.to_string()),
    }
}

impl Making {
    /// Finds the best host that still has room once nobody else can take it, and gives it to `take`.
    fn place<T>(
        &self,
        sql: &mut dyn Sql,
        mut take: impl FnMut(&mut dyn Sql, &Candidate) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let wanted = self.order.wanted();
        let mut candidates = hosts::candidates(sql, &self.principal.team_id)?;
        candidates.retain(|c| !self.tried.contains(&c.id));
        if let Some(snapshot) = &self.order.snapshot {
            candidates.retain(|c| c.id == snapshot.host_id);
        }
        let ranking = scheduler::rank(&candidates, &wanted).map_err(|r| refusal(&r))?;
        for index in ranking {
            let locked = hosts::candidate_for_update(sql, &candidates[index].id)?;
            if let Some(candidate) = locked.filter(|c| c.fits(&wanted)) {
                return take(sql, &candidate);
            }
        }
        Err(refusal(&Refusal::Full).into())
    }

    fn insert(&self, sql: &mut dyn Sql) -> Result<Place, Stop> {
        self.place(sql, |sql, candidate| {
            capsules::insert(
                sql,
                &NewCapsule {
                    id: &self.id,
                    team_id: &self.principal.team_id,
                    host_id: &candidate.id,
                    template: &self.order.template,
                    vcpus: self.order.vcpus,
                    memory_mb: self.order.memory_mb,
                    timeout_sec: self.order.timeout_sec,
                    metadata: &self.order.labels,
                    created_by: self.principal.actor.id(),
                },
            )?;
            networks::insert(sql, &self.id, &self.order.network)?;
            Ok(Place { host_id: candidate.id.clone(), address: candidate.address.clone() })
        })
    }

    fn left_ms(&self) -> u64 {
        let gone = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        CREATE_TIMEOUT_MS.saturating_sub(gone)
    }

    /// Asks the host that the capsule was given to.
    fn ask(mut self) -> Flow {
        let Some(place) = self.place.take() else {
            return Err(Response::error(500, "internal_error", "a capsule without a host"));
        };
        let left_ms = self.left_ms().max(MIN_ATTEMPT_MS);
        let message = CapsuleCreate {
            capsule_id: self.id.clone(),
            template: match &self.order.snapshot {
                Some(snapshot) => snapshot.host_name.clone(),
                None => self.order.template.clone(),
            },
            vcpus: self.order.vcpus.unsigned_abs(),
            memory_mb: self.order.memory_mb.unsigned_abs(),
            disk_size_mb: self.order.disk_size_mb.unsigned_abs(),
            timeout_sec: self.order.timeout_sec.unsigned_abs(),
            deadline_ms: u32::try_from(left_ms - ANSWER_MS).unwrap_or(u32::MAX),
            allow_internet: self.order.network.allow_internet,
            environment: Vec::new(),
        };
        let mut call = HostCall::new(&place.host_id, &place.address, &message, left_ms);
        if self.order.network.is_detailed() {
            // Before the capsule, so that it holds from the first packet on.
            call.messages.insert(0, encode(&self.order.network.message("", 0)));
        }
        call.until::<CapsuleInfo>().then(move |result| {
            match result.and_then(|reply| reply.message::<CapsuleInfo>()) {
                Ok(info) => self.finish(place, info),
                Err(error) => self.fail(place, error),
            }
        })
    }

    /// The host has it running.
    fn finish(self, place: Place, info: CapsuleInfo) -> Flow {
        Step::database(move |db| {
            let capsule = db.transaction(|sql| {
                let is_wanted = capsules::set_running(sql, &place.host_id, &info, None)?;
                if is_wanted {
                    let event = Event::new(Some(&self.principal.team_id), "capsule.create", &self.id);
                    let event = event.with(json!({"template": self.order.template}));
                    audit::write(sql, &self.principal.actor, &event)?;
                }
                let capsule = capsules::find(sql, &self.principal.team_id, &self.id)?;
                // The reconciler may have noted it first.
                Ok(capsule.filter(|c| is_wanted || c.status == CapsuleState::Running))
            })?;
            match capsule {
                Some(capsule) => Step::respond(Response::json(201, &capsule)),
                None => {
                    let message = "the capsule was destroyed while it was being made";
                    Ok(self.clean_up(&place, Response::error(409, "conflict", message)))
                }
            }
        })
    }

    /// The host has not got it running: perhaps another can.
    fn fail(mut self, place: Place, error: HostError) -> Flow {
        let is_declined = error.is_untouched()
            || matches!(
                error.remote_code(),
                // An unknown template: hosts need not all have the same.
                Some(Code::NotFound | Code::ResourceExhausted | Code::Unavailable | Code::ShuttingDown)
            );
        if !self.tried.contains(&place.host_id) {
            self.tried.push(place.host_id.clone());
        }
        let may_retry = is_declined && self.tried.len() < MAX_ATTEMPTS && self.left_ms() >= MIN_ATTEMPT_MS;
        log::warn!("capsule {} on {}: {error}", self.id, place.host_id);
        Step::database(move |db| {
            if may_retry && let Some(next) = self.try_elsewhere(db)? {
                self.place = Some(next);
                return self.ask();
            }
            let is_away = matches!(error, HostError::Unreachable { .. });
            if is_away && CREATE_TIMEOUT_MS - self.left_ms() < AGENT_PATIENCE_MS {
                return Ok(Step::Pause(
                    AGENT_PAUSE_MS,
                    Box::new(move |result| match result {
                        Ok(()) => {
                            self.place = Some(place);
                            self.ask()
                        }
                        Err(gone) => self.fail(place, gone),
                    }),
                ));
            }
            let answer = self.answer(&error);
            let reason = answer.error_message().unwrap_or_default();
            db.transaction(|sql| {
                // The reconciler may have found it running meanwhile; it is destroyed below.
                let from = [CapsuleState::Pending, CapsuleState::Starting, CapsuleState::Running];
                capsules::change_state(sql, &self.id, &from, CapsuleState::Error, Some(&reason))?;
                let event = Event::new(Some(&self.principal.team_id), "capsule.create", &self.id);
                let event = event.with(json!({"template": self.order.template}));
                Ok(audit::write(sql, &self.principal.actor, &event.failed(&reason))?)
            })?;
            // A host that answered has undone all of it. Otherwise nobody knows.
            let is_undone = is_declined || matches!(error, HostError::Remote(_));
            if is_undone { Err(answer) } else { Ok(self.clean_up(&place, answer)) }
        })
    }

    /// Gives the capsule to the next best host; `None` when there is none.
    fn try_elsewhere(&self, db: &mut Database) -> Result<Option<Place>, Response> {
        let placed = db.transaction(|sql| {
            self.place(sql, |sql, candidate| {
                let place = Place { host_id: candidate.id.clone(), address: candidate.address.clone() };
                Ok(capsules::place(sql, &self.id, &candidate.id)?.then_some(place))
            })
        });
        match placed {
            Ok(place) => Ok(place),
            // No other host: the first one's reason is the better answer.
            Err(Stop::Answer(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn answer(&self, error: &HostError) -> Response {
        let template = &self.order.template;
        match error.remote_code() {
            Some(Code::NotFound) => {
                // The host's own words have paths of the host in them; they are in the log.
                let message = format!("there is no template {template:?} on a host that could take it");
                Response::error(404, "not_found", &message)
            }
            // The request passed our own checks; what is left is between us and the host.
            Some(Code::InvalidRequest) => invalid(&error.to_string()),
            Some(Code::ResourceExhausted | Code::ShuttingDown) => {
                Response::error(503, "host_unavailable", &error.to_string())
            }
            // A fault of the host is for its operator, who has the text in the log.
            Some(Code::Internal) => {
                let id = &self.id;
                let message = format!(
                    "the capsule could not be started: its host failed; the server's log has why, at {id}"
                );
                Response::error(502, "agent_error", &message)
            }
            // It was destroyed meanwhile: nothing else cancels a create that somebody still waits for.
            Some(Code::Cancelled) => {
                Response::error(409, "conflict", "the capsule was destroyed while it was being made")
            }
            // The host is there: it is the guest that did not come up.
            Some(_) => {
                Response::error(502, "agent_error", &format!("the capsule could not be started: {error}"))
            }
            None => error.clone().into(),
        }
    }

    /// Answers, and sees to it that the host has nothing left. Should that fail, the reconciler will.
    fn clean_up(&self, place: &Place, answer: Response) -> Step {
        let message = CapsuleDestroy { capsule_id: self.id.clone() };
        let id = self.id.clone();
        let call =
            HostCall::new(&place.host_id, &place.address, &message, super::host_delete::DESTROY_TIMEOUT_MS)
                .detached()
                .then(move |result| {
                    if let Err(error) = result
                        && error.remote_code() != Some(Code::NotFound)
                    {
                        log::warn!("capsule {id} is left for the reconciler: {error}");
                    }
                    Step::respond(Response::no_content())
                });
        match call {
            Ok(call) => Step::RespondThen(answer, Box::new(call)),
            Err(_) => Step::Respond(answer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_names_are_no_paths() {
        for good in ["minimal", "template-1a2b3c4d", "Python3.13", "a", &"x".repeat(63)] {
            assert!(is_template_name(good), "{good}");
        }
        for bad in ["", ".", "..", "../etc", "a/b", "-x", "ä", "a b", "a\0", &"x".repeat(64)] {
            assert!(!is_template_name(bad), "{bad}");
        }
    }
}
