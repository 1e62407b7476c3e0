//! What recurs without a client: comparing each host's capsules with the records.
//!
//! What a capsule may reach is what is on record. A change whose answer was lost may have been made on the host
//! or not: it was answered as failed, so what is on record is sent again, as a later change.

use super::network::{ABANDONED_SEC, CHANGE_TIMEOUT_MS, EVENT as NETWORK_EVENT};
use super::snapshots::{DELETED as SNAPSHOT_DELETED, deletion};
use crate::audit::{self, Actor, Event};
use crate::db::networks::{self, Stored};
use crate::db::{Sql, Stop, capsules, hosts, orphans, snapshots};
use crate::hosts::reconciler::{self, LIST_TIMEOUT_MS, Repair, Unwanted};
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, Job, Response, Step};
use serde_json::{Value, json};
use std::sync::Arc;
use wire::message::{
    CapsuleDestroy, CapsuleInfo, CapsuleList, CapsuleState, Done, HostStatus, HostStatusReply, SnapshotInfo,
    SnapshotList,
};

/// How often a host's capsules are compared, in seconds.
pub const RECONCILE_EVERY_SEC: f64 = 10.0;
/// How often a lane looks for a host whose turn it is, in milliseconds.
const LOOK_EVERY_MS: u64 = 2_000;
/// The most hosts that a lane compares before it pauses.
const MAX_HOSTS_A_RUN: u32 = 100;
/// The most capsules that are destroyed on a host in one go; the next comparison goes on.
const MAX_DESTROYED: usize = 100;
/// The most capsules whose network is put right on a host in one go; the next comparison goes on.
const MAX_NETWORKS: i64 = 20;
/// The most snapshots that are deleted on a host in one go; the next comparison goes on.
const MAX_DELETED: usize = 20;

/// The recurring jobs. The lanes do the same: a host that does not answer holds up one of them.
pub fn jobs() -> Vec<Job> {
    ["reconcile-a", "reconcile-b", "reconcile-c"]
        .into_iter()
        .map(|name| Job { name, every_ms: LOOK_EVERY_MS, run: |_: &Arc<Context>| next_host(MAX_HOSTS_A_RUN) })
        .collect()
}

/// Compares the next host whose turn it is.
fn next_host(hosts_left: u32) -> Flow {
    if hosts_left == 0 {
        return Step::respond(Response::no_content());
    }
    Step::database(move |db| {
        let claimed = db.transaction(|sql| Ok(hosts::claim_for_reconciling(sql, RECONCILE_EVERY_SEC)?))?;
        match claimed {
            Some((id, address)) => Visit { id, address, hosts_left: hosts_left - 1 }.list(),
            None => Step::respond(Response::no_content()),
        }
    })
}

/// One comparison.
#[derive(Debug, Clone)]
struct Visit {
    id: String,
    address: String,
    hosts_left: u32,
}

impl Visit {
    fn list(self) -> Flow {
        let call = HostCall::new(&self.id, &self.address, &CapsuleList {}, LIST_TIMEOUT_MS).until::<Done>();
        call.then(move |result| match result.and_then(|reply| reply.all::<CapsuleInfo>()) {
            Ok(reported) => self.status(reported),
            Err(error) => {
                log::info!("{} does not list its capsules: {error}", self.id);
                next_host(self.hosts_left)
            }
        })
    }

    fn status(self, reported: Vec<CapsuleInfo>) -> Flow {
        let call = HostCall::new(&self.id, &self.address, &HostStatus {}, LIST_TIMEOUT_MS)
            .until::<HostStatusReply>();
        call.then(move |result| {
            // The comparison does not need it.
            let status = result.and_then(|reply| reply.message::<HostStatusReply>()).ok();
            self.repair(reported, status)
        })
    }

