//! Brings the database to the form that this program needs.
//!
//! The migrations are the files of `sql/`, part of the program, applied in order and forward only. What
//! was applied is kept with its SHA-256: a file that was changed afterwards is refused, and so is a
//! database that a newer program has migrated.

use super::{Database, DbError};
use postgres::GenericClient;
use sha2::{Digest, Sha256};
use std::fmt;

/// The advisory lock under which one program at a time migrates; the first bytes of "wrenn-cp".
const LOCK: i64 = 0x7772_656e_6e2d_6370;
/// How long to wait for another program's migrations, in milliseconds.
const LOCK_TIMEOUT_MS: u32 = 120_000;

/// One step of the database's form.
#[derive(Debug, Clone, Copy)]
pub struct Migration {
    /// Counts from 1 without gaps.
    pub version: i32,
    /// The file's name without its number.
    pub name: &'static str,
    /// The statements.
    pub sql: &'static str,
}

macro_rules! migrations {
    ($($version:literal $name:literal $file:literal,)*) => {
        /// All migrations, in order.
        pub const MIGRATIONS: &[Migration] = &[$(
            Migration { version: $version, name: $name, sql: include_str!(concat!("../../../sql/", $file)) },
        )*];
    };
}

migrations! {
    1 "accounts" "0001_accounts.sql",
    2 "hosts" "0002_hosts.sql",
    3 "capsules" "0003_capsules.sql",
    4 "audit" "0004_audit.sql",
    5 "network" "0005_network.sql",
    6 "snapshots" "0006_snapshots.sql",
    7 "api keys by prefix" "0007_api_keys_by_prefix.sql",
    8 "room of hosts" "0008_host_room.sql",
    9 "orphans" "0009_orphans.sql",
    10 "network changes" "0010_network_changes.sql",
    11 "snapshot orphans" "0011_snapshot_orphans.sql",
    12 "host facts" "0012_host_facts.sql",
}

/// Why the database was not migrated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrateError {
    /// The database did not do it.
    Database(DbError),
    /// A migration failed and was undone.
    Failed {
        /// The migration.
        version: i32,
        /// Its name.
        name: String,
        /// What the database says.
        error: DbError,
    },
    /// An applied migration is not the one that this program has.
    Changed {
        /// The migration.
        version: i32,
        /// The name that it was applied under.
        name: String,
    },
    /// The database has migrations that this program does not know.
    TooNew {
        /// The newest that is applied.
        applied: i32,
        /// The newest that this program has.
        known: i32,
    },
    /// A migration is missing between applied ones.
    Gap {
        /// The missing one.
        version: i32,
    },
}

impl fmt::Display for MigrateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MigrateError::Database(error) => error.fmt(f),
            MigrateError::Failed { version, name, error } => {
                write!(f, "migration {version:04}_{name} failed and was undone: {error}")
            }
            MigrateError::Changed { version, name } => write!(
                f,
                "migration {version:04}_{name} was changed after it had been applied; run the program that \
                 it was applied by, or restore the file and put the change into a new migration"
            ),
            MigrateError::TooNew { applied, known } => write!(
                f,
                "the database is at migration {applied}, newer than this program, which knows up to {known}; \
                 run the newer program"
            ),
            MigrateError::Gap { version } => write!(
                f,
                "migration {version} is missing although later ones are applied; restore the database from a \
                 backup"
            ),
        }
    }
}

impl std::error::Error for MigrateError {}

impl From<DbError> for MigrateError {
    fn from(error: DbError) -> MigrateError {
        MigrateError::Database(error)
    }
}

impl From<postgres::Error> for MigrateError {
    fn from(error: postgres::Error) -> MigrateError {
        MigrateError::Database(error.into())
    }
}

/// An applied migration, as the database remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Its number.
    pub version: i32,
    /// Its name.
    pub name: String,
    /// The SHA-256 of its statements.
    pub checksum: Vec<u8>,
}

/// The SHA-256 of a migration's statements.
pub fn checksum(migration: &Migration) -> [u8; 32] {
    Sha256::digest(migration.sql.as_bytes()).into()
}

/// Which migrations are left to apply. `applied` is ordered by version.
///
/// # Errors
/// When what is applied does not fit what is known.
pub fn plan<'a>(known: &'a [Migration], applied: &[Applied]) -> Result<&'a [Migration], MigrateError> {
    for (index, row) in applied.iter().enumerate() {
        let Some(migration) = known.get(index) else {
            let newest = applied.last().map_or(row.version, |a| a.version);
            return Err(MigrateError::TooNew { applied: newest, known: known.len() as i32 });
        };
        if row.version != migration.version {
            return Err(MigrateError::Gap { version: migration.version });
        }
        if row.checksum != checksum(migration) {
            return Err(MigrateError::Changed { version: row.version, name: row.name.clone() });
        }
    }
    Ok(&known[applied.len()..])
}

