//! What the program does with its arguments, apart from how it is started.

use crate::daemon::Daemon;
use crate::guard;
use crate::log::log;
use crate::options::{self, Options};
use crate::sys::{boot, fd};
use core::net::SocketAddrV4;

/// Exit status for arguments that make no sense.
const BAD_USAGE: i32 = 2;
/// Exit status when the daemon had to stop.
const LOOP_FAILED: i32 = 3;

/// Runs with the arguments after the program's name, and gives the exit status.
pub fn run<'a>(arguments: impl Iterator<Item = &'a str>) -> i32 {
    // The kernel's first process is the init, whatever arguments the kernel passes on.
    if boot::process_id() == 1 {
        crate::init::run();
    }
    match options::parse(arguments) {
        Ok(Options::Init) => {
            log!("init works only as the first process of a guest");
            BAD_USAGE
        }
        Ok(Options::Guard) => guard::run(|| serve(options::LISTEN, None)),
        Ok(Options::Version) => {
            let text = concat!("envd ", env!("CARGO_PKG_VERSION"), "\n");
            i32::from(fd::write_raw(1, text.as_bytes()).is_err())
        }
        Ok(Options::Serve { listen, verifier_file }) => serve(listen, verifier_file.as_deref()),
        Err(text) => {
            log!("{text}");
            BAD_USAGE
        }
    }
}

fn serve(listen: SocketAddrV4, verifier_file: Option<&str>) -> i32 {
    let mut daemon = match Daemon::start(listen, verifier_file) {
        Ok(daemon) => daemon,
        Err(error) => {
            match error.errno {
                Some(errno) => log!("cannot start: {}: {errno}", error.step),
                None => log!("cannot start: {}", error.step),
            }
            return guard::CANNOT_START;
        }
    };
    match daemon.run() {
        Ok(()) => 0,
        Err(errno) => {
            log!("the event loop failed: {errno}");
            LOOP_FAILED
        }
    }
}