    fn repair(self, reported: Vec<CapsuleInfo>, status: Option<HostStatusReply>) -> Flow {
        Step::database(move |db| {
            let ids: Vec<String> = reported.iter().map(|info| info.capsule_id.clone()).collect();
            let doomed = db.transaction(|sql| {
                if let Some(status) = &status {
                    let memory_left_mb = status.memory_mb.saturating_sub(status.memory_reserved_mb);
                    let left =
                        (i64::from(memory_left_mb), i64::try_from(status.disk_free_mb).unwrap_or(i64::MAX));
                    hosts::set_report(sql, &self.id, &status.templates, left)?;
                }
                let records = capsules::records(sql, &self.id, &ids)?;
                let unknown = reconciler::unknown(&reported, &records);
                let watched = orphans::watch(sql, &self.id, &unknown)?;
                let mut doomed = Vec::new();
                for repair in reconciler::compare(&reported, &records, &watched) {
                    if let Some(unwanted) = carry_out(sql, &self.id, repair)? {
                        doomed.push(unwanted);
                    }
                }
                Ok(doomed)
            })?;
            self.destroy(doomed.into_iter().take(MAX_DESTROYED).collect())
        })
    }

    /// Begins to put right what capsules may reach, where that is in doubt.
    fn networks(self) -> Flow {
        Step::database(move |db| {
            let doubtful = db.transaction(|sql| {
                Ok(networks::begin_doubtful(sql, &self.id, ABANDONED_SEC, MAX_NETWORKS)?)
            })?;
            self.put_right(doubtful)
        })
    }

    /// Has the host do what is on record, for one capsule after the other.
    fn put_right(self, mut doubtful: Vec<(String, Stored)>) -> Flow {
        let Some((id, Stored { network, revision })) = doubtful.pop() else { return self.snapshots() };
        let message = network.message(&id, revision);
        let call = HostCall::new(&self.id, &self.address, &message, CHANGE_TIMEOUT_MS).until::<Done>();
        call.then(move |result| {
            Step::database(move |db| {
                let made = result.and_then(|reply| reply.message::<Done>());
                db.transaction(|sql| {
                    networks::end(sql, &id, revision)?;
                    if made.is_ok() && networks::finish(sql, &id, &network, revision)? {
                        let reason = "it was not known whether the change before it was made";
                        record(sql, NETWORK_EVENT, &id, json!({"network": network, "reason": reason}), None)?;
                    }
                    Ok(())
                })?;
                match made {
                    Ok(_) => log::info!("what capsule {id} may reach is as on record again"),
                    Err(error) => log::warn!(
                        "what capsule {id} may reach is in doubt, and will be put right later: {error}"
                    ),
                }
                self.put_right(doubtful)
            })
        })
    }

    /// Compares the host's snapshots with those on record.
    fn snapshots(self) -> Flow {
        let call = HostCall::new(&self.id, &self.address, &SnapshotList {}, LIST_TIMEOUT_MS).until::<Done>();
        call.then(move |result| match result.and_then(|reply| reply.all::<SnapshotInfo>()) {
            Ok(reported) => Step::database(move |db| {
                let mut doomed = db.transaction(|sql| {
                    let on_record = snapshots::on_host(sql, &self.id)?;
                    let unknown = reconciler::unknown_snapshots(&reported, &on_record);
                    let watched = orphans::watch_snapshots(sql, &self.id, &unknown)?;
                    Ok(reconciler::doomed_snapshots(&watched))
                })?;
                doomed.truncate(MAX_DELETED);
                self.delete(doomed)
            }),
            Err(error) => {
                log::info!("{} does not list its snapshots: {error}", self.id);
                next_host(self.hosts_left)
            }
        })
    }

    /// Deletes one snapshot after the other.
    fn delete(self, mut doomed: Vec<String>) -> Flow {
        let Some(host_name) = doomed.pop() else { return next_host(self.hosts_left) };
        log::warn!("snapshot {host_name} on {} is on no record and is deleted", self.id);
        deletion(&self.id, &self.address, &host_name).then(move |result| {
            match result.and_then(|reply| reply.message::<Done>()) {
                Ok(_) => Step::database(move |db| {
                    db.transaction(|sql| {
                        let forgotten = snapshots::forget(sql, &self.id, &host_name)?;
                        let (team_id, name) = forgotten.unzip();
                        let details = json!({"host_id": self.id, "reason": Unwanted::Orphaned.name()});
                        let name = name.as_deref().unwrap_or(&host_name);
                        let event = Event::new(team_id.as_deref(), SNAPSHOT_DELETED, name);
                        Ok(audit::write(sql, &Actor::System, &event.with(details))?)
                    })?;
                    self.delete(doomed)
                }),
                Err(error) => {
                    log::warn!("snapshot {host_name} could not be deleted, and will be tried again: {error}");
                    self.delete(doomed)
                }
            }
        })
    }

