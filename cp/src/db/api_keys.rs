//! `api_keys`: what programs act for a team with.

use super::{DbError, Sql, Timestamp, column};
use postgres::Row;
use serde::Serialize;

/// A key, as the API tells it.
#[derive(Debug, Clone, Serialize)]
pub struct ApiKey {
    /// `key-…`
    pub id: String,
    /// The team that it acts for.
    pub team_id: String,
    /// 1 to 100 characters.
    pub name: String,
    /// What people recognise it by.
    pub key_prefix: String,
    /// Since when.
    pub created_at: Timestamp,
    /// About when it was last used.
    pub last_used: Option<Timestamp>,
}

/// A new key.
#[derive(Debug, Clone)]
pub struct NewApiKey<'a> {
    /// `key-…`
    pub id: &'a str,
    /// The team that it acts for.
    pub team_id: &'a str,
    /// 1 to 100 characters.
    pub name: &'a str,
    /// SHA-256 of the key.
    pub key_hash: &'a [u8; 32],
    /// What people recognise it by.
    pub key_prefix: &'a str,
    /// The verifier for clients of the wire protocol, in its text form.
    pub wire_verifier: &'a str,
    /// Who made it.
    pub created_by: &'a str,
}

fn api_key(row: &Row) -> Result<ApiKey, DbError> {
    Ok(ApiKey {
        id: column(row, "id")?,
        team_id: column(row, "team_id")?,
        name: column(row, "name")?,
        key_prefix: column(row, "key_prefix")?,
        created_at: column(row, "created_at")?,
        last_used: column(row, "last_used")?,
    })
}

/// Adds a key.
///
/// # Errors
/// What the database says.
pub fn insert(sql: &mut dyn Sql, new: &NewApiKey<'_>) -> Result<ApiKey, DbError> {
    let row = sql.row(
        "insert into api_keys (id, team_id, name, key_hash, key_prefix, wire_verifier, created_by)
         values ($1, $2, $3, $4, $5, $6, $7)
         returning id, team_id, name, key_prefix, created_at, last_used",
        &[
            &new.id,
            &new.team_id,
            &new.name,
            &new.key_hash.as_slice(),
            &new.key_prefix,
            &new.wire_verifier,
            &new.created_by,
        ],
    )?;
    api_key(&row.ok_or_else(|| DbError::Bug("insert without a row".into()))?)
}

/// A team's keys, the oldest first.
///
/// # Errors
/// What the database says.
pub fn of_team(sql: &mut dyn Sql, team_id: &str) -> Result<Vec<ApiKey>, DbError> {
    sql.rows(
        "select id, team_id, name, key_prefix, created_at, last_used from api_keys
         where team_id = $1 order by created_at, id",
        &[&team_id],
    )?
    .iter()
    .map(api_key)
    .collect()
}

/// How many keys a team has.
///
/// # Errors
/// What the database says.
pub fn count(sql: &mut dyn Sql, team_id: &str) -> Result<i64, DbError> {
    let row = sql.row("select count(*) as keys from api_keys where team_id = $1", &[&team_id])?;
    row.map_or(Ok(0), |row| column(&row, "keys"))
}

/// Revokes a team's key and gives its name; `None` when the team has no such key.
///
/// # Errors
/// What the database says.
pub fn delete(sql: &mut dyn Sql, team_id: &str, id: &str) -> Result<Option<String>, DbError> {
    let row =
        sql.row("delete from api_keys where id = $1 and team_id = $2 returning name", &[&id, &team_id])?;
    row.map(|row| column(&row, "name")).transpose()
}

/// Revokes the keys that somebody made for a team, and gives their ids and names.
///
/// # Errors
/// What the database says.
pub fn delete_made_by(
    sql: &mut dyn Sql,
    team_id: &str,
    user_id: &str,
) -> Result<Vec<(String, String)>, DbError> {
    sql.rows(
        "delete from api_keys where team_id = $1 and created_by = $2 returning id, name",
        &[&team_id, &user_id],
    )?
    .iter()
    .map(|row| Ok((column(row, "id")?, column(row, "name")?)))
    .collect()
}

/// Whose key it is, and whether its use should be noted.
#[derive(Debug, Clone)]
pub struct KeyHolder {
    /// `key-…`
    pub id: String,
    /// The key's name.
    pub name: String,
    /// The team that it acts for.
    pub team_id: String,
    /// Whether the noted last use is more than a minute old.
    pub is_use_stale: bool,
}

macro_rules! key_holder {
    ($where:literal) => {
        concat!(
            "select k.id, k.name, k.team_id,
                 (k.last_used is null or k.last_used < now() - interval '1 minute') as is_use_stale
             from api_keys k join teams t on t.id = k.team_id
             where t.deleted_at is null and ",
            $where
        )
    };
}

fn key_holder(row: &Row) -> Result<KeyHolder, DbError> {
    Ok(KeyHolder {
        id: column(row, "id")?,
        name: column(row, "name")?,
        team_id: column(row, "team_id")?,
        is_use_stale: column(row, "is_use_stale")?,
    })
}

/// The key with this hash, of a team that was not deleted.
///
/// # Errors
/// What the database says.
pub fn find_by_hash(sql: &mut dyn Sql, hash: &[u8; 32]) -> Result<Option<KeyHolder>, DbError> {
    sql.row(key_holder!("k.key_hash = $1"), &[&hash.as_slice()])?.as_ref().map(key_holder).transpose()
}

/// The key with this id, of a team that was not deleted.
///
/// # Errors
/// What the database says.
pub fn find(sql: &mut dyn Sql, id: &str) -> Result<Option<KeyHolder>, DbError> {
    sql.row(key_holder!("k.id = $1"), &[&id])?.as_ref().map(key_holder).transpose()
}

/// What a client of the wire protocol is to prove that it holds.
#[derive(Debug, Clone)]
pub struct WireLogin {
    /// `key-…`
    pub key_id: String,
    /// The team that it acts for.
    pub team_id: String,
    /// The verifier in its text form.
    pub verifier: String,
}

/// The key that an identity names: by its id, or by its visible prefix where that is one key's alone.
///
/// # Errors
/// What the database says.
pub fn wire_login(sql: &mut dyn Sql, identity: &str) -> Result<Option<WireLogin>, DbError> {
    let rows = sql.rows(
        "select k.id, k.team_id, k.wire_verifier from api_keys k join teams t on t.id = k.team_id
         where t.deleted_at is null and (k.id = $1 or k.key_prefix = $1) limit 2",
        &[&identity],
    )?;
    match rows.as_slice() {
        [row] => Ok(Some(WireLogin {
            key_id: column(row, "id")?,
            team_id: column(row, "team_id")?,
            verifier: column(row, "wire_verifier")?,
        })),
        _ => Ok(None),
    }
}

/// Notes that a key was used. To the minute: every request would otherwise wait for the disk.
///
/// # Errors
/// What the database says.
pub fn note_use(sql: &mut dyn Sql, id: &str) -> Result<(), DbError> {
    sql.execute(
        "update api_keys set last_used = now()
         where id = $1 and (last_used is null or last_used < now() - interval '1 minute')",
        &[&id],
    )?;
    Ok(())
}
