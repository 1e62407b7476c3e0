//! The record of who did what. It is written in the transaction of the change that it tells of, so that
//! neither is there without the other.

use crate::auth::id::Kind;
use crate::db::audit_log::{self, NewEntry};
use crate::db::{DbError, Sql};
use serde_json::{Value, json};

/// Who did it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Actor {
    /// A person.
    User {
        /// `usr-…`
        id: String,
        /// Their address.
        email: String,
    },
    /// A program with an API key.
    ApiKey {
        /// `key-…`
        id: String,
        /// The key's name.
        name: String,
    },
    /// A host's agent.
    Host {
        /// `host-…`
        id: String,
    },
    /// The control plane itself, or who started it.
    System,
}

impl Actor {
    /// Their id; `system` for the system.
    pub fn id(&self) -> &str {
        match self {
            Actor::User { id, .. } | Actor::ApiKey { id, .. } | Actor::Host { id } => id,
            Actor::System => "system",
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Actor::User { .. } => "user",
            Actor::ApiKey { .. } => "api_key",
            Actor::Host { .. } => "host",
            Actor::System => "system",
        }
    }

    fn name(&self) -> &str {
        match self {
            Actor::User { email, .. } => email,
            Actor::ApiKey { name, .. } => name,
            Actor::Host { .. } | Actor::System => "",
        }
    }
}

/// What was done to what, and how it ended.
#[derive(Debug, Clone)]
pub struct Event<'a> {
    /// The team that it concerns, if any.
    pub team_id: Option<&'a str>,
    /// What was done, such as `capsule.create`; its first part is what it was done to.
    pub action: &'a str,
    /// The id of what it was done to.
    pub resource_id: &'a str,
    /// Further facts, a JSON object.
    pub metadata: Value,
    /// Why it was not done; `None` when it was.
    pub failure: Option<&'a str>,
}

impl<'a> Event<'a> {
    /// A success without further facts.
    pub fn new(team_id: Option<&'a str>, action: &'a str, resource_id: &'a str) -> Event<'a> {
        Event { team_id, action, resource_id, metadata: json!({}), failure: None }
    }

    /// With further facts, a JSON object.
    pub fn with(mut self, metadata: Value) -> Event<'a> {
        self.metadata = metadata;
        self
    }

    /// As a failure.
    pub fn failed(mut self, why: &'a str) -> Event<'a> {
        self.failure = Some(why);
        self
    }
}

/// Writes an event down.
///
/// # Errors
/// What the database says.
pub fn write(sql: &mut dyn Sql, actor: &Actor, event: &Event<'_>) -> Result<(), DbError> {
    let resource_type = event.action.split('.').next().unwrap_or_default();
    audit_log::insert(
        sql,
        &NewEntry {
            id: &Kind::AuditEntry.new_id(),
            team_id: event.team_id,
            actor_type: actor.kind(),
            actor_id: actor.id(),
            actor_name: actor.name(),
            action: event.action,
            is_success: event.failure.is_none(),
            resource_type,
            resource_id: event.resource_id,
            metadata: &event.metadata,
            failure: event.failure,
        },
    )
}