    /// Destroys one capsule after the other.
    fn destroy(self, mut doomed: Vec<(String, Unwanted)>) -> Flow {
        let Some((id, reason)) = doomed.pop() else { return self.networks() };
        let why = reason.name();
        log::warn!("capsule {id} on {} is no longer wanted ({why}) and is destroyed", self.id);
        let message = CapsuleDestroy { capsule_id: id.clone() };
        let timeout_ms = super::host_delete::DESTROY_TIMEOUT_MS;
        HostCall::new(&self.id, &self.address, &message, timeout_ms).then(move |result| match result {
            // The next comparison notes that it is gone, and who began it is on record.
            Ok(_) if reason == Unwanted::Unfinished => self.destroy(doomed),
            Ok(_) => Step::database(move |db| {
                let details = json!({"host_id": self.id, "reason": why});
                db.transaction(|sql| record(sql, "capsule.destroy", &id, details.clone(), None))?;
                self.destroy(doomed)
            }),
            Err(error) => {
                log::warn!("capsule {id} could not be destroyed, and will be tried again: {error}");
                self.destroy(doomed)
            }
        })
    }
}

/// Does what the database can do, and gives the capsule that the host has to destroy.
fn carry_out(sql: &mut dyn Sql, host_id: &str, repair: Repair) -> Result<Option<(String, Unwanted)>, Stop> {
    match repair {
        Repair::Note { info, from } => {
            let is_new = match info.state {
                CapsuleState::Running => capsules::set_running(sql, host_id, &info, Some(from))?,
                _ => capsules::set_paused(sql, host_id, &info, Some(from))?,
            };
            if is_new && from != info.state {
                let (id, state) = (&info.capsule_id, info.state.name());
                log::info!("capsule {id} is {state}; on record it was {}", from.name());
                let details = json!({"status": state, "before": from.name()});
                record(sql, "capsule.state", id, details, None)?;
            }
        }
        Repair::MarkError { id, from, reason } => note(sql, &id, from, CapsuleState::Error, reason)?,
        Repair::MarkMissing { id, from } => {
            let reason = "its host does not know it any more: its virtual machine ended, or the host was \
                          restarted";
            note(sql, &id, from, CapsuleState::Missing, reason)?;
        }
        Repair::MarkStopped { id } => {
            if capsules::change_state(sql, &id, &[CapsuleState::Stopping], CapsuleState::Stopped, None)? {
                record(sql, "capsule.destroy", &id, json!({"host_id": host_id}), None)?;
            }
        }
        Repair::Destroy { id, reason } => return Ok(Some((id, reason))),
    }
    Ok(None)
}

fn note(sql: &mut dyn Sql, id: &str, from: CapsuleState, to: CapsuleState, reason: &str) -> Result<(), Stop> {
    if capsules::change_state(sql, id, &[from], to, Some(reason))? {
        log::warn!("capsule {id} is {}: {reason}", to.name());
        record(sql, "capsule.state", id, json!({"status": to.name()}), Some(reason))?;
    }
    Ok(())
}

/// Writes an entry into the audit log, for the capsule's team where that is known.
fn record(
    sql: &mut dyn Sql,
    action: &str,
    id: &str,
    details: Value,
    failure: Option<&str>,
) -> Result<(), Stop> {
    let team_id = capsules::team_of(sql, id)?;
    let event = Event { failure, ..Event::new(team_id.as_deref(), action, id).with(details) };
    Ok(audit::write(sql, &Actor::System, &event)?)
}
