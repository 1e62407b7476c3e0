//! What the operator says on the command line.

use std::fmt;

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Serve the API.
    Serve,
    /// Bring the database's schema up to date.
    Migrate,
    /// Make an account.
    CreateUser(NewUser),
    /// Tell how to use the program.
    Help,
    /// Tell the version.
    Version,
}

/// The account to make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewUser {
    /// Its e-mail address.
    pub email: String,
    /// Its name; the address's local part without.
    pub name: Option<String>,
    /// Whether it manages the platform.
    pub is_admin: bool,
    /// Whether its password is the first line of stdin; else one is made and printed.
    pub is_password_on_stdin: bool,
}

/// Why a command line is not understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; see wrenn-cp --help", self.0)
    }
}

impl std::error::Error for UsageError {}

/// How to use the program, before the table of variables.
pub const USAGE: &str = "\
Wrenn's control plane: the public API over PostgreSQL.

Usage:
  wrenn-cp [serve]   serve the API; the database's schema is brought up to date first
  wrenn-cp migrate   bring the database's schema up to date and end
  wrenn-cp user create --email ADDRESS [--name NAME] [--admin] [--password-stdin]
                     make an account; its password is the first line of stdin,
                     or is made and printed once
  wrenn-cp --help | --version

Variables, from the environment or a file .env in the working directory:
";

/// Reads the arguments, without the program's name.
///
/// # Errors
/// What is not understood.
pub fn parse<I: IntoIterator<Item = String>>(arguments: I) -> Result<Command, UsageError> {
    let arguments: Vec<String> = arguments.into_iter().collect();
    if arguments.iter().any(|a| a == "--help" || a == "-h") {
        return Ok(Command::Help);
    }
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] | ["serve"] => Ok(Command::Serve),
        ["migrate"] => Ok(Command::Migrate),
        ["--version" | "-V"] => Ok(Command::Version),
        ["help"] => Ok(Command::Help),
        ["user", "create", options @ ..] => parse_new_user(options),
        ["user", ..] => Err(UsageError("`user` needs a further word: `user create`".to_string())),
        [first, ..] => Err(UsageError(format!("{first:?} and what follows it is not understood"))),
    }
}

fn parse_new_user(options: &[&str]) -> Result<Command, UsageError> {
    let mut user = NewUser::default();
    let mut options = options.iter();
    while let Some(option) = options.next() {
        // Both `--name VALUE` and `--name=VALUE`.
        let (name, inline) = option.split_once('=').map_or((*option, None), |(n, v)| (n, Some(v)));
        let mut value = || {
            inline
                .or_else(|| options.next().copied())
                .filter(|v| !v.is_empty())
                .map(str::to_string)
                .ok_or_else(|| UsageError(format!("{name} needs a value")))
        };
        match name {
            "--email" => user.email = value()?,
            "--name" => user.name = Some(value()?),
            "--admin" if inline.is_none() => user.is_admin = true,
            "--password-stdin" if inline.is_none() => user.is_password_on_stdin = true,
            _ => return Err(UsageError(format!("{option:?} is not an option of `user create`"))),
        }
    }
    if user.email.is_empty() {
        return Err(UsageError("`user create` needs --email ADDRESS".to_string()));
    }
    Ok(Command::CreateUser(user))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, UsageError> {
        parse(line.split_whitespace().map(str::to_string))
    }

    #[test]
    fn every_command_is_understood() {
        assert_eq!(parsed(""), Ok(Command::Serve));
        assert_eq!(parsed("serve"), Ok(Command::Serve));
        assert_eq!(parsed("migrate"), Ok(Command::Migrate));
        assert_eq!(parsed("--version"), Ok(Command::Version));
        assert_eq!(parsed("user create --help"), Ok(Command::Help));
        let user = NewUser {
            email: "a@b".into(),
            name: Some("Al".into()),
            is_admin: true,
            is_password_on_stdin: true,
        };
        let line = "user create --admin --email a@b --name=Al --password-stdin";
        assert_eq!(parsed(line), Ok(Command::CreateUser(user)));
    }

    #[test]
    fn what_is_not_understood_is_said() {
        for line in [
            "serve now",
            "user",
            "user create",
            "user create --email",
            "user create --email a@b -x",
            "--admin",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }
}
