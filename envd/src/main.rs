//! The `envd` program: which of its roles to play.

use envd::daemon::Daemon;
use envd::options::{self, Options};
use envd::sys::boot;
use std::process::ExitCode;

fn main() -> ExitCode {
    // The kernel's first process is the init, whatever arguments the kernel passes on.
    if boot::process_id() == 1 {
        envd::init::run();
    }
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    match options::parse(arguments.iter().map(String::as_str)) {
        Ok(Options::Init) => {
            eprintln!("envd: init works only as the first process of a guest");
            ExitCode::from(2)
        }
        Ok(Options::Version) => {
            println!("envd {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Options::Serve { listen, verifier_file }) => serve(listen, verifier_file.as_deref()),
        Err(text) => {
            eprintln!("envd: {text}");
            ExitCode::from(2)
        }
    }
}

fn serve(listen: std::net::SocketAddrV4, verifier_file: Option<&str>) -> ExitCode {
    let mut daemon = match Daemon::start(listen, verifier_file) {
        Ok(daemon) => daemon,
        Err(error) => {
            match error.errno {
                Some(errno) => eprintln!("envd: cannot start: {}: {errno}", error.step),
                None => eprintln!("envd: cannot start: {}", error.step),
            }
            return ExitCode::FAILURE;
        }
    };
    match daemon.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(errno) => {
            eprintln!("envd: the event loop failed: {errno}");
            ExitCode::FAILURE
        }
    }
}
