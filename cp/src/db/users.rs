//! `users`: accounts.

use super::teams::{self, Role};
use super::{DbError, Sql, Timestamp, column};
use postgres::Row;

/// An account.
#[derive(Debug, Clone)]
pub struct User {
    /// `usr-…`
    pub id: String,
    /// In lower case.
    pub email: String,
    /// What they are called; may be empty.
    pub name: String,
    /// The password's stored form; `None` when the account has none.
    pub password: Option<String>,
    /// Whether it administers the whole installation.
    pub is_admin: bool,
    /// Whether it may log in.
    pub is_active: bool,
    /// Since when.
    pub created_at: Timestamp,
}

fn user(row: &Row) -> Result<User, DbError> {
    let status: String = column(row, "status")?;
    Ok(User {
        id: column(row, "id")?,
        email: column(row, "email")?,
        name: column(row, "name")?,
        password: column(row, "password")?,
        is_admin: column(row, "is_admin")?,
        is_active: status == "active",
        created_at: column(row, "created_at")?,
    })
}

/// A new account.
#[derive(Debug, Clone)]
pub struct NewUser<'a> {
    /// `usr-…`
    pub id: &'a str,
    /// In lower case.
    pub email: &'a str,
    /// What they are called.
    pub name: &'a str,
    /// The password's stored form.
    pub password: &'a str,
    /// Whether it administers the whole installation.
    pub is_admin: bool,
}

/// Adds an account.
///
/// # Errors
/// `Duplicate("users_email")` when the address has one.
pub fn insert(sql: &mut dyn Sql, new: &NewUser<'_>) -> Result<(), DbError> {
    sql.execute(
        "insert into users (id, email, name, password, is_admin) values ($1, $2, $3, $4, $5)",
        &[&new.id, &new.email, &new.name, &new.password, &new.is_admin],
    )?;
    Ok(())
}

/// The account with this address, given in lower case.
///
/// # Errors
/// What the database says.
pub fn find_by_email(sql: &mut dyn Sql, email: &str) -> Result<Option<User>, DbError> {
    sql.row(
        "select id, email, name, password, is_admin, status, created_at from users
         where email = $1 and status <> 'deleted'",
        &[&email],
    )?
    .as_ref()
    .map(user)
    .transpose()
}

/// The account with this id, unless it was deleted.
///
/// # Errors
/// What the database says.
pub fn find(sql: &mut dyn Sql, id: &str) -> Result<Option<User>, DbError> {
    sql.row(
        "select id, email, name, password, is_admin, status, created_at from users
         where id = $1 and status <> 'deleted'",
        &[&id],
    )?
    .as_ref()
    .map(user)
    .transpose()
}

/// Stores another password. `void_tokens` makes every token that was issued before this second void.
///
/// # Errors
/// What the database says.
pub fn set_password(sql: &mut dyn Sql, id: &str, password: &str, void_tokens: bool) -> Result<(), DbError> {
    sql.execute(
        "update users set password = $2, updated_at = now(),
             tokens_valid_from = case when $3 then now() else tokens_valid_from end
         where id = $1",
        &[&id, &password, &void_tokens],
    )?;
    Ok(())
}

/// Gives the account another name.
///
/// # Errors
/// What the database says.
pub fn rename(sql: &mut dyn Sql, id: &str, name: &str) -> Result<(), DbError> {
    sql.execute("update users set name = $2, updated_at = now() where id = $1", &[&id, &name])?;
    Ok(())
}

/// Closes an account: it cannot log in any more, its tokens are void, and its address is free.
///
/// # Errors
/// What the database says.
pub fn delete(sql: &mut dyn Sql, id: &str) -> Result<(), DbError> {
    sql.execute(
        "update users set status = 'deleted', deleted_at = now(), updated_at = now()
         where id = $1 and status <> 'deleted'",
        &[&id],
    )?;
    Ok(())
}

/// Ids and addresses of at most ten active accounts whose address starts with `prefix`, given in lower
/// case.
///
/// # Errors
/// What the database says.
pub fn search(sql: &mut dyn Sql, prefix: &str) -> Result<Vec<(String, String)>, DbError> {
    let mut pattern = String::with_capacity(prefix.len() + 1);
    for c in prefix.chars() {
        if matches!(c, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('%');
    sql.rows(
        "select id, email from users where email like $1 and status = 'active' order by email limit 10",
        &[&pattern],
    )?
    .iter()
    .map(|row| Ok((column(row, "id")?, column(row, "email")?)))
    .collect()
}

/// Who a token stands for.
#[derive(Debug, Clone)]
pub struct Session {
    /// Their address.
    pub email: String,
    /// Whether they administer the whole installation.
    pub is_admin: bool,
    /// What they are in the token's team.
    pub role: Role,
}

/// Who a token of `user_id` for `team_id`, issued at `issued_sec`, stands for. `None` when the account is
/// not active any more, is not in the team any more, or has made its tokens void since.
///
/// # Errors
/// What the database says.
pub fn session(
    sql: &mut dyn Sql,
    user_id: &str,
    team_id: &str,
    issued_sec: u64,
) -> Result<Option<Session>, DbError> {
    let issued_sec = i64::try_from(issued_sec).unwrap_or(i64::MAX);
    let row = sql.row(
        "select u.email, u.is_admin, m.role from users u
         join team_members m on m.user_id = u.id and m.team_id = $2
         join teams t on t.id = m.team_id
         where u.id = $1 and u.status = 'active' and t.deleted_at is null
             and floor(extract(epoch from u.tokens_valid_from))::bigint <= $3",
        &[&user_id, &team_id, &issued_sec],
    )?;
    row.map(|row| {
        Ok(Session {
            email: column(&row, "email")?,
            is_admin: column(&row, "is_admin")?,
            role: teams::role(&row)?,
        })
    })
    .transpose()
}
