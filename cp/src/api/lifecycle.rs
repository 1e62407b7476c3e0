//! What becomes of a capsule that is there: `POST /v1/capsules/{id}/pause`, `/resume` and `/ping`.
//!
//! While the host is at work the record is in a passing state, so that nobody begins anything else. The
//! host finishes what it has begun whether or not anybody waits; where its answer is lost, the reconciler
//! notes what became of it.

use super::capsule_access::{Target, find, target, target_in};
use super::principal::Principal;
use crate::audit::{self, Event};
use crate::db::{Sql, Stop, capsules};
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, HostError, Request, Response, Step};
use std::sync::Arc;
use wire::message::{CapsuleInfo, CapsulePause, CapsulePing, CapsuleResume, CapsuleState, Code, Done};

/// How long a host may take to save a capsule, in milliseconds: much memory goes to a slow disk.
pub const PAUSE_TIMEOUT_MS: u64 = 120_000;
/// How long a capsule may take to go on, in milliseconds. Clients give up after 30 s by default; they
/// should get an answer.
pub const RESUME_TIMEOUT_MS: u64 = 27_000;
/// How much of it is kept for the way back, in milliseconds.
const ANSWER_MS: u64 = 1_500;
/// How long a host may take to note that a capsule is still needed, in milliseconds.
const PING_TIMEOUT_MS: u64 = 5_000;

/// What is to become of a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Pause,
    Resume,
}

impl Change {
    /// The states in which it can begin.
    fn before(self) -> &'static [CapsuleState] {
        match self {
            Change::Pause => &[CapsuleState::Running],
            Change::Resume => &[CapsuleState::Paused, CapsuleState::Hibernated],
        }
    }

    fn meanwhile(self) -> CapsuleState {
        match self {
            Change::Pause => CapsuleState::Pausing,
            Change::Resume => CapsuleState::Resuming,
        }
    }

    /// Whether that is what was asked for.
    fn is_done(self, state: CapsuleState) -> bool {
        match self {
            Change::Pause => matches!(state, CapsuleState::Paused | CapsuleState::Hibernated),
            Change::Resume => state == CapsuleState::Running,
        }
    }

    fn event(self) -> &'static str {
        match self {
            Change::Pause => "capsule.pause",
            Change::Resume => "capsule.resume",
        }
    }
}

/// `POST /v1/capsules/{id}/pause`.
pub fn pause(request: Request, context: &Arc<Context>) -> Flow {
    change(request, context, Change::Pause)
}

/// `POST /v1/capsules/{id}/resume`.
pub fn resume(request: Request, context: &Arc<Context>) -> Flow {
    change(request, context, Change::Resume)
}

/// `POST /v1/capsules/{id}/ping`: it is still needed.
pub fn ping(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let (target, is_timed) = db.read(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let capsule = find(sql, &principal, request.param("id"))?;
            let target = target(&capsule)?;
            capsules::touch(sql, &capsule.id)?;
            Ok((target, capsule.timeout_sec > 0))
        })?;
        if !is_timed {
            return Step::respond(Response::no_content());
        }
        let message = CapsulePing { capsule_id: target.capsule_id };
        HostCall::new(&target.host_id, &target.address, &message, PING_TIMEOUT_MS).until::<Done>().then(
            |result| {
                result?;
                Step::respond(Response::no_content())
            },
        )
    })
}

/// A change on its way.
#[derive(Debug, Clone)]
struct Changing {
    change: Change,
    principal: Principal,
    target: Target,
    /// Its state before.
    before: CapsuleState,
}

fn change(request: Request, context: &Arc<Context>, change: Change) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let changing = db.transaction(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let capsule = find(sql, &principal, request.param("id"))?;
            let target = target_in(&capsule, change.before())?;
            let before = capsule.status;
            if !capsules::change_state(sql, &capsule.id, &[before], change.meanwhile(), None)? {
                let message = "the capsule's state has just changed; look at it again";
                return Err(Response::error(409, "invalid_state", message).into());
            }
            Ok(Changing { change, principal, target, before })
        })?;
        changing.ask()
    })
}