fn applied(client: &mut impl GenericClient) -> Result<Vec<Applied>, MigrateError> {
    let rows = client.query("select version, name, checksum from schema_migrations order by version", &[])?;
    rows.iter()
        .map(|row| {
            Ok(Applied {
                version: super::column(row, "version")?,
                name: super::column(row, "name")?,
                checksum: super::column(row, "checksum")?,
            })
        })
        .collect()
}

/// Applies what is left to apply and gives how many that was. Several programs may do it at once.
///
/// # Errors
/// When the database cannot be reached, a migration fails (then it is undone, those before it stay), or
/// what is applied does not fit what this program knows.
pub fn run(database: &mut Database) -> Result<usize, MigrateError> {
    run_list(database, MIGRATIONS)
}

/// The same with other migrations than the program's own.
///
/// # Errors
/// As [`run`].
pub fn run_list(database: &mut Database, known: &[Migration]) -> Result<usize, MigrateError> {
    let client = database.client()?;
    // A migration may take its time on a large table; waiting for another program's has a bound.
    client.batch_execute(&format!("set statement_timeout = 0; set lock_timeout = {LOCK_TIMEOUT_MS}"))?;
    let result = run_locked(client, known);
    // The connection goes on to serve requests: back to the bounds that it was made with.
    let reset = client.batch_execute(&format!(
        "reset statement_timeout; reset lock_timeout; select pg_advisory_unlock({LOCK})"
    ));
    let done = result?;
    reset?;
    Ok(done)
}

fn run_locked(client: &mut postgres::Client, known: &[Migration]) -> Result<usize, MigrateError> {
    client.batch_execute(&format!("select pg_advisory_lock({LOCK})"))?;
    client.batch_execute(
        "create table if not exists schema_migrations (
            version integer primary key check (version > 0),
            name text not null,
            checksum bytea not null check (octet_length(checksum) = 32),
            applied_at timestamptz not null default now()
        )",
    )?;
    let applied = applied(client)?;
    let left = plan(known, &applied)?;
    for migration in left {
        apply(client, migration).map_err(|error| MigrateError::Failed {
            version: migration.version,
            name: migration.name.to_string(),
            error,
        })?;
        log::info!("migration {:04}_{} applied", migration.version, migration.name);
    }
    Ok(left.len())
}

fn apply(client: &mut postgres::Client, migration: &Migration) -> Result<(), DbError> {
    let mut transaction = client.transaction()?;
    transaction.batch_execute(migration.sql)?;
    transaction.execute(
        "insert into schema_migrations (version, name, checksum) values ($1, $2, $3)",
        &[&migration.version, &migration.name, &checksum(migration).as_slice()],
    )?;
    Ok(transaction.commit()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migration(version: i32, sql: &'static str) -> Migration {
        Migration { version, name: "x", sql }
    }

    fn row(migration: &Migration) -> Applied {
        Applied {
            version: migration.version,
            name: migration.name.to_string(),
            checksum: checksum(migration).to_vec(),
        }
    }

    #[test]
    fn the_programs_own_are_numbered_without_gaps() {
        for (index, migration) in MIGRATIONS.iter().enumerate() {
            assert_eq!(migration.version as usize, index + 1, "{}", migration.name);
            assert!(!migration.sql.is_empty());
        }
    }

    #[test]
    fn what_is_left_is_planned() {
        let known = [migration(1, "a"), migration(2, "b")];
        assert_eq!(plan(&known, &[]).map(<[_]>::len), Ok(2));
        assert_eq!(plan(&known, &[row(&known[0])]).map(|left| left[0].version), Ok(2));
        assert_eq!(plan(&known, &[row(&known[0]), row(&known[1])]).map(<[_]>::len), Ok(0));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let known = [migration(1, "a"), migration(2, "b")];
        let changed = row(&migration(1, "A"));
        assert_eq!(
            plan(&known, &[changed]).map(<[_]>::len),
            Err(MigrateError::Changed { version: 1, name: "x".into() })
        );
        let rows: Vec<_> = [&known[0], &known[1], &migration(3, "c")].map(row).into();
        assert_eq!(plan(&known, &rows).map(<[_]>::len), Err(MigrateError::TooNew { applied: 3, known: 2 }));
        assert_eq!(plan(&known, &[row(&known[1])]).map(<[_]>::len), Err(MigrateError::Gap { version: 1 }));
    }
}
