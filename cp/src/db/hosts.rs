//! `hosts` and `host_tags`.

use super::{DbError, Sql, Timestamp, column};
use crate::hosts::scheduler::Candidate;
use postgres::Row;
use serde::Serialize;

/// A host, as the API tells it.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    /// `host-…`
    pub id: String,
    /// `regular` or `byoc`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The team that brought it.
    pub team_id: Option<String>,
    /// Whose machine it is, such as `bare-metal`.
    pub provider: Option<String>,
    /// Where it stands.
    pub availability_zone: Option<String>,
    /// CPU architecture, as `uname -m` has it.
    pub arch: Option<String>,
    /// CPU cores.
    pub cpu_cores: Option<i32>,
    /// Memory in MiB.
    pub memory_mb: Option<i32>,
    /// Disk in GiB.
    pub disk_gb: Option<i32>,
    /// Where its agent listens, `IP:PORT`.
    pub address: Option<String>,
    /// `pending`, `online`, `offline`, `draining`, or `unreachable` when it was silent for 90 s since its
    /// last heartbeat or its registration.
    pub status: String,
    /// When it was last heard of.
    pub last_heartbeat_at: Option<Timestamp>,
    /// Who made the record.
    pub created_by: Option<String>,
    /// Since when.
    pub created_at: Timestamp,
    /// When the record was last changed.
    pub updated_at: Timestamp,
}

/// Whether a host has been heard of within the last 90 s, three heartbeats.
macro_rules! is_fresh {
    ($table:literal) => {
        concat!("coalesce(", $table, ".last_heartbeat_at >= now() - interval '90 seconds', false)")
    };
}
pub(super) use is_fresh;

macro_rules! host_columns {
    () => {
        concat!(
            "h.id, h.type, h.team_id, h.provider, h.availability_zone, h.arch, h.cpu_cores, h.memory_mb,
             h.disk_gb, h.address, h.last_heartbeat_at, h.created_by, h.created_at, h.updated_at,
             case when h.status = 'online'
                 and coalesce(h.last_heartbeat_at, h.updated_at) < now() - interval '90 seconds'
                 then 'unreachable' else h.status end as status"
        )
    };
}

fn host(row: &Row) -> Result<Host, DbError> {
    Ok(Host {
        id: column(row, "id")?,
        kind: column(row, "type")?,
        team_id: column(row, "team_id")?,
        provider: column(row, "provider")?,
        availability_zone: column(row, "availability_zone")?,
        arch: column(row, "arch")?,
        cpu_cores: column(row, "cpu_cores")?,
        memory_mb: column(row, "memory_mb")?,
        disk_gb: column(row, "disk_gb")?,
        address: column(row, "address")?,
        status: column(row, "status")?,
        last_heartbeat_at: column(row, "last_heartbeat_at")?,
        created_by: column(row, "created_by")?,
        created_at: column(row, "created_at")?,
        updated_at: column(row, "updated_at")?,
    })
}

/// A new host.
#[derive(Debug, Clone)]
pub struct NewHost<'a> {
    /// `host-…`
    pub id: &'a str,
    /// The team that brings it; none for a host that serves everyone.
    pub team_id: Option<&'a str>,
    /// Whose machine it is.
    pub provider: Option<&'a str>,
    /// Where it stands.
    pub availability_zone: Option<&'a str>,
    /// Who makes the record.
    pub created_by: &'a str,
}

/// Adds a host that is yet to register.
///
/// # Errors
/// What the database says.
pub fn insert(sql: &mut dyn Sql, new: &NewHost<'_>) -> Result<(), DbError> {
    let kind = if new.team_id.is_some() { "byoc" } else { "regular" };
    sql.execute(
        "insert into hosts (id, type, team_id, provider, availability_zone, created_by)
         values ($1, $2, $3, $4, $5, $6)",
        &[&new.id, &kind, &new.team_id, &new.provider, &new.availability_zone, &new.created_by],
    )?;
    Ok(())
}

/// The host with this id.
///
/// # Errors
/// What the database says.
pub fn find(sql: &mut dyn Sql, id: &str) -> Result<Option<Host>, DbError> {
    sql.row(concat!("select ", host_columns!(), " from hosts h where h.id = $1"), &[&id])?
        .as_ref()
        .map(host)
        .transpose()
}

