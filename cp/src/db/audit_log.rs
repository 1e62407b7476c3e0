//! `audit_log`: who did what.

use super::{DbError, Sql};

/// One entry to write.
#[derive(Debug, Clone)]
pub struct NewEntry<'a> {
    /// `log-…`
    pub id: &'a str,
    /// The team that it concerns, if any.
    pub team_id: Option<&'a str>,
    /// `user`, `api_key`, `host` or `system`.
    pub actor_type: &'a str,
    /// Their id; `system` for the system.
    pub actor_id: &'a str,
    /// What they are called.
    pub actor_name: &'a str,
    /// What was done, such as `capsule.create`.
    pub action: &'a str,
    /// Whether it was done.
    pub is_success: bool,
    /// What it was done to: `capsule`, `host`, …
    pub resource_type: &'a str,
    /// Its id.
    pub resource_id: &'a str,
    /// Further facts, a JSON object.
    pub metadata: &'a serde_json::Value,
    /// Why it was not done.
    pub failure: Option<&'a str>,
}

/// Writes an entry.
///
/// # Errors
/// What the database says.
pub fn insert(sql: &mut dyn Sql, entry: &NewEntry<'_>) -> Result<(), DbError> {
    let outcome = if entry.is_success { "success" } else { "failure" };
    sql.execute(
        "insert into audit_log (id, team_id, actor_type, actor_id, actor_name, action, outcome,
             resource_type, resource_id, metadata, failure)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::jsonb, $11)",
        &[
            &entry.id,
            &entry.team_id,
            &entry.actor_type,
            &entry.actor_id,
            &entry.actor_name,
            &entry.action,
            &outcome,
            &entry.resource_type,
            &entry.resource_id,
            &entry.metadata.to_string(),
            &entry.failure,
        ],
    )?;
    Ok(())
}
