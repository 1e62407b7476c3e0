//! The control plane's program: from the command line and the settings to a running server.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use wire::config::{Program, Settings, parse_ip_list};
use wire::reactor::sys::{resources, signals::Signals};
use wrenn_cp::api;
use wrenn_cp::auth::random;
use wrenn_cp::cli::{self, Command, NewUser, USAGE};
use wrenn_cp::db::{Database, migrate};
use wrenn_cp::http::context::Context;
use wrenn_cp::http::server::Server;

/// Exit status for a command line or settings that cannot be used.
const EXIT_USAGE: u8 = 2;
/// Descriptors besides those of clients: database, hosts, log.
const OTHER_DESCRIPTORS: u64 = 1024;
/// The longest line that is read as a password, in bytes.
const MAX_PASSWORD_LINE: u64 = 4096;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let command = match cli::parse(std::env::args().skip(1)) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("wrenn-cp: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match command {
        Command::Help => {
            print!("{USAGE}{}", wire::config::help(Program::ControlPlane));
            return ExitCode::SUCCESS;
        }
        Command::Version => {
            println!("wrenn-cp {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Command::Serve | Command::Migrate | Command::CreateUser(_) => {}
    }
    let settings = match Settings::load(Program::ControlPlane, Path::new(".env")) {
        Ok(settings) => settings,
        Err(errors) => {
            for error in errors {
                eprintln!("wrenn-cp: {error}");
            }
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let level = settings.get("LOG_LEVEL").unwrap_or("info");
    let mut logger = env_logger::Builder::new();
    logger.parse_filters(level);
    // The driver's debug log has every statement's values, hashes of passwords and tokens among them.
    for module in ["postgres", "tokio_postgres"] {
        logger.filter_module(module, log::LevelFilter::Warn);
    }
    logger.init();
    let result = match command {
        Command::Migrate => migrate_database(&settings),
        Command::CreateUser(user) => create_user(&settings, &user),
        _ => serve(&settings),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wrenn-cp: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Connects and brings the schema up to date.
fn prepared_database(settings: &Settings) -> Result<Database, Failure> {
    let mut database = Database::connect(settings.require("DATABASE_URL")?)?;
    let applied = migrate::run(&mut database)?;
    if applied > 0 {
        log::info!("{applied} migrations applied");
    }
    Ok(database)
}

fn migrate_database(settings: &Settings) -> Result<(), Failure> {
    let mut database = Database::connect(settings.require("DATABASE_URL")?)?;
    match migrate::run(&mut database)? {
        0 => println!("the database is up to date"),
        1 => println!("1 migration applied"),
        applied => println!("{applied} migrations applied"),
    }
    Ok(())
}

fn create_user(settings: &Settings, user: &NewUser) -> Result<(), Failure> {
    let given = if user.is_password_on_stdin { Some(read_password()?) } else { None };
    let password = match &given {
        Some(password) => password.clone(),
        None => random::hex(&random::bytes::<12>()),
    };
    let mut database = prepared_database(settings)?;
    let id = api::users::create(&mut database, &user.email, user.name.as_deref(), user.is_admin, &password)?;
    println!("{id}");
    if given.is_none() {
        println!("password: {password}");
        eprintln!("The password is shown this once; keep it, or change it after the first login.");
    }
    Ok(())
}

/// The first line of stdin.
fn read_password() -> io::Result<String> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        eprint!("Password: ");
        io::stderr().flush()?;
    }
    let mut line = String::new();
    io::Read::take(stdin.lock(), MAX_PASSWORD_LINE).read_line(&mut line)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_string())
}

fn serve(settings: &Settings) -> Result<(), Failure> {
    // Before any thread starts, so that signals come to the loop's descriptor alone.
    let signals = Signals::termination()?;
    let address = settings.listen_address("WRENN_CP_LISTEN_ADDR")?;
    let context = Arc::new(Context {
        jwt_secret: settings.require("JWT_SECRET")?.as_bytes().to_vec(),
        database_url: settings.require("DATABASE_URL")?.to_string(),
        proxy_domain: settings.get("WRENN_PROXY_DOMAIN").map(str::to_string),
        // What the table of settings has checked.
        trusted_proxies: settings.get("WRENN_TRUSTED_PROXIES").and_then(parse_ip_list).unwrap_or_default(),
        version: env!("CARGO_PKG_VERSION"),
    });
    let workers = usize::try_from(settings.number("WRENN_DATABASE_CONNECTIONS")?)?;
    match resources::raise_open_files() {
        Ok(files) if files < wrenn_cp::http::limits::MAX_CONNECTIONS as u64 + OTHER_DESCRIPTORS => {
            log::warn!("only {files} files may be open: many clients at once will be refused (LimitNOFILE=)");
        }
        Ok(_) => {}
        Err(error) => log::warn!("the limit of open files cannot be raised: {error}"),
    }
    // A database that is not there is an error at start, for whoever starts this to see; systemd tries
    // again. Once it serves, it outlives the database's absence.
    prepared_database(settings)?;
    let mut server = Server::bind(address, workers, context, &api::routes(), api::jobs(), Some(signals))
        .map_err(|error| format!("cannot listen on {address} (WRENN_CP_LISTEN_ADDR): {error}"))?;
    log::info!("wrenn-cp {} serves http://{}", env!("CARGO_PKG_VERSION"), server.address());
    server.run()?;
    log::info!("ended");
    Ok(())
}
