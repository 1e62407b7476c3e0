//! Migrations on a real database.

use crate::postgres::{client, new_database};
use wrenn_cp::db::migrate::{MIGRATIONS, MigrateError, Migration, run, run_list};
use wrenn_cp::db::{Database, DbError};

fn migration(version: i32, sql: &'static str) -> Migration {
    Migration { version, name: "test", sql }
}

#[test]
fn they_are_applied_once() {
    let url = new_database();
    let mut db = Database::connect(&url).expect("connect");
    assert_eq!(run(&mut db), Ok(MIGRATIONS.len()));
    assert_eq!(run(&mut db), Ok(0));
    let rows = client(&url).query("select version from schema_migrations", &[]).expect("query");
    assert_eq!(rows.len(), MIGRATIONS.len());
}

#[test]
fn several_programs_may_start_at_once() {
    let url = new_database();
    let applied: usize = std::thread::scope(|scope| {
        let start = || {
            scope.spawn(|| {
                let mut db = Database::connect(&url).expect("connect");
                run(&mut db).expect("migrate")
            })
        };
        let threads: Vec<_> = (0..6).map(|_| start()).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).sum()
    });
    assert_eq!(applied, MIGRATIONS.len());
}

#[test]
fn a_changed_one_is_refused() {
    let url = new_database();
    let mut db = Database::connect(&url).expect("connect");
    let first = [migration(1, "create table a (x int)")];
    assert_eq!(run_list(&mut db, &first), Ok(1));
    let changed = [migration(1, "create table a (x bigint)"), migration(2, "create table b (x int)")];
    let error = run_list(&mut db, &changed).expect_err("a changed migration");
    assert_eq!(error, MigrateError::Changed { version: 1, name: "test".into() });
    assert!(error.to_string().contains("0001_test was changed"), "{error}");
    assert!(client(&url).query("select 1 from b", &[]).is_err(), "nothing was applied after it");
}

#[test]
fn a_newer_database_is_refused() {
    let url = new_database();
    let mut db = Database::connect(&url).expect("connect");
    let two = [migration(1, "create table a (x int)"), migration(2, "create table b (x int)")];
    assert_eq!(run_list(&mut db, &two), Ok(2));
    assert_eq!(run_list(&mut db, &two[..1]), Err(MigrateError::TooNew { applied: 2, known: 1 }));
}

#[test]
fn a_failing_one_is_undone_and_those_before_it_stay() {
    let url = new_database();
    let mut db = Database::connect(&url).expect("connect");
    let list = [migration(1, "create table a (x int)"), migration(2, "create table b (x int); select 1/0")];
    let error = run_list(&mut db, &list).expect_err("a division by zero");
    assert!(
        matches!(&error, MigrateError::Failed { version: 2, error: DbError::Bug(text), .. } if text.contains("division")),
        "{error}"
    );
    let mut client = client(&url);
    assert!(client.query("select 1 from a", &[]).is_ok());
    assert!(client.query("select 1 from b", &[]).is_err());
    // The lock is free again, and the connection of use.
    let mended = [list[0], migration(2, "create table b (x int)")];
    assert_eq!(run_list(&mut db, &mended), Ok(1));
}
