//! `capsules`.

use super::hosts::is_fresh;
use super::{DbError, Sql, Timestamp, column, json_column};
use crate::hosts::reconciler::Record;
use postgres::Row;
use serde::{Serialize, Serializer};
use serde_json::Value;
use wire::message::{CapsuleInfo, CapsuleState};

/// The most capsules that a list has.
pub const MAX_LIST: i64 = 1000;

/// A capsule, as the API tells it.
#[derive(Debug, Clone, Serialize)]
pub struct Capsule {
    /// `cl-…`
    pub id: String,
    /// Where it is in its life.
    #[serde(serialize_with = "state_name")]
    pub status: CapsuleState,
    /// The template that it was made of.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: i32,
    /// Memory in MiB.
    pub memory_mb: i32,
    /// Size of the root disk in MiB; 0 while it is not known.
    pub disk_size_mb: i32,
    /// What its own blocks take on the host, in MiB.
    pub disk_used_mb: i32,
    /// Idle seconds until it is paused; 0 for never.
    pub timeout_sec: i32,
    /// The guest's address inside its network namespace.
    pub guest_ip: String,
    /// The address by which its host reaches the guest.
    pub host_ip: String,
    /// Labels, and the versions of what runs it.
    pub metadata: Value,
    /// Why it is in state `error` or `missing`.
    #[serde(skip_serializing_if = "Option::is_none", rename = "error")]
    pub failure: Option<String>,
    /// Since when it is asked for.
    pub created_at: Timestamp,
    /// Since when it runs.
    pub started_at: Option<Timestamp>,
    /// When it was last used.
    pub last_active_at: Option<Timestamp>,
    /// When its state last changed.
    pub last_updated: Timestamp,
    /// Its host.
    #[serde(skip)]
    pub host_id: Option<String>,
    /// Where its host's agent listens.
    #[serde(skip)]
    pub host_address: Option<String>,
    /// Whether its host was heard of lately.
    #[serde(skip)]
    pub is_host_live: bool,
}

fn state_name<S: Serializer>(state: &CapsuleState, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

macro_rules! select {
    ($rest:literal) => {
        concat!(
            "select c.id, c.status, c.template, c.vcpus, c.memory_mb, c.disk_size_mb, c.disk_used_mb,
                 c.timeout_sec, c.guest_ip, c.host_ip, c.metadata::text as metadata, c.failure, c.created_at,
                 c.started_at, c.last_active_at, c.last_updated, c.host_id, h.address as host_address, ",
            is_fresh!("h"),
            " as is_host_live
             from capsules c left join hosts h on h.id = c.host_id where ",
            $rest
        )
    };
}

fn state(row: &Row) -> Result<CapsuleState, DbError> {
    let name: &str = column(row, "status")?;
    CapsuleState::from_name(name).ok_or_else(|| DbError::Bug(format!("capsule status {name:?}")))
}

fn capsule(row: &Row) -> Result<Capsule, DbError> {
    Ok(Capsule {
        id: column(row, "id")?,
        status: state(row)?,
        template: column(row, "template")?,
        vcpus: column(row, "vcpus")?,
        memory_mb: column(row, "memory_mb")?,
        disk_size_mb: column(row, "disk_size_mb")?,
        disk_used_mb: column(row, "disk_used_mb")?,
        timeout_sec: column(row, "timeout_sec")?,
        guest_ip: column(row, "guest_ip")?,
        host_ip: column(row, "host_ip")?,
        metadata: json_column(row, "metadata")?,
        failure: column(row, "failure")?,
        created_at: column(row, "created_at")?,
        started_at: column(row, "started_at")?,
        last_active_at: column(row, "last_active_at")?,
        last_updated: column(row, "last_updated")?,
        host_id: column(row, "host_id")?,
        host_address: column(row, "host_address")?,
        is_host_live: column(row, "is_host_live")?,
    })
}

/// A capsule that is about to be made on a host.
#[derive(Debug, Clone)]
pub struct NewCapsule<'a> {
    /// `cl-…`
    pub id: &'a str,
    /// Whose it is.
    pub team_id: &'a str,
    /// Where it is made.
    pub host_id: &'a str,
    /// The template that it is made of.
    pub template: &'a str,
    /// Virtual CPUs.
    pub vcpus: i32,
    /// Memory in MiB.
    pub memory_mb: i32,
    /// Idle seconds until it is paused; 0 for never.
    pub timeout_sec: i32,
    /// Labels, a JSON object.
    pub metadata: &'a Value,
    /// The id of the user or key that asks for it.
    pub created_by: &'a str,
}

