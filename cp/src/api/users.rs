//! Accounts: the first one from the command line, and the search for people to add to a team.

use super::fields::invalid;
use super::principal::Principal;
use crate::audit::{self, Actor, Event};
use crate::auth::id::{Kind, new_slug};
use crate::auth::password::{self, PasswordError, StoredPassword};
use crate::db::users::{self, NewUser};
use crate::db::{Database, DbError, Stop, teams};
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::{Value, json};
use std::fmt;
use std::sync::Arc;

/// Why an account was not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateError {
    /// The address is not one.
    BadEmail(String),
    /// There is an account with this address.
    Exists(String),
    /// The password may not be taken.
    Password(PasswordError),
    /// The name is too long.
    LongName,
    /// The database did not do it.
    Database(DbError),
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CreateError::BadEmail(email) => write!(f, "{email:?} is not an e-mail address"),
            CreateError::Exists(email) => write!(f, "there is an account with the address {email} already"),
            CreateError::Password(error) => error.fmt(f),
            CreateError::LongName => f.write_str("a name has 100 characters or fewer"),
            CreateError::Database(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for CreateError {}

/// Whether a text can be an e-mail address: something before and after one `@`, no spaces. Whether mail
/// arrives there only mail can tell.
fn is_email(text: &str) -> bool {
    let parts = text.split_once('@');
    text.len() <= 254
        && parts
            .is_some_and(|(local, domain)| !local.is_empty() && !domain.is_empty() && !domain.contains('@'))
        && !text.chars().any(|c| c.is_whitespace() || c.is_control())
}

/// Makes an account with a team of its own, and gives its id. Takes a fifth of a second.
///
/// # Errors
/// Why it was not made.
pub fn create(
    database: &mut Database,
    email: &str,
    name: Option<&str>,
    is_admin: bool,
    password: &str,
) -> Result<String, CreateError> {
    let email = email.trim().to_lowercase();
    if !is_email(&email) {
        return Err(CreateError::BadEmail(email));
    }
    password::check(password).map_err(CreateError::Password)?;
    let name = name.unwrap_or_else(|| email.split('@').next().unwrap_or_default()).trim();
    if name.chars().count() > 100 {
        return Err(CreateError::LongName);
    }
    let stored = StoredPassword::new(password).to_text();
    let id = Kind::User.new_id();
    let made = database.transaction(|sql| {
        let new = NewUser { id: &id, email: &email, name, password: &stored, is_admin };
        users::insert(sql, &new)?;
        let team_id = Kind::Team.new_id();
        teams::insert(sql, &team_id, &team_name(name), &new_slug(), &id)?;
        let event = Event::new(Some(&team_id), "user.create", &id).with(json!({"is_admin": is_admin}));
        Ok(audit::write(sql, &Actor::System, &event)?)
    });
    match made {
        Ok(()) => Ok(id),
        Err(Stop::Database(error)) if error.is_duplicate_of("users_email") => Err(CreateError::Exists(email)),
        Err(Stop::Database(error)) => Err(CreateError::Database(error)),
        Err(Stop::Answer(answer)) => {
            Err(CreateError::Database(DbError::Bug(answer.error_message().unwrap_or_default())))
        }
    }
}

/// What somebody's own team is called at first. Names of teams are of few characters.
fn team_name(user_name: &str) -> String {
    let kept: String = user_name.chars().filter(|c| super::teams::is_name_char(*c)).take(100).collect();
    let kept = kept.trim();
    if kept.is_empty() { "My team".to_string() } else { format!("{kept}s team") }
}

/// `GET /v1/users/search?email=…`.
pub fn search(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let found = db.read(|sql| {
            Principal::person(sql, &context, &request)?;
            let prefix = request.query("email").unwrap_or_default().trim().to_lowercase();
            if !prefix.contains('@') || prefix.len() > 254 || prefix.contains('\0') {
                return Err(invalid("email must be the beginning of an address, up to its @ at least").into());
            }
            Ok(users::search(sql, &prefix)?)
        })?;
        let found: Vec<Value> =
            found.iter().map(|(id, email)| json!({"user_id": id, "email": email})).collect();
        Step::respond(Response::json(200, &found))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_an_at() {
        for good in ["a@b", "admin@example.com", "o'neil+x@sub.example.org", "ä@ö.de"] {
            assert!(is_email(good), "{good}");
        }
        for bad in ["", "a", "@", "a@", "@b", "a@b@c", "a b@c", "a@b\n"] {
            assert!(!is_email(bad), "{bad}");
        }
    }

    #[test]
    fn team_names_are_made_of_what_they_may_have() {
        assert_eq!(team_name("Ann Lee"), "Ann Lees team");
        assert_eq!(team_name("<ö>"), "My team");
    }
}
