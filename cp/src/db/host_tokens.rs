//! `host_registration_tokens` and `host_refresh_tokens`: of each a host has at most one.

use super::{DbError, Sql, column};

/// Stores the hash of a registration token in place of the one before. It is good for one hour.
///
/// # Errors
/// What the database says.
pub fn set_registration(
    sql: &mut dyn Sql,
    id: &str,
    host_id: &str,
    hash: &[u8; 32],
    created_by: &str,
) -> Result<(), DbError> {
    sql.execute(
        "insert into host_registration_tokens (id, host_id, token_hash, created_by, expires_at)
         values ($1, $2, $3, $4, now() + interval '1 hour')
         on conflict (host_id) do update set id = excluded.id, token_hash = excluded.token_hash,
             created_by = excluded.created_by, created_at = now(), expires_at = excluded.expires_at",
        &[&id, &host_id, &hash.as_slice(), &created_by],
    )?;
    Ok(())
}

/// Uses a registration token up and gives its host; `None` when there is none, or its hour is over.
///
/// # Errors
/// What the database says.
pub fn take_registration(sql: &mut dyn Sql, hash: &[u8; 32]) -> Result<Option<String>, DbError> {
    let row = sql.row(
        "delete from host_registration_tokens where token_hash = $1
         returning host_id, expires_at > now() as is_good",
        &[&hash.as_slice()],
    )?;
    good_host(row)
}

/// Stores the hash of a refresh token in place of the one before. It is good for 60 days.
///
/// # Errors
/// What the database says.
pub fn set_refresh(sql: &mut dyn Sql, id: &str, host_id: &str, hash: &[u8; 32]) -> Result<(), DbError> {
    sql.execute(
        "insert into host_refresh_tokens (id, host_id, token_hash, expires_at)
         values ($1, $2, $3, now() + interval '60 days')
         on conflict (host_id) do update set id = excluded.id, token_hash = excluded.token_hash,
             created_at = now(), expires_at = excluded.expires_at",
        &[&id, &host_id, &hash.as_slice()],
    )?;
    Ok(())
}

/// Uses a refresh token up and gives its host; `None` when there is none, or its 60 days are over.
///
/// # Errors
/// What the database says.
pub fn take_refresh(sql: &mut dyn Sql, hash: &[u8; 32]) -> Result<Option<String>, DbError> {
    let row = sql.row(
        "delete from host_refresh_tokens where token_hash = $1
         returning host_id, expires_at > now() as is_good",
        &[&hash.as_slice()],
    )?;
    good_host(row)
}

fn good_host(row: Option<postgres::Row>) -> Result<Option<String>, DbError> {
    match row {
        Some(row) if column(&row, "is_good")? => column(&row, "host_id").map(Some),
        _ => Ok(None),
    }
}
