//! `wrenn-agent`: the program around [`wrenn_agent`]. Command line, configuration, log, exit code.

use std::io::BufRead;
use std::path::Path;
use std::process::ExitCode;
use wire::config::{Program, Settings};
use wrenn_agent::agent::Outcome;
use wrenn_agent::cli::{self, Command, TokenSource};
use wrenn_agent::config::Config;
use wrenn_agent::orders;
use wrenn_agent::startup::{self, StartError};

/// A usage or configuration error, as sysexits.h numbers it.
const EX_USAGE: u8 = 64;
/// The longest registration token that is read from standard input, in bytes.
const MAX_TOKEN_BYTES: u64 = 1024;

fn main() -> ExitCode {
    let settings = match Settings::load(Program::Agent, Path::new(".env")) {
        Ok(settings) => settings,
        Err(errors) => {
            // Asking for help must work with a configuration that needs it.
            match cli::parse(std::env::args().skip(1), false) {
                Ok(Command::Help | Command::Version) => return print_about(),
                _ => errors.iter().for_each(|e| eprintln!("wrenn-agent: {e}")),
            }
            return ExitCode::from(EX_USAGE);
        }
    };
    let environment_token = settings.get("WRENN_REGISTRATION_TOKEN").map(str::to_string);
    let command = match cli::parse(std::env::args().skip(1), environment_token.is_some()) {
        Ok(Command::Help | Command::Version) => return print_about(),
        Ok(command) => command,
        Err(e) => return usage_error(&e),
    };
    let config = match Config::new(&settings) {
        Ok(config) => config,
        Err(e) => return usage_error(&e),
    };
    env_logger::Builder::new().parse_filters(settings.get("LOG_LEVEL").unwrap_or("info")).init();
    match run(command, config, environment_token) {
        Ok(Outcome::Clean) => ExitCode::SUCCESS,
        Ok(Outcome::Remains(count)) => {
            eprintln!("wrenn-agent: {count} capsules are not as they were to be; the log says why");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("wrenn-agent: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, config: Config, environment_token: Option<String>) -> Result<Outcome, StartError> {
    if let Command::Register { token, address, only } = command.clone() {
        let token = match token {
            TokenSource::Argument(token) => token,
            TokenSource::Stdin => read_token()?,
            TokenSource::Environment => environment_token.unwrap_or_default(),
        };
        startup::register(&config, &token, address)?;
        if only {
            return Ok(Outcome::Clean);
        }
    }
    match command {
        Command::End(ending) => orders::give(&config, ending),
        _ => startup::serve(config),
    }
}

fn read_token() -> Result<String, StartError> {
    let mut line = String::new();
    let read = std::io::Read::take(std::io::stdin().lock(), MAX_TOKEN_BYTES).read_line(&mut line);
    read.map_err(|source| StartError::System {
        step: "reading the token from standard input".into(),
        source,
    })?;
    match line.trim() {
        "" => Err(StartError::Register("there is no registration token on standard input".into())),
        token => Ok(token.to_string()),
    }
}

fn print_about() -> ExitCode {
    match cli::parse(std::env::args().skip(1), true) {
        Ok(Command::Version) => println!("wrenn-agent {}", env!("CARGO_PKG_VERSION")),
        _ => print!("{}", cli::help_text()),
    }
    ExitCode::SUCCESS
}

fn usage_error(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("wrenn-agent: {error}");
    ExitCode::from(EX_USAGE)
}
