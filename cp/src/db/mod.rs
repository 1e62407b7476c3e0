//! PostgreSQL: one connection a worker thread, and one file a table.
//!
//! Work with the database is a closure that gets [`Sql`]: [`Database::read`] runs it without a
//! transaction, [`Database::transaction`] within one. Both may run it again, on a fresh connection or
//! after a conflict with another transaction; so it changes nothing but the database.

pub mod api_keys;
pub mod audit_log;
pub mod capsules;
pub mod error;
pub mod host_tokens;
pub mod hosts;
pub mod migrate;
pub mod networks;
pub mod orphans;
pub mod snapshots;
pub mod teams;
pub mod timestamp;
pub mod users;

pub use error::{DbError, Stop};
pub use timestamp::Timestamp;

use crate::auth::random;
use postgres::types::ToSql;
use postgres::{Client, Config, NoTls, Row, Statement};
use std::collections::HashMap;
use std::str::FromStr;
use std::time::Duration;

/// How long connecting may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a broken network may keep what was sent unacknowledged.
pub const NETWORK_TIMEOUT: Duration = Duration::from_secs(10);
/// How many unanswered probes, [`CONNECT_TIMEOUT`] apart, end a connection on which an answer is awaited.
pub const KEEPALIVE_RETRIES: u32 = 3;
/// How long one statement may run, in milliseconds.
pub const STATEMENT_TIMEOUT_MS: u32 = 10_000;
/// How long a statement may wait for a lock, in milliseconds.
pub const LOCK_TIMEOUT_MS: u32 = 5_000;
/// How long a transaction may do nothing, in milliseconds; its locks would stop the others.
pub const IDLE_TRANSACTION_TIMEOUT_MS: u32 = 10_000;
/// How often work is run, all in all, when it meets lost connections or conflicts.
pub const MAX_ATTEMPTS: u32 = 3;
/// How long a transaction that met a conflict waits for the other one, times the number of the attempt.
pub const CONFLICT_PAUSE: Duration = Duration::from_millis(10);

/// What a statement's `$1`, `$2`, … stand for.
pub type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

/// Statements, in a transaction or not. They are prepared once a connection: hence the `'static`.
pub trait Sql {
    /// All rows.
    ///
    /// # Errors
    /// What the database says.
    fn rows(&mut self, statement: &'static str, parameters: Parameters<'_>) -> Result<Vec<Row>, DbError>;

    /// The first row.
    ///
    /// # Errors
    /// What the database says.
    fn row(&mut self, statement: &'static str, parameters: Parameters<'_>) -> Result<Option<Row>, DbError> {
        Ok(self.rows(statement, parameters)?.into_iter().next())
    }

    /// How many rows were changed.
    ///
    /// # Errors
    /// What the database says.
    fn execute(&mut self, statement: &'static str, parameters: Parameters<'_>) -> Result<u64, DbError>;
}

type Statements = HashMap<&'static str, Statement>;

/// Gives the prepared statement, by preparing it when the connection has not yet.
macro_rules! prepared {
    ($statements:expr, $client:expr, $text:expr) => {
        match $statements.get($text) {
            Some(statement) => statement.clone(),
            None => {
                let statement = $client.prepare($text)?;
                $statements.insert($text, statement.clone());
                statement
            }
        }
    };
}

struct Plain<'a> {
    client: &'a mut Client,
    statements: &'a mut Statements,
}

impl Sql for Plain<'_> {
    fn rows(&mut self, statement: &'static str, parameters: Parameters<'_>) -> Result<Vec<Row>, DbError> {
        let statement = prepared!(self.statements, self.client, statement);
        Ok(self.client.query(&statement, parameters)?)
    }

    fn execute(&mut self, statement: &'static str, parameters: Parameters<'_>) -> Result<u64, DbError> {
        let statement = prepared!(self.statements, self.client, statement);
        Ok(self.client.execute(&statement, parameters)?)
    }
}

struct InTransaction<'a, 'b> {
    transaction: &'a mut postgres::Transaction<'b>,
    statements: &'a mut Statements,
}

impl Sql for InTransaction<'_, '_> {
    fn rows(&mut self, statement: &'static str, parameters: Parameters<'_>) -> Result<Vec<Row>, DbError> {
        let statement = prepared!(self.statements, self.transaction, statement);
        Ok(self.transaction.query(&statement, parameters)?)
    }

    fn execute(&mut self, statement: &'static str, parameters: Parameters<'_>) -> Result<u64, DbError> {
        let statement = prepared!(self.statements, self.transaction, statement);
        Ok(self.transaction.execute(&statement, parameters)?)
    }
}

struct Connection {
    client: Client,
    statements: Statements,
}

/// A connection to the database that comes back after it was lost.
pub struct Database {
    config: Config,
    connection: Option<Connection>,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").field("is_closed", &self.is_closed()).finish_non_exhaustive()
    }
}

