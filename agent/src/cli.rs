//! The command line.

use crate::ending::Ending;
use std::fmt;
use std::net::SocketAddr;
use wire::config::{Program, help};

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Serve, with the credentials that are saved.
    Serve,
    /// Register first.
    Register {
        /// Where the one-time token comes from.
        token: TokenSource,
        /// Where the control plane reaches this agent.
        address: SocketAddr,
        /// End after registering instead of serving.
        only: bool,
    },
    /// Tell the agent that serves to end so.
    End(Ending),
    /// Print the help.
    Help,
    /// Print the version.
    Version,
}

/// Where the registration token comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// The command line, where every user of the machine can see it.
    Argument(String),
    /// The first line of standard input.
    Stdin,
    /// The variable `WRENN_REGISTRATION_TOKEN`.
    Environment,
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TokenSource::Argument(_) => "Argument",
            TokenSource::Stdin => "Stdin",
            TokenSource::Environment => "Environment",
        })
    }
}

/// What is wrong with the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UsageError {
    /// An argument that there is not.
    Unknown(String),
    /// An option without its value.
    NoValue(&'static str),
    /// An option twice.
    Twice(&'static str),
    /// A value that is not an address.
    BadAddress(String),
    /// An option that needs another.
    Needs(&'static str, &'static str),
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UsageError::Unknown(arg) => write!(f, "unknown argument {arg:?}")?,
            UsageError::NoValue(option) => write!(f, "{option} needs a value")?,
            UsageError::Twice(option) => write!(f, "{option} is given twice")?,
            UsageError::BadAddress(value) => write!(
                f,
                "--address is {value:?}, but must be IP:PORT, where the control plane reaches this host"
            )?,
            UsageError::Needs(option, other) => write!(f, "{option} needs {other}")?,
        }
        f.write_str("; see `wrenn-agent --help`")
    }
}

impl std::error::Error for UsageError {}

/// Reads the command line, without the program's name. `token_in_environment` says whether
/// `WRENN_REGISTRATION_TOKEN` is set, which asks for a registration where `--address` is given.
pub fn parse(
    arguments: impl IntoIterator<Item = String>,
    token_in_environment: bool,
) -> Result<Command, UsageError> {
    let mut arguments = arguments.into_iter().peekable();
    let order = match arguments.peek().map(String::as_str) {
        Some("drain") => Some(Ending::Drain),
        Some("terminate") => Some(Ending::Terminate),
        _ => None,
    };
    if let Some(ending) = order {
        arguments.next();
        return match arguments.next() {
            None => Ok(Command::End(ending)),
            Some(argument) if matches!(argument.as_str(), "--help" | "-h") => Ok(Command::Help),
            Some(argument) => Err(UsageError::Unknown(argument)),
        };
    }
    let (mut token, mut address, mut only) = (None, None, false);
    while let Some(argument) = arguments.next() {
        let (name, inline) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name.to_string(), Some(value.to_string())),
            _ => (argument, None),
        };
        let mut value =
            |option| inline.clone().or_else(|| arguments.next()).ok_or(UsageError::NoValue(option));
        match name.as_str() {
            "--register" if token.is_some() => return Err(UsageError::Twice("--register")),
            "--register" => token = Some(value("--register")?),
            "--address" if address.is_some() => return Err(UsageError::Twice("--address")),
            "--address" => {
                let text = value("--address")?;
                let parsed: Option<SocketAddr> = text.parse().ok();
                let usable = parsed.filter(|a| !a.ip().is_unspecified() && a.port() != 0);
                address = Some(usable.ok_or(UsageError::BadAddress(text))?);
            }
            "--register-only" if inline.is_none() => only = true,
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => return Ok(Command::Version),
            _ => return Err(UsageError::Unknown(name)),
        }
    }
    let token = match token {
        Some(token) if token == "-" => Some(TokenSource::Stdin),
        Some(token) => Some(TokenSource::Argument(token)),
        None if address.is_some() && token_in_environment => Some(TokenSource::Environment),
        None => None,
    };
    match (token, address) {
        (Some(token), Some(address)) => Ok(Command::Register { token, address, only }),
        (Some(_), None) => Err(UsageError::Needs("--register", "--address IP:PORT")),
        (None, Some(_)) => {
            Err(UsageError::Needs("--address", "--register TOKEN (or WRENN_REGISTRATION_TOKEN)"))
        }
        (None, None) if only => Err(UsageError::Needs("--register-only", "--register TOKEN")),
        (None, None) => Ok(Command::Serve),
    }
}

