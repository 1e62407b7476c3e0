//! `snapshots`.

use super::{DbError, Sql, Timestamp, column};
use postgres::Row;
use std::collections::HashSet;
use wire::message::SnapshotInfo;

/// The most snapshots that a list has.
pub const MAX_LIST: i64 = 1000;

/// A snapshot of a team.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its name in its team.
    pub name: String,
    /// What its host calls it.
    pub host_name: String,
    /// Its host.
    pub host_id: String,
    /// Where its host's agent listens.
    pub host_address: Option<String>,
    /// Virtual CPUs of every capsule that is made of it.
    pub vcpus: i32,
    /// Memory of every capsule that is made of it, in MiB.
    pub memory_mb: i32,
    /// Space that it takes on its host, in bytes.
    pub size_bytes: i64,
    /// When it was made.
    pub created_at: Timestamp,
}

macro_rules! select {
    ($rest:literal) => {
        concat!(
            "select s.name, s.host_name, s.host_id, h.address as host_address, s.vcpus, s.memory_mb,
                 s.size_bytes, s.created_at
             from snapshots s join hosts h on h.id = s.host_id where s.team_id = $1 ",
            $rest
        )
    };
}

fn snapshot(row: &Row) -> Result<Snapshot, DbError> {
    Ok(Snapshot {
        name: column(row, "name")?,
        host_name: column(row, "host_name")?,
        host_id: column(row, "host_id")?,
        host_address: column(row, "host_address")?,
        vcpus: column(row, "vcpus")?,
        memory_mb: column(row, "memory_mb")?,
        size_bytes: column(row, "size_bytes")?,
        created_at: column(row, "created_at")?,
    })
}

/// A team's snapshot of this name.
///
/// # Errors
/// What the database says.
pub fn find(sql: &mut dyn Sql, team_id: &str, name: &str) -> Result<Option<Snapshot>, DbError> {
    sql.row(select!("and s.name = $2"), &[&team_id, &name])?.as_ref().map(snapshot).transpose()
}

/// A team's snapshots by their names.
///
/// # Errors
/// What the database says.
pub fn list(sql: &mut dyn Sql, team_id: &str) -> Result<Vec<Snapshot>, DbError> {
    let rows = sql.rows(select!("order by s.name limit $2"), &[&team_id, &MAX_LIST])?;
    rows.iter().map(snapshot).collect()
}

/// Notes a new snapshot, in the place of one of the same name. `false` when there is one and it is not to be
/// replaced.
///
/// # Errors
/// What the database says.
pub fn put(
    sql: &mut dyn Sql,
    (team_id, name): (&str, &str),
    host_id: &str,
    info: &SnapshotInfo,
    created_by: &str,
    overwrite: bool,
) -> Result<bool, DbError> {
    let number = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    let changed = sql.execute(
        "insert into snapshots (team_id, name, host_name, host_id, vcpus, memory_mb, disk_size_mb, size_bytes,
             created_by)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
         on conflict (team_id, name) do update set host_name = excluded.host_name, host_id = excluded.host_id,
             vcpus = excluded.vcpus, memory_mb = excluded.memory_mb, disk_size_mb = excluded.disk_size_mb,
             size_bytes = excluded.size_bytes, created_by = excluded.created_by, created_at = now()
         where $10",
        &[
            &team_id,
            &name,
            &info.name,
            &host_id,
            &number(info.vcpus),
            &number(info.memory_mb),
            &number(info.disk_size_mb),
            &i64::try_from(info.size_bytes).unwrap_or(i64::MAX),
            &created_by,
            &overwrite,
        ],
    )?;
    Ok(changed > 0)
}

/// What a host calls the snapshots that it should have: none of a team that was deleted.
///
/// # Errors
/// What the database says.
pub fn on_host(sql: &mut dyn Sql, host_id: &str) -> Result<HashSet<String>, DbError> {
    sql.rows(
        "select s.host_name from snapshots s join teams t on t.id = s.team_id
         where s.host_id = $1 and t.deleted_at is null",
        &[&host_id],
    )?
    .iter()
    .map(|row| column(row, "host_name"))
    .collect()
}

/// Forgets a snapshot that its host has deleted, and gives whose it was and its name there. `None` when another has
/// taken its name meanwhile, or it is gone.
///
/// # Errors
/// What the database says.
pub fn forget(
    sql: &mut dyn Sql,
    host_id: &str,
    host_name: &str,
) -> Result<Option<(String, String)>, DbError> {
    let row = sql.row(
        "delete from snapshots where host_id = $1 and host_name = $2 returning team_id, name",
        &[&host_id, &host_name],
    )?;
    row.map(|row| Ok((column(&row, "team_id")?, column(&row, "name")?))).transpose()
}