/// Adds a capsule in state `starting`.
///
/// # Errors
/// What the database says.
pub fn insert(sql: &mut dyn Sql, new: &NewCapsule<'_>) -> Result<(), DbError> {
    sql.execute(
        "insert into capsules (id, team_id, host_id, status, template, vcpus, memory_mb, timeout_sec,
             metadata, created_by)
         values ($1, $2, $3, 'starting', $4, $5, $6, $7, $8::text::jsonb, $9)",
        &[
            &new.id,
            &new.team_id,
            &new.host_id,
            &new.template,
            &new.vcpus,
            &new.memory_mb,
            &new.timeout_sec,
            &new.metadata.to_string(),
            &new.created_by,
        ],
    )?;
    Ok(())
}

/// A team's capsule, whatever its state.
///
/// # Errors
/// What the database says.
pub fn find(sql: &mut dyn Sql, team_id: &str, id: &str) -> Result<Option<Capsule>, DbError> {
    sql.row(select!("c.id = $1 and c.team_id = $2"), &[&id, &team_id])?.as_ref().map(capsule).transpose()
}

/// A team's capsules, the newest first: those that are there, and those that failed after they ran.
///
/// # Errors
/// What the database says.
pub fn list(sql: &mut dyn Sql, team_id: &str) -> Result<Vec<Capsule>, DbError> {
    sql.rows(
        select!(
            "c.team_id = $1 and c.status <> 'stopped' and not (c.status = 'error' and c.started_at is null)
             order by c.created_at desc, c.id limit $2"
        ),
        &[&team_id, &MAX_LIST],
    )?
    .iter()
    .map(capsule)
    .collect()
}

/// Gives a starting capsule to another host. `false` when it is not starting any more.
///
/// # Errors
/// What the database says.
pub fn place(sql: &mut dyn Sql, id: &str, host_id: &str) -> Result<bool, DbError> {
    let changed = sql.execute(
        "update capsules set host_id = $2, last_updated = now() where id = $1 and status = 'starting'",
        &[&id, &host_id],
    )?;
    Ok(changed > 0)
}

/// Notes what a host tells of a capsule that runs; with `from`, only where that is the state on record.
/// `false` when there is nothing to note: all of it is known, or the capsule is not expected to run because
/// it was destroyed meanwhile.
///
/// # Errors
/// What the database says.
pub fn set_running(
    sql: &mut dyn Sql,
    host_id: &str,
    info: &CapsuleInfo,
    from: Option<CapsuleState>,
) -> Result<bool, DbError> {
    let facts: serde_json::Map<String, Value> =
        info.metadata.iter().map(|(k, v)| (k.clone(), Value::String(v.clone()))).collect();
    let size = i32::try_from(info.disk_size_mb).unwrap_or(i32::MAX);
    let used = i32::try_from(info.disk_used_mb).unwrap_or(i32::MAX);
    let changed = sql.execute(
        "update capsules set status = 'running', guest_ip = $3, host_ip = $4, disk_size_mb = $5,
             disk_used_mb = $6, metadata = metadata || $7::text::jsonb, failure = null,
             started_at = coalesce(started_at, now()), last_active_at = coalesce(last_active_at, now()),
             last_updated = case when status = 'running' then last_updated else now() end
         where id = $1 and host_id = $2 and ($8::text is null or status = $8)
             and (status in ('pending', 'starting', 'missing', 'pausing', 'paused', 'hibernated', 'resuming',
             'snapshotting') or status = 'running' and not (
             guest_ip = $3 and host_ip = $4 and disk_size_mb = $5 and disk_used_mb = $6
             and metadata @> $7::text::jsonb))",
        &[
            &info.capsule_id,
            &host_id,
            &info.guest_ip,
            &info.host_ip,
            &size,
            &used,
            &Value::Object(facts).to_string(),
            &from.map(CapsuleState::name),
        ],
    )?;
    Ok(changed > 0)
}

/// Notes that a host has a capsule paused, or hibernated where it says so; with `from`, only where that is
/// the state on record. `false` when there is nothing to note: all of it is known, or the capsule is not
/// expected to be there.
///
/// # Errors
/// What the database says.
pub fn set_paused(
    sql: &mut dyn Sql,
    host_id: &str,
    info: &CapsuleInfo,
    from: Option<CapsuleState>,
) -> Result<bool, DbError> {
    let state = match info.state {
        CapsuleState::Hibernated => CapsuleState::Hibernated,
        _ => CapsuleState::Paused,
    };
    let used = i32::try_from(info.disk_used_mb).unwrap_or(i32::MAX);
    let changed = sql.execute(
        "update capsules set status = $4, disk_used_mb = $3, failure = null,
             started_at = coalesce(started_at, now()), last_active_at = coalesce(last_active_at, now()),
             last_updated = case when status = $4 then last_updated else now() end
         where id = $1 and host_id = $2 and ($5::text is null or status = $5)
             and (status in ('pending', 'starting', 'running', 'pausing', 'paused', 'hibernated', 'resuming',
             'missing', 'snapshotting') and status <> $4 or status = $4 and disk_used_mb <> $3)",
        &[&info.capsule_id, &host_id, &used, &state.name(), &from.map(CapsuleState::name)],
    )?;
    Ok(changed > 0)
}