impl Changing {
    fn ask(self) -> Flow {
        let Target { host_id, address, capsule_id } = self.target.clone();
        let call = match self.change {
            Change::Pause => {
                HostCall::new(&host_id, &address, &CapsulePause { capsule_id }, PAUSE_TIMEOUT_MS)
            }
            Change::Resume => {
                let deadline_ms = u32::try_from(RESUME_TIMEOUT_MS - ANSWER_MS).unwrap_or(u32::MAX);
                let message = CapsuleResume { capsule_id, deadline_ms };
                HostCall::new(&host_id, &address, &message, RESUME_TIMEOUT_MS)
            }
        };
        // The record is in a passing state: what becomes of it has to be noted though the client left.
        call.until::<CapsuleInfo>().detached().then(move |result| {
            match result.and_then(|reply| reply.message::<CapsuleInfo>()) {
                Ok(info) => self.finish(info),
                Err(error) => self.fail(error),
            }
        })
    }

    fn finish(self, info: CapsuleInfo) -> Flow {
        Step::database(move |db| {
            let capsule = db.transaction(|sql| {
                let is_new = match self.change {
                    Change::Pause => capsules::set_paused(sql, &self.target.host_id, &info, None)?,
                    Change::Resume => {
                        capsules::touch(sql, &self.target.capsule_id)?;
                        capsules::set_running(sql, &self.target.host_id, &info, None)?
                    }
                };
                if is_new {
                    self.write(sql, None)?;
                }
                Ok(capsules::find(sql, &self.principal.team_id, &self.target.capsule_id)?)
            })?;
            match capsule {
                // The reconciler may have noted it first.
                Some(capsule) if self.change.is_done(capsule.status) => {
                    Step::respond(Response::json(200, &capsule))
                }
                _ => {
                    let message = "the capsule was destroyed meanwhile";
                    Err(Response::error(409, "conflict", message))
                }
            }
        })
    }

    fn fail(self, error: HostError) -> Flow {
        log::warn!("capsule {}: {}: {error}", self.target.capsule_id, self.change.event());
        // A host that answered, or was not reached, has left it as it was. Otherwise nobody knows, and the
        // reconciler asks; so it does where the host says that the capsule is in another state.
        let is_as_before = error.is_untouched()
            || matches!(&error, HostError::Remote(remote) if remote.code() != Code::InvalidState);
        let answer = self.answer(&error);
        Step::database(move |db| {
            db.transaction(|sql| {
                if is_as_before {
                    capsules::change_state(
                        sql,
                        &self.target.capsule_id,
                        &[self.change.meanwhile()],
                        self.before,
                        None,
                    )?;
                }
                self.write(sql, Some(&error))
            })?;
            Err(answer)
        })
    }

    fn write(&self, sql: &mut dyn Sql, error: Option<&HostError>) -> Result<(), Stop> {
        let event = Event::new(Some(&self.principal.team_id), self.change.event(), &self.target.capsule_id);
        let reason = error.map(HostError::to_string).unwrap_or_default();
        let event = if error.is_some() { event.failed(&reason) } else { event };
        Ok(audit::write(sql, &self.principal.actor, &event)?)
    }

    fn answer(&self, error: &HostError) -> Response {
        let id = &self.target.capsule_id;
        match error.remote_code() {
            // A fault of the host is for its operator, who has the text in the log.
            Some(Code::Internal) => {
                let (what, still) = match self.change {
                    Change::Pause => ("saved", "it runs on"),
                    Change::Resume => ("resumed", "it is still paused"),
                };
                let message = format!(
                    "the capsule could not be {what}: its host failed; {still}, and the server's log has \
                     why, at {id}"
                );
                Response::error(502, "agent_error", &message)
            }
            _ => error.clone().into(),
        }
    }
}
