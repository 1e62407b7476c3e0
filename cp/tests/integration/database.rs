//! The database layer: lost connections, conflicts, constraints.

use crate::postgres::{client, new_database};
use crate::stage::Stage;
use wrenn_cp::db::{Database, DbError, Stop};
use wrenn_cp::http::handler::Response;

/// Ends all other connections to the database.
fn cut(url: &str) {
    client(url)
        .execute(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid()",
            &[],
        )
        .expect("terminate");
}

fn count(db: &mut Database) -> i64 {
    let row = db.read(|sql| Ok(sql.row("select count(*) as n from t", &[])?)).expect("count");
    row.expect("a row").get("n")
}

fn with_table() -> (String, Database) {
    let url = new_database();
    client(&url).batch_execute("create table t (x int primary key check (x > 0))").expect("create table");
    let db = Database::connect(&url).expect("connect");
    (url, db)
}

#[test]
fn a_lost_connection_is_made_anew() {
    let (url, mut db) = with_table();
    assert_eq!(count(&mut db), 0);
    cut(&url);
    assert_eq!(count(&mut db), 0, "a read goes on");
    cut(&url);
    db.transaction(|sql| Ok(sql.execute("insert into t values ($1)", &[&1])?)).expect("a write goes on");
    assert_eq!(count(&mut db), 1, "and is done once");
}

#[test]
fn a_connection_that_is_lost_in_a_transaction_undoes_it_first() {
    let (url, mut db) = with_table();
    let mut attempts = 0;
    db.transaction(|sql| {
        attempts += 1;
        sql.execute("insert into t values ($1)", &[&1])?;
        if attempts == 1 {
            cut(&url);
        }
        Ok(sql.execute("insert into t values ($1)", &[&2])?)
    })
    .expect("the second attempt");
    assert_eq!((attempts, count(&mut db)), (2, 2));
}

#[test]
fn an_answer_undoes_the_transaction() {
    let (_, mut db) = with_table();
    let result: Result<(), Stop> = db.transaction(|sql| {
        sql.execute("insert into t values ($1)", &[&1])?;
        Err(Response::error(404, "not_found", "no").into())
    });
    assert!(matches!(result, Err(Stop::Answer(r)) if r.status == 404));
    assert_eq!(count(&mut db), 0);
}

#[test]
fn deadlocks_are_tried_again() {
    let (url, mut db) = with_table();
    db.transaction(|sql| Ok(sql.execute("insert into t values (1), (2)", &[])?)).expect("insert");
    let barrier = std::sync::Barrier::new(2);
    let attempts = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for [first, second] in [[1, 2], [2, 1]] {
            let (url, barrier, attempts) = (&url, &barrier, &attempts);
            scope.spawn(move || {
                let mut db = Database::connect(url).expect("connect");
                let mut is_first_attempt = true;
                db.transaction(|sql| {
                    attempts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    sql.row("select x from t where x = $1 for update", &[&first])?;
                    if std::mem::take(&mut is_first_attempt) {
                        barrier.wait();
                    }
                    Ok(sql.row("select x from t where x = $1 for update", &[&second])?)
                })
                .expect("in the end both succeed");
            });
        }
    });
    assert!(attempts.into_inner() > 2, "one of them more than once");
}

#[test]
fn a_table_that_another_program_changes_is_read_on() {
    let (url, mut db) = with_table();
    let mut all = || db.read(|sql| Ok(sql.rows("select * from t", &[])?)).expect("read").len();
    assert_eq!(all(), 0);
    client(&url).batch_execute("alter table t add y text").expect("alter");
    assert_eq!(all(), 0);
}

#[test]
fn errors_are_told_apart() {
    let (_, mut db) = with_table();
    let mut insert = |x: i32| {
        let result = db.transaction(|sql| Ok(sql.execute("insert into t values ($1)", &[&x])?));
        match result {
            Err(Stop::Database(error)) => Some(error),
            Err(Stop::Answer(_)) => panic!("there is no answer here"),
            Ok(_) => None,
        }
    };
    assert_eq!(insert(1), None);
    assert_eq!(insert(1), Some(DbError::Duplicate("t_pkey".into())));
    assert_eq!(insert(0), Some(DbError::NotAllowed("t_x_check".into())));
    let missing = db.read(|sql| Ok(sql.rows("select 1 from no_such_table", &[])?));
    assert!(matches!(missing, Err(Stop::Database(DbError::Bug(text))) if text.contains("42P01")));
    let slow = db.read(|sql| {
        sql.execute("set statement_timeout = 50", &[])?;
        Ok(sql.rows("select pg_sleep(5)", &[])?)
    });
    assert!(matches!(slow, Err(Stop::Database(DbError::Overloaded(_)))));
}

#[test]
fn a_database_that_is_not_there_is_told_at_once() {
    for url in ["postgresql://wrenn@127.0.0.1:1/x", "postgresql://wrenn@%2Fno%2Fsuch%2Fdirectory/x"] {
        assert!(matches!(Database::connect(url), Err(DbError::Unreachable(_))), "{url}");
    }
    assert!(matches!(Database::connect("nonsense=x"), Err(DbError::BadUrl(_))));
    assert_eq!(Response::from(DbError::Unreachable(String::new())).status, 503);
}

#[test]
fn only_rows_that_make_sense_are_taken() {
    let stage = Stage::new();
    let mut client = client(&stage.url);
    for bad in [
        "insert into users (id, email, name) values ('usr-1', 'a@b', '')",
        "insert into users (id, email, name) values ('usr-0000000000000000000000001', 'A@b', '')",
        "insert into users (id, email, name, status)
             values ('usr-0000000000000000000000001', 'a@b', '', 'deleted')",
        "insert into users (id, email, name, password)
             values ('usr-0000000000000000000000001', 'a@b', '', 'secret')",
        "insert into hosts (id, type) values ('host-0000000000000000000000001', 'byoc')",
        "insert into hosts (id, type, status) values ('host-0000000000000000000000001', 'regular', 'online')",
        "insert into capsules (id, team_id, template, vcpus, memory_mb, created_by)
             select 'cl-0000000000000000000000001', id, '../etc', 1, 512, 'x' from teams limit 1",
        "insert into capsules (id, team_id, template, vcpus, memory_mb, created_by)
             select 'cl-0000000000000000000000001', id, 'minimal', 0, 512, 'x' from teams limit 1",
        "insert into capsules (id, team_id, template, vcpus, memory_mb, created_by)
             values ('cl-0000000000000000000000001', 'team-0000000000000000000000001', 'minimal', 1, 512, 'x')",
    ] {
        assert!(client.execute(bad, &[]).is_err(), "{bad}");
    }
}
