//! `orphans` and `snapshot_orphans`: what hosts tell of and what is on no record.

use super::{DbError, Sql, column};
use std::collections::HashMap;

/// What to do with one of the tables: forget all but these, note these, give their ages.
struct Statements {
    forget: &'static str,
    note: &'static str,
    ages: &'static str,
}

macro_rules! statements {
    ($table:literal, $name:literal) => {
        Statements {
            forget: concat!("delete from ", $table, " where host_id = $1 and ", $name, " <> all($2)"),
            note: concat!(
                "insert into ",
                $table,
                " (host_id, ",
                $name,
                ") select $1, unnest($2::text[])
                 on conflict do nothing"
            ),
            ages: concat!(
                "select ",
                $name,
                " as name, (extract(epoch from now() - since) * 1000)::bigint as age_ms
                 from ",
                $table,
                " where host_id = $1"
            ),
        }
    };
}

const CAPSULES: Statements = statements!("orphans", "capsule_id");
const SNAPSHOTS: Statements = statements!("snapshot_orphans", "host_name");

/// Notes which capsules that are on no record a host tells of now, and gives how long each was told of, in
/// milliseconds. The others of that host are forgotten.
///
/// # Errors
/// What the database says.
pub fn watch(sql: &mut dyn Sql, host_id: &str, ids: &[String]) -> Result<HashMap<String, u64>, DbError> {
    watch_in(sql, &CAPSULES, host_id, ids)
}

/// The same of snapshots, by their names on the host.
///
/// # Errors
/// What the database says.
pub fn watch_snapshots(
    sql: &mut dyn Sql,
    host_id: &str,
    host_names: &[String],
) -> Result<HashMap<String, u64>, DbError> {
    watch_in(sql, &SNAPSHOTS, host_id, host_names)
}

fn watch_in(
    sql: &mut dyn Sql,
    table: &Statements,
    host_id: &str,
    names: &[String],
) -> Result<HashMap<String, u64>, DbError> {
    sql.execute(table.forget, &[&host_id, &names])?;
    if names.is_empty() {
        return Ok(HashMap::new());
    }
    sql.execute(table.note, &[&host_id, &names])?;
    sql.rows(table.ages, &[&host_id])?
        .iter()
        .map(|row| {
            let age_ms = u64::try_from(column::<i64>(row, "age_ms")?).unwrap_or(0);
            Ok((column(row, "name")?, age_ms))
        })
        .collect()
}