/// The same, locked until the transaction's end.
///
/// # Errors
/// What the database says.
pub fn find_for_update(sql: &mut dyn Sql, id: &str) -> Result<Option<Host>, DbError> {
    sql.row(concat!("select ", host_columns!(), " from hosts h where h.id = $1 for update"), &[&id])?
        .as_ref()
        .map(host)
        .transpose()
}

/// All hosts, or those that a team brought; the oldest first.
///
/// # Errors
/// What the database says.
pub fn list(sql: &mut dyn Sql, team_id: Option<&str>) -> Result<Vec<Host>, DbError> {
    sql.rows(
        concat!(
            "select ",
            host_columns!(),
            " from hosts h where $1::text is null or h.team_id = $1 order by h.created_at, h.id"
        ),
        &[&team_id],
    )?
    .iter()
    .map(host)
    .collect()
}

/// What a host tells of itself at registration.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// CPU architecture.
    pub arch: Option<&'a str>,
    /// CPU cores.
    pub cpu_cores: Option<i32>,
    /// Memory in MiB.
    pub memory_mb: Option<i32>,
    /// Disk in GiB.
    pub disk_gb: Option<i32>,
    /// Where its agent listens, `IP:PORT`.
    pub address: &'a str,
}

/// Takes a host online with what it tells of itself. Gives the generation of its tokens. Its agent need
/// not listen yet, so it gets no capsule before its first heartbeat.
///
/// # Errors
/// What the database says.
pub fn register(sql: &mut dyn Sql, id: &str, facts: &Facts<'_>) -> Result<i32, DbError> {
    let row = sql.row(
        "update hosts set arch = $2, cpu_cores = $3, memory_mb = $4, disk_gb = $5, address = $6,
             status = 'online', last_heartbeat_at = null, updated_at = now(),
             token_generation = token_generation + 1
         where id = $1 returning token_generation",
        &[&id, &facts.arch, &facts.cpu_cores, &facts.memory_mb, &facts.disk_gb, &facts.address],
    )?;
    generation(row)
}

/// Begins a new generation of a host's tokens: those of the one before the last are void from here on.
///
/// # Errors
/// What the database says.
pub fn next_generation(sql: &mut dyn Sql, id: &str) -> Result<i32, DbError> {
    let row = sql.row(
        "update hosts set token_generation = token_generation + 1 where id = $1 returning token_generation",
        &[&id],
    )?;
    generation(row)
}

fn generation(row: Option<Row>) -> Result<i32, DbError> {
    let row = row.ok_or_else(|| DbError::Bug("a host that was just found is not there".into()))?;
    column(&row, "token_generation")
}

/// Notes a heartbeat. `false` when there is no such host, or the token's generation is too old: the one
/// before the current is still good, for an agent that could not save its newest token.
///
/// # Errors
/// What the database says.
pub fn heartbeat(sql: &mut dyn Sql, id: &str, generation: i32) -> Result<bool, DbError> {
    let changed = sql.execute(
        "update hosts set last_heartbeat_at = now(),
             status = case when status = 'offline' then 'online' else status end
         where id = $1 and status <> 'pending' and token_generation - $2 between 0 and 1",
        &[&id, &generation],
    )?;
    Ok(changed > 0)
}

/// Removes a host's record.
///
/// # Errors
/// What the database says.
pub fn delete(sql: &mut dyn Sql, id: &str) -> Result<(), DbError> {
    sql.execute("delete from hosts where id = $1", &[&id])?;
    Ok(())
}

/// A host's tags in order.
///
/// # Errors
/// What the database says.
pub fn tags(sql: &mut dyn Sql, id: &str) -> Result<Vec<String>, DbError> {
    sql.rows("select tag from host_tags where host_id = $1 order by tag", &[&id])?
        .iter()
        .map(|row| column(row, "tag"))
        .collect()
}

/// Adds a tag, if the host has it not.
///
/// # Errors
/// What the database says.
pub fn add_tag(sql: &mut dyn Sql, id: &str, tag: &str) -> Result<(), DbError> {
    sql.execute("insert into host_tags (host_id, tag) values ($1, $2) on conflict do nothing", &[&id, &tag])?;
    Ok(())
}

/// Removes a tag; `false` when the host has it not.
///
/// # Errors
/// What the database says.
pub fn remove_tag(sql: &mut dyn Sql, id: &str, tag: &str) -> Result<bool, DbError> {
    Ok(sql.execute("delete from host_tags where host_id = $1 and tag = $2", &[&id, &tag])? > 0)
}