/// Reads `DATABASE_URL` and adds the bounds on waiting to it.
fn configuration(url: &str) -> Result<Config, DbError> {
    let mut config = Config::from_str(url).map_err(|error| DbError::BadUrl(error.to_string()))?;
    let bounds = format!(
        "-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={LOCK_TIMEOUT_MS} \
         -c idle_in_transaction_session_timeout={IDLE_TRANSACTION_TIMEOUT_MS} -c timezone=UTC"
    );
    let options = match config.get_options() {
        Some(own) => format!("{bounds} {own}"),
        None => bounds,
    };
    config.options(&options);
    config.connect_timeout(CONNECT_TIMEOUT);
    config.tcp_user_timeout(NETWORK_TIMEOUT);
    config.keepalives(true).keepalives_idle(NETWORK_TIMEOUT);
    config.keepalives_interval(CONNECT_TIMEOUT).keepalives_retries(KEEPALIVE_RETRIES);
    if config.get_application_name().is_none() {
        config.application_name("wrenn-cp");
    }
    Ok(config)
}

impl Database {
    /// Connects.
    ///
    /// # Errors
    /// When the URL is malformed or the database cannot be reached.
    pub fn connect(url: &str) -> Result<Database, DbError> {
        let mut database = Database { config: configuration(url)?, connection: None };
        database.connection()?;
        Ok(database)
    }

    /// Whether the connection is known to be lost. The next work connects anew.
    pub fn is_closed(&self) -> bool {
        self.connection.as_ref().is_none_or(|c| c.client.is_closed())
    }

    fn connection(&mut self) -> Result<&mut Connection, DbError> {
        if self.is_closed() {
            self.connection = None;
        }
        match &mut self.connection {
            Some(connection) => Ok(connection),
            empty => {
                let client = self.config.connect(NoTls).map_err(|e| DbError::connecting(&e))?;
                Ok(empty.insert(Connection { client, statements: Statements::new() }))
            }
        }
    }

    /// The bare client, for what is no prepared statement.
    pub(super) fn client(&mut self) -> Result<&mut Client, DbError> {
        Ok(&mut self.connection()?.client)
    }

    /// Runs work that changes nothing, each statement by itself.
    ///
    /// # Errors
    /// What the work ended with; a lost connection only after an attempt on a fresh one.
    pub fn read<T>(&mut self, mut work: impl FnMut(&mut dyn Sql) -> Result<T, Stop>) -> Result<T, Stop> {
        let mut attempt = 1;
        loop {
            let connection = self.connection()?;
            let result =
                work(&mut Plain { client: &mut connection.client, statements: &mut connection.statements });
            match result {
                Err(Stop::Database(error)) if error.is_connection_lost() => {
                    self.connection = None;
                    if attempt >= MAX_ATTEMPTS {
                        return Err(error.into());
                    }
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    /// Runs work in a transaction: all of it is done, or nothing when it ends with an error.
    ///
    /// # Errors
    /// What the work ended with. Conflicts with other transactions and connections that were lost
    /// before the commit are tried again; when one is lost during the commit, nobody knows.
    pub fn transaction<T>(
        &mut self,
        mut work: impl FnMut(&mut dyn Sql) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let mut attempt = 1;
        loop {
            match self.attempt(&mut work) {
                Err((Stop::Database(error), true)) if attempt < MAX_ATTEMPTS && error.may_retry() => {
                    log::debug!("transaction tried again: {error}");
                    // Two that were in each other's way must not start over in step.
                    if !error.is_connection_lost() {
                        let [jitter] = random::bytes::<1>();
                        std::thread::sleep(
                            CONFLICT_PAUSE * attempt + Duration::from_micros(100) * u32::from(jitter),
                        );
                    }
                    attempt += 1;
                }
                Err((error, _)) => return Err(error),
                Ok(value) => return Ok(value),
            }
        }
    }

    /// One attempt; an error comes with whether it is certain that nothing was done.
    fn attempt<T>(
        &mut self,
        work: &mut impl FnMut(&mut dyn Sql) -> Result<T, Stop>,
    ) -> Result<T, (Stop, bool)> {
        let connection = self.connection().map_err(|e| (e.into(), true))?;
        let result = run_transaction(connection, work);
        if let Err((Stop::Database(error), _)) = &result
            && error.is_connection_lost()
        {
            self.connection = None;
        }
        result
    }
}

fn run_transaction<T>(
    connection: &mut Connection,
    work: &mut impl FnMut(&mut dyn Sql) -> Result<T, Stop>,
) -> Result<T, (Stop, bool)> {
    let undone = |error: postgres::Error| (Stop::Database(error.into()), true);
    let mut transaction = connection.client.transaction().map_err(undone)?;
    let value =
        work(&mut InTransaction { transaction: &mut transaction, statements: &mut connection.statements })
            .map_err(|stop| (stop, true))?;
    transaction.commit().map_err(|error| {
        let error = DbError::from(error);
        let is_undone = !error.is_connection_lost();
        (error.into(), is_undone)
    })?;
    Ok(value)
}

/// A column by its name.
pub(crate) fn column<'a, T: postgres::types::FromSql<'a>>(row: &'a Row, name: &str) -> Result<T, DbError> {
    row.try_get(name).map_err(|error| DbError::Bug(format!("column {name}: {error}")))
}

/// JSON that was read as text.
pub(crate) fn json_column(row: &Row, name: &str) -> Result<serde_json::Value, DbError> {
    let text: String = column(row, name)?;
    serde_json::from_str(&text).map_err(|error| DbError::Bug(format!("column {name}: {error}")))
}
