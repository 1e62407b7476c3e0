//! `capsules`: what each may reach of the internet.

use super::{DbError, Sql, column, json_column};
use crate::network::Network;
use postgres::Row;

/// A capsule's network as it is on record.
#[derive(Debug, Clone)]
pub struct Stored {
    /// What it may reach.
    pub network: Network,
    /// How many changes of it were begun.
    pub revision: u64,
}

/// Notes what a capsule that is being made may reach.
///
/// # Errors
/// What the database says.
pub fn insert(sql: &mut dyn Sql, capsule_id: &str, network: &Network) -> Result<(), DbError> {
    let text = text(network)?;
    sql.execute("update capsules set network = $2::text::jsonb where id = $1", &[&capsule_id, &text])?;
    Ok(())
}

/// What a capsule may reach.
///
/// # Errors
/// What the database says.
pub fn get(sql: &mut dyn Sql, capsule_id: &str) -> Result<Network, DbError> {
    let row = sql.row("select network::text as network from capsules where id = $1", &[&capsule_id])?;
    row.map_or_else(|| Ok(Network::default()), |row| network(json_column(&row, "network")?))
}

/// Begins a change: what holds, and the change's own number. `None` while another is under way, for
/// `abandoned_sec` seconds at most: whoever began that one may be gone.
///
/// # Errors
/// What the database says.
pub fn begin(sql: &mut dyn Sql, capsule_id: &str, abandoned_sec: f64) -> Result<Option<Stored>, DbError> {
    let row = sql.row(
        "update capsules set network_revision = network_revision + 1, network_changing_since = now()
         where id = $1 and (network_changing_since is null
             or network_changing_since < now() - make_interval(secs => $2))
         returning network::text as network, network_revision",
        &[&capsule_id, &abandoned_sec],
    )?;
    row.as_ref().map(stored).transpose()
}

/// Begins a change of each running capsule on a host, of at most `limit`, of which it is not known that the last
/// change that was begun was made or not: its answer was lost, or whoever waited for it. What each has on
/// record. Not of those of which a change is under way, as [`begin`] has it.
///
/// # Errors
/// What the database says.
pub fn begin_doubtful(
    sql: &mut dyn Sql,
    host_id: &str,
    abandoned_sec: f64,
    limit: i64,
) -> Result<Vec<(String, Stored)>, DbError> {
    sql.rows(
        "update capsules set network_revision = network_revision + 1, network_changing_since = now()
         where id in (
             select id from capsules
             where host_id = $1 and status = 'running' and network_revision > network_applied
                 and (network_changing_since is null
                     or network_changing_since < now() - make_interval(secs => $2))
             order by id limit $3 for update skip locked
         ) returning id, network::text as network, network_revision",
        &[&host_id, &abandoned_sec, &limit],
    )?
    .iter()
    .map(|row| Ok((column(row, "id")?, stored(row)?)))
    .collect()
}

/// Lets others begin a change again, unless a later one than this has begun.
///
/// # Errors
/// What the database says.
pub fn end(sql: &mut dyn Sql, capsule_id: &str, revision: u64) -> Result<(), DbError> {
    let revision = i64::try_from(revision).unwrap_or(i64::MAX);
    sql.execute(
        "update capsules set network_changing_since = null where id = $1 and network_revision = $2",
        &[&capsule_id, &revision],
    )?;
    Ok(())
}

/// Notes a change that its host has made; `false` when a later one was noted already.
///
/// # Errors
/// What the database says.
pub fn finish(
    sql: &mut dyn Sql,
    capsule_id: &str,
    network: &Network,
    revision: u64,
) -> Result<bool, DbError> {
    let text = text(network)?;
    let revision = i64::try_from(revision).unwrap_or(i64::MAX);
    let changed = sql.execute(
        "update capsules set network = $2::text::jsonb, network_applied = $3
         where id = $1 and network_applied < $3",
        &[&capsule_id, &text, &revision],
    )?;
    Ok(changed > 0)
}

fn stored(row: &Row) -> Result<Stored, DbError> {
    let revision: i64 = column(row, "network_revision")?;
    Ok(Stored {
        network: network(json_column(row, "network")?)?,
        revision: u64::try_from(revision).unwrap_or(0),
    })
}

fn text(network: &Network) -> Result<String, DbError> {
    serde_json::to_string(network).map_err(|e| DbError::Bug(format!("a network as JSON: {e}")))
}

fn network(value: serde_json::Value) -> Result<Network, DbError> {
    serde_json::from_value(value).map_err(|e| DbError::Bug(format!("the network on record: {e}")))
}