/// The text of `--help`.
pub fn help_text() -> String {
    format!(
        "wrenn-agent {}: runs the capsules of one host\n\
         \n\
         usage:\n  \
           wrenn-agent                                      serve\n  \
           wrenn-agent --register TOKEN --address IP:PORT   register this host first, then serve\n  \
           wrenn-agent drain                                pause all capsules and end the agent that serves\n  \
           wrenn-agent terminate                            destroy all capsules, paused ones too, and end it\n\
         \n\
         An agent that is ended by SIGTERM leaves its capsules running, and the next one goes on with them.\n\
         \n\
         options:\n  \
           --register TOKEN   the one-time token that the control plane gave for this host; - reads it from\n  \
         {:19}standard input, where other users of the machine cannot see it\n  \
           --address IP:PORT  where the control plane reaches this agent\n  \
           --register-only    end after registering\n  \
           --help, --version\n\
         \n\
         environment (or a .env file in the working directory, which the environment overrides):\n{}",
        env!("CARGO_PKG_VERSION"),
        "",
        help(Program::Agent)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, UsageError> {
        parse(line.split_whitespace().map(str::to_string), false)
    }

    #[test]
    fn command_lines() {
        let address: SocketAddr = "10.0.0.1:50051".parse().expect("address");
        assert_eq!(parsed(""), Ok(Command::Serve));
        assert_eq!(
            parsed("--register abc --address 10.0.0.1:50051"),
            Ok(Command::Register { token: TokenSource::Argument("abc".into()), address, only: false })
        );
        assert_eq!(
            parsed("--register=- --address=10.0.0.1:50051 --register-only"),
            Ok(Command::Register { token: TokenSource::Stdin, address, only: true })
        );
        assert_eq!(parsed("--register x --help"), Ok(Command::Help));
        assert_eq!(parsed("-V"), Ok(Command::Version));
        assert_eq!(parsed("drain"), Ok(Command::End(Ending::Drain)));
        assert_eq!(parsed("terminate"), Ok(Command::End(Ending::Terminate)));
        assert_eq!(parsed("drain now"), Err(UsageError::Unknown("now".into())));
        assert_eq!(parsed("--register x drain"), Err(UsageError::Unknown("drain".into())));
        assert_eq!(parsed("--register"), Err(UsageError::NoValue("--register")));
        assert_eq!(parsed("--register a --register b"), Err(UsageError::Twice("--register")));
        assert_eq!(parsed("--register a"), Err(UsageError::Needs("--register", "--address IP:PORT")));
        assert_eq!(
            parsed("--register a --address 0.0.0.0:1"),
            Err(UsageError::BadAddress("0.0.0.0:1".into()))
        );
        assert_eq!(parsed("--adress x"), Err(UsageError::Unknown("--adress".into())));
        assert!(parsed("--register-only").is_err());
        assert!(parsed("--address 10.0.0.1:1").is_err());
    }

    #[test]
    fn a_token_of_the_environment_is_used_where_an_address_is_given() {
        let arguments = ["--address".to_string(), "10.0.0.1:1".to_string()];
        let command = parse(arguments, true).expect("good");
        assert!(matches!(command, Command::Register { token: TokenSource::Environment, .. }));
        assert_eq!(parse([], true), Ok(Command::Serve));
    }

    #[test]
    fn the_help_names_everything() {
        let help = help_text();
        for word in [
            "drain",
            "terminate",
            "--register",
            "--address",
            "--register-only",
            "WRENN_DIR",
            "WRENN_CP_URL",
            "LOG_LEVEL",
        ] {
            assert!(help.contains(word), "{word}");
        }
    }
}
