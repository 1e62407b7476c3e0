//! Why work with the database ended early, and how the API tells it.

use crate::http::handler::Response;
use postgres::error::{DbError as ServerError, SqlState};
use std::error::Error as _;
use std::fmt;

/// Why the database did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DbError {
    /// `DATABASE_URL` is malformed.
    BadUrl(String),
    /// There is no connection, or it was lost.
    Unreachable(String),
    /// The server is there but cannot do it now: it starts, stops, is full, or something took too long.
    Overloaded(String),
    /// Two transactions were in each other's way and this one was undone.
    Conflict(String),
    /// There is such a row already; the name of the constraint.
    Duplicate(String),
    /// A row that this one names is not there; the name of the constraint.
    MissingReference(String),
    /// A value is not allowed; the name of the constraint.
    NotAllowed(String),
    /// A fault in the program, or a database that is not as its migrations left it.
    Bug(String),
}

impl fmt::Display for DbError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DbError::BadUrl(why) => write!(
                f,
                "DATABASE_URL is malformed: {why}; it looks like postgresql://user:password@host:5432/name"
            ),
            DbError::Unreachable(why) => write!(f, "the database cannot be reached: {why}"),
            DbError::Overloaded(why) => write!(f, "the database cannot do this now: {why}"),
            DbError::Conflict(why) => write!(f, "another change was in the way: {why}"),
            DbError::Duplicate(constraint) => write!(f, "the row is there already ({constraint})"),
            DbError::MissingReference(constraint) => {
                write!(f, "a row that is named is not there ({constraint})")
            }
            DbError::NotAllowed(constraint) => write!(f, "a value is not allowed ({constraint})"),
            DbError::Bug(what) => write!(f, "unexpected answer of the database: {what}"),
        }
    }
}

impl std::error::Error for DbError {}

impl DbError {
    /// The error of an attempt to connect.
    pub(super) fn connecting(error: &postgres::Error) -> DbError {
        match error.as_db_error() {
            Some(server) if *server.code() == SqlState::TOO_MANY_CONNECTIONS => {
                DbError::Overloaded(server.message().to_string())
            }
            Some(server) => DbError::Unreachable(server.message().to_string()),
            None => DbError::Unreachable(with_cause(error)),
        }
    }

    /// Whether the connection is of no use any more.
    pub fn is_connection_lost(&self) -> bool {
        matches!(self, DbError::Unreachable(_))
    }

    /// Whether the same transaction may succeed when it is run again.
    pub fn may_retry(&self) -> bool {
        matches!(self, DbError::Unreachable(_) | DbError::Conflict(_))
    }

    /// Whether this is a violation of the unique constraint of that name.
    pub fn is_duplicate_of(&self, constraint: &str) -> bool {
        matches!(self, DbError::Duplicate(name) if name == constraint)
    }
}

fn with_cause(error: &postgres::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

fn of_server(error: &ServerError) -> DbError {
    let code = error.code();
    let constraint = || error.constraint().unwrap_or("unnamed").to_string();
    let message = || error.message().to_string();
    if *code == SqlState::UNIQUE_VIOLATION {
        return DbError::Duplicate(constraint());
    }
    if *code == SqlState::FOREIGN_KEY_VIOLATION {
        return DbError::MissingReference(constraint());
    }
    if *code == SqlState::CHECK_VIOLATION || *code == SqlState::NOT_NULL_VIOLATION {
        return DbError::NotAllowed(constraint());
    }
    if *code == SqlState::T_R_SERIALIZATION_FAILURE || *code == SqlState::T_R_DEADLOCK_DETECTED {
        return DbError::Conflict(message());
    }
    // The server ends the connection along with the first four. The other two say that a statement which
    // this connection prepared is of no use any more, since a newer program has migrated the database, or
    // a pooler has changed the server: a fresh connection prepares it anew.
    let lost = [
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::CANNOT_CONNECT_NOW,
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
        SqlState::FEATURE_NOT_SUPPORTED,
        SqlState::INVALID_SQL_STATEMENT_NAME,
    ];
    if lost.contains(code) || code.code().starts_with("08") {
        return DbError::Unreachable(message());
    }
    // Class 53 is insufficient resources; the others are the time limits on statements and locks, and
    // a server that is a read-only replica since a failover.
    let busy = [SqlState::QUERY_CANCELED, SqlState::LOCK_NOT_AVAILABLE, SqlState::READ_ONLY_SQL_TRANSACTION];
    if busy.contains(code) || code.code().starts_with("53") {
        return DbError::Overloaded(message());
    }
    DbError::Bug(format!("{} (SQLSTATE {})", error.message(), code.code()))
}

impl From<postgres::Error> for DbError {
    fn from(error: postgres::Error) -> DbError {
        match error.as_db_error() {
            Some(server) => of_server(server),
            None if error.is_closed() => DbError::Unreachable("the connection was closed".to_string()),
            // Input and output errors have an io::Error behind them; all else is a wrong type or count
            // of parameters or columns.
            None if error.source().is_some_and(|s| s.is::<std::io::Error>()) => {
                DbError::Unreachable(with_cause(&error))
            }
            None => DbError::Bug(with_cause(&error)),
        }
    }
}

/// Why work with the database ended early: the database, or a decision that is the request's answer.
#[derive(Debug)]
pub enum Stop {
    /// The database did not do it.
    Database(DbError),
    /// The answer to the request. In a transaction nothing is done then.
    Answer(Response),
}

impl From<DbError> for Stop {
    fn from(error: DbError) -> Stop {
        Stop::Database(error)
    }
}

impl From<Response> for Stop {
    fn from(response: Response) -> Stop {
        Stop::Answer(response)
    }
}

impl From<DbError> for Response {
    fn from(error: DbError) -> Response {
        match error {
            DbError::BadUrl(_) | DbError::Unreachable(_) | DbError::Overloaded(_) | DbError::Conflict(_) => {
                log::warn!("{error}");
                Response::error(
                    503,
                    "database_unavailable",
                    "the database is not available at the moment; try again in a few seconds",
                )
            }
            DbError::Duplicate(_) => {
                log::warn!("{error}");
                Response::error(409, "conflict", "it exists already")
            }
            DbError::MissingReference(_) | DbError::NotAllowed(_) | DbError::Bug(_) => {
                log::error!("{error}");
                Response::error(500, "internal_error", "a fault in the control plane; its log says more")
            }
        }
    }
}

impl From<Stop> for Response {
    fn from(stop: Stop) -> Response {
        match stop {
            Stop::Database(error) => error.into(),
            Stop::Answer(response) => response,
        }
    }
}
