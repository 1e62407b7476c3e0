//! `orphans`: capsules that hosts tell of and that are on no record.

use super::{DbError, Sql, column};
use std::collections::HashMap;

/// Notes which orphans a host tells of now, and gives how long each was told of, in milliseconds. The others
/// of that host are forgotten.
///
/// # Errors
/// What the database says.
pub fn watch(sql: &mut dyn Sql, host_id: &str, ids: &[String]) -> Result<HashMap<String, u64>, DbError> {
    sql.execute("delete from orphans where host_id = $1 and capsule_id <> all($2)", &[&host_id, &ids])?;
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    sql.execute(
        "insert into orphans (host_id, capsule_id) select $1, unnest($2::text[]) on conflict do nothing",
        &[&host_id, &ids],
    )?;
    sql.rows(
        "select capsule_id, (extract(epoch from now() - since) * 1000)::bigint as age_ms from orphans
         where host_id = $1",
        &[&host_id],
    )?
    .iter()
    .map(|row| {
        let age_ms = u64::try_from(column::<i64>(row, "age_ms")?).unwrap_or(0);
        Ok((column(row, "capsule_id")?, age_ms))
    })
    .collect()
}