/// The longest reason that is stored, in bytes.
const MAX_FAILURE: usize = 2000;

/// Puts a capsule into another state, when it is in one of the `from` states. `failure` says why for
/// `error` and `missing`. `false` when it was in another state.
///
/// # Errors
/// What the database says.
pub fn change_state(
    sql: &mut dyn Sql,
    id: &str,
    from: &[CapsuleState],
    to: CapsuleState,
    failure: Option<&str>,
) -> Result<bool, DbError> {
    let from: Vec<&str> = from.iter().map(|s| s.name()).collect();
    let failure = failure.map(|text| &text[..text.floor_char_boundary(MAX_FAILURE)]);
    let changed = sql.execute(
        "update capsules set status = $3, failure = coalesce($4, failure), last_updated = now()
         where id = $1 and status = any($2)",
        &[&id, &from, &to.name(), &failure],
    )?;
    Ok(changed > 0)
}

/// Notes that a capsule is in use. To the second: every command would otherwise wait for the disk.
///
/// # Errors
/// What the database says.
pub fn touch(sql: &mut dyn Sql, id: &str) -> Result<(), DbError> {
    sql.execute(
        "update capsules set last_active_at = now()
         where id = $1 and (last_active_at is null or last_active_at < now() - interval '1 second')",
        &[&id],
    )?;
    Ok(())
}

/// The ids of the capsules that a host has or should have.
///
/// # Errors
/// What the database says.
pub fn ids_on_host(sql: &mut dyn Sql, host_id: &str) -> Result<Vec<String>, DbError> {
    sql.rows(
        "select id from capsules where host_id = $1 and status not in ('stopped', 'error', 'missing')
         order by created_at, id",
        &[&host_id],
    )?
    .iter()
    .map(|row| column(row, "id"))
    .collect()
}

/// Whose capsule it is; `None` when it is not on record.
///
/// # Errors
/// What the database says.
pub fn team_of(sql: &mut dyn Sql, id: &str) -> Result<Option<String>, DbError> {
    let row = sql.row("select team_id from capsules where id = $1", &[&id])?;
    row.map(|row| column(&row, "team_id")).transpose()
}

/// Begins the end of all capsules of a team: the reconciler destroys what its hosts have.
///
/// # Errors
/// What the database says.
pub fn stop_all(sql: &mut dyn Sql, team_id: &str) -> Result<u64, DbError> {
    sql.execute(
        "update capsules set last_updated = now(),
             status = case when host_id is null or status in ('error', 'missing') then 'stopped' else 'stopping' end
         where team_id = $1 and status not in ('stopped', 'stopping')",
        &[&team_id],
    )
}

/// What the database knows of the capsules that should be on a host and of those that it says it has.
///
/// # Errors
/// What the database says.
pub fn records(sql: &mut dyn Sql, host_id: &str, reported: &[String]) -> Result<Vec<Record>, DbError> {
    sql.rows(
        "select id, status, host_id, (extract(epoch from now() - last_updated) * 1000)::bigint as age_ms
         from capsules
         where (host_id = $1 and status not in ('stopped', 'error', 'missing')) or id = any($2)",
        &[&host_id, &reported],
    )?
    .iter()
    .map(|row| {
        Ok(Record {
            id: column(row, "id")?,
            state: state(row)?,
            is_here: column::<Option<&str>>(row, "host_id")? == Some(host_id),
            age_ms: u64::try_from(column::<i64>(row, "age_ms")?).unwrap_or(0),
        })
    })
    .collect()
}

/// Base templates that hosts of a team, or of everyone, say they have.
///
/// # Errors
/// What the database says.
pub fn base_templates(sql: &mut dyn Sql, team_id: &str) -> Result<Vec<String>, DbError> {
    sql.rows(
        "select distinct unnest(templates) as template from hosts
         where status <> 'pending' and (team_id is null or team_id = $1) order by template",
        &[&team_id],
    )?
    .iter()
    .map(|row| column(row, "template"))
    .collect()
}
