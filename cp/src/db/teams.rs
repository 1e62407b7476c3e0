//! `teams` and `team_members`.

use super::{DbError, Sql, Timestamp, column};
use postgres::Row;
use serde::Serialize;

/// What a member may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Uses what the team has.
    Member,
    /// And manages members and hosts.
    Admin,
    /// And may delete the team. There is one.
    Owner,
}

impl Role {
    /// The role's name.
    pub fn name(self) -> &'static str {
        match self {
            Role::Member => "member",
            Role::Admin => "admin",
            Role::Owner => "owner",
        }
    }

    /// The role with this name.
    pub fn from_name(name: &str) -> Option<Role> {
        [Role::Member, Role::Admin, Role::Owner].into_iter().find(|r| r.name() == name)
    }
}

/// A team, as the API tells it.
#[derive(Debug, Clone, Serialize)]
pub struct Team {
    /// `team-…`
    pub id: String,
    /// 1 to 128 characters.
    pub name: String,
    /// `xxxxxx-yyyyyy`, never changed.
    pub slug: String,
    /// Since when.
    pub created_at: Timestamp,
}

/// A team and what somebody is in it.
#[derive(Debug, Clone, Serialize)]
pub struct Membership {
    /// The team.
    #[serde(flatten)]
    pub team: Team,
    /// What they are in it.
    pub role: Role,
}

/// Somebody in a team, as the API tells it.
#[derive(Debug, Clone, Serialize)]
pub struct Member {
    /// `usr-…`
    pub user_id: String,
    /// Their address.
    pub email: String,
    /// What they are in it.
    pub role: Role,
    /// Since when.
    pub joined_at: Timestamp,
}

fn team(row: &Row) -> Result<Team, DbError> {
    Ok(Team {
        id: column(row, "id")?,
        name: column(row, "name")?,
        slug: column(row, "slug")?,
        created_at: column(row, "created_at")?,
    })
}

pub(super) fn role(row: &Row) -> Result<Role, DbError> {
    let name: &str = column(row, "role")?;
    Role::from_name(name).ok_or_else(|| DbError::Bug(format!("role {name:?}")))
}

fn member(row: &Row) -> Result<Member, DbError> {
    Ok(Member {
        user_id: column(row, "user_id")?,
        email: column(row, "email")?,
        role: role(row)?,
        joined_at: column(row, "joined_at")?,
    })
}

/// Adds a team with its owner.
///
/// # Errors
/// What the database says.
pub fn insert(
    sql: &mut dyn Sql,
    id: &str,
    name: &str,
    slug: &str,
    owner_id: &str,
) -> Result<Membership, DbError> {
    let row = sql.row(
        "insert into teams (id, name, slug) values ($1, $2, $3) returning id, name, slug, created_at",
        &[&id, &name, &slug],
    )?;
    let row = row.ok_or_else(|| DbError::Bug("insert without a row".into()))?;
    add_member(sql, id, owner_id, Role::Owner)?;
    Ok(Membership { team: team(&row)?, role: Role::Owner })
}

/// Adds a member.
///
/// # Errors
/// `Duplicate("team_members_pkey")` when they are one.
pub fn add_member(sql: &mut dyn Sql, team_id: &str, user_id: &str, role: Role) -> Result<(), DbError> {
    sql.execute(
        "insert into team_members (team_id, user_id, role) values ($1, $2, $3)",
        &[&team_id, &user_id, &role.name()],
    )?;
    Ok(())
}

/// The teams of somebody, in the order in which they joined: the first is the one that a login acts for.
///
/// # Errors
/// What the database says.
pub fn of_user(sql: &mut dyn Sql, user_id: &str) -> Result<Vec<Membership>, DbError> {
    sql.rows(
        "select t.id, t.name, t.slug, t.created_at, m.role from team_members m
         join teams t on t.id = m.team_id
         where m.user_id = $1 and t.deleted_at is null order by m.joined_at, t.id",
        &[&user_id],
    )?
    .iter()
    .map(|row| Ok(Membership { team: team(row)?, role: role(row)? }))
    .collect()
}

/// A team that was not deleted.
///
/// # Errors
/// What the database says.
pub fn find(sql: &mut dyn Sql, id: &str) -> Result<Option<Team>, DbError> {
    sql.row("select id, name, slug, created_at from teams where id = $1 and deleted_at is null", &[&id])?
        .as_ref()
        .map(team)
        .transpose()
}

/// Gives a team another name.
///
/// # Errors
/// What the database says.
pub fn rename(sql: &mut dyn Sql, id: &str, name: &str) -> Result<(), DbError> {
    sql.execute("update teams set name = $2 where id = $1", &[&id, &name])?;
    Ok(())
}

/// Everybody in a team.
///
/// # Errors
/// What the database says.
pub fn members(sql: &mut dyn Sql, team_id: &str) -> Result<Vec<Member>, DbError> {
    sql.rows(
        "select m.user_id, u.email, m.role, m.joined_at from team_members m
         join users u on u.id = m.user_id
         where m.team_id = $1 and u.status <> 'deleted' order by m.joined_at, u.id",
        &[&team_id],
    )?
    .iter()
    .map(member)
    .collect()
}

/// One member.
///
/// # Errors
/// What the database says.
pub fn find_member(sql: &mut dyn Sql, team_id: &str, user_id: &str) -> Result<Option<Member>, DbError> {
    sql.row(
        "select m.user_id, u.email, m.role, m.joined_at from team_members m
         join users u on u.id = m.user_id where m.team_id = $1 and m.user_id = $2",
        &[&team_id, &user_id],
    )?
    .as_ref()
    .map(member)
    .transpose()
}

/// Makes a member something else.
///
/// # Errors
/// What the database says.
pub fn set_role(sql: &mut dyn Sql, team_id: &str, user_id: &str, role: Role) -> Result<(), DbError> {
    sql.execute(
        "update team_members set role = $3 where team_id = $1 and user_id = $2",
        &[&team_id, &user_id, &role.name()],
    )?;
    Ok(())
}

/// Whether somebody is a member of a team, and will be until this transaction ends: whoever removes them waits
/// for it, and finds what it has made.
///
/// # Errors
/// What the database says.
pub fn hold_member(sql: &mut dyn Sql, team_id: &str, user_id: &str) -> Result<bool, DbError> {
    let row = sql.row(
        "select 1 from team_members where team_id = $1 and user_id = $2 for share",
        &[&team_id, &user_id],
    )?;
    Ok(row.is_some())
}

/// Takes somebody out of a team.
///
/// # Errors
/// What the database says.
pub fn remove_member(sql: &mut dyn Sql, team_id: &str, user_id: &str) -> Result<(), DbError> {
    sql.execute("delete from team_members where team_id = $1 and user_id = $2", &[&team_id, &user_id])?;
    Ok(())
}

/// Deletes a team: its members' tokens and its API keys are void from here on, its records stay.
///
/// # Errors
/// What the database says.
pub fn delete(sql: &mut dyn Sql, id: &str) -> Result<(), DbError> {
    sql.execute("update teams set deleted_at = now() where id = $1 and deleted_at is null", &[&id])?;
    Ok(())
}