macro_rules! candidates {
    ($where:literal) => {
        concat!(
            "select h.id, h.address, h.team_id, h.memory_mb, h.cpu_cores, h.templates,
                 h.memory_left_mb, h.disk_left_mb, ",
            is_fresh!("h"),
            " as is_live,
                 coalesce(sum(c.memory_mb), 0)::bigint as memory_used_mb,
                 coalesce(sum(c.vcpus), 0)::bigint as vcpus_used,
                 count(c.id) as capsules
             from hosts h
             left join capsules c on c.host_id = h.id
                 and c.status not in ('stopped', 'error', 'missing', 'paused', 'hibernated')
             where h.status = 'online' and h.memory_mb is not null and h.cpu_cores is not null and ",
            $where,
            " group by h.id order by h.id"
        )
    };
}

fn candidate(row: &Row) -> Result<Candidate, DbError> {
    let count = |name| Ok::<u64, DbError>(u64::try_from(column::<i64>(row, name)?).unwrap_or(0));
    let number = |name| Ok::<u64, DbError>(u64::try_from(column::<i32>(row, name)?).unwrap_or(0));
    let left = |name| {
        Ok::<Option<u64>, DbError>(column::<Option<i64>>(row, name)?.and_then(|mb| u64::try_from(mb).ok()))
    };
    Ok(Candidate {
        id: column(row, "id")?,
        address: column(row, "address")?,
        is_own: column::<Option<&str>>(row, "team_id")?.is_some(),
        is_live: column(row, "is_live")?,
        memory_mb: number("memory_mb")?,
        cpu_cores: number("cpu_cores")?,
        memory_used_mb: count("memory_used_mb")?,
        vcpus_used: count("vcpus_used")?,
        capsules: count("capsules")?,
        templates: column(row, "templates")?,
        told_left_mb: left("memory_left_mb")?.zip(left("disk_left_mb")?),
    })
}

/// The registered hosts that may run a team's capsules, with what is promised on them.
///
/// # Errors
/// What the database says.
pub fn candidates(sql: &mut dyn Sql, team_id: &str) -> Result<Vec<Candidate>, DbError> {
    sql.rows(candidates!("(h.team_id is null or h.team_id = $1)"), &[&team_id])?
        .iter()
        .map(candidate)
        .collect()
}

/// One host with what is promised on it, locked until the transaction's end: nobody promises more on it
/// meanwhile.
///
/// # Errors
/// What the database says.
pub fn candidate_for_update(sql: &mut dyn Sql, id: &str) -> Result<Option<Candidate>, DbError> {
    if sql.row("select id from hosts where id = $1 for update", &[&id])?.is_none() {
        return Ok(None);
    }
    sql.row(candidates!("h.id = $1"), &[&id])?.as_ref().map(candidate).transpose()
}

/// Takes one live host whose capsules were not compared for `every_sec`, and notes that they now are.
/// Control planes that ask at the same time get different ones.
///
/// # Errors
/// What the database says.
pub fn claim_for_reconciling(sql: &mut dyn Sql, every_sec: f64) -> Result<Option<(String, String)>, DbError> {
    let row = sql.row(
        concat!(
            "update hosts set reconciled_at = now() where id = (
                 select h.id from hosts h
                 where h.status in ('online', 'draining') and ",
            is_fresh!("h"),
            " and (h.reconciled_at is null or h.reconciled_at < now() - make_interval(secs => $1))
                 order by h.reconciled_at nulls first limit 1 for update skip locked
             ) returning id, address"
        ),
        &[&every_sec],
    )?;
    row.map(|row| Ok((column(&row, "id")?, column(&row, "address")?))).transpose()
}

/// Notes which base templates a host has, and how much it has left for a further capsule.
///
/// # Errors
/// What the database says.
pub fn set_report(
    sql: &mut dyn Sql,
    id: &str,
    templates: &[String],
    (memory_left_mb, disk_left_mb): (i64, i64),
) -> Result<(), DbError> {
    sql.execute(
        "update hosts set templates = $2, memory_left_mb = $3, disk_left_mb = $4
         where id = $1 and (templates, memory_left_mb, disk_left_mb) is distinct from ($2, $3, $4)",
        &[&id, &templates, &memory_left_mb, &disk_left_mb],
    )?;
    Ok(())
}
