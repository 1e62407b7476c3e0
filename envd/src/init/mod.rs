//! The guest's init: from the kernel's first process to tini, in one program and one process.
//!
//! As `/init` of the initramfs it loads the kernel modules, mounts the root file system and moves into it
//! ([`initramfs`]); then, or when the kernel starts it from the root file system itself, it prepares the
//! system ([`system`]), configures the network ([`network`]) and becomes tini, which starts envd under its guard.
//!
//! A step without which the guest is of no use ends the machine with one line on the console, so that the
//! host learns of it at once. Other failures are told and passed over.

mod disk;
mod initramfs;
mod network;
mod system;

use crate::cmdline;
use crate::sys::{Errno, boot, clock, file, spawn};
use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;

/// Where PID 1's program is in the guest.
const TINI: &CStr = c"/usr/bin/tini";
/// Where envd is in the guest.
const ENVD: &CStr = c"/usr/local/bin/envd";
/// Bytes of the kernel command line that are looked at: more than the kernel's own limit.
const MAX_COMMAND_LINE: usize = 8192;

/// A step of the start that failed.
#[derive(Debug)]
pub struct BootError {
    /// What was tried, with its object.
    step: String,
    /// Why it failed.
    errno: Errno,
}

impl BootError {
    fn new(step: impl Into<String>, errno: Errno) -> BootError {
        BootError { step: step.into(), errno }
    }
}

/// Adds the step to an errno.
trait During<T> {
    fn during(self, step: &str) -> Result<T, BootError>;
}

impl<T> During<T> for Result<T, Errno> {
    fn during(self, step: &str) -> Result<T, BootError> {
        self.map_err(|errno| BootError::new(step, errno))
    }
}

/// A line on the console.
fn say(text: &str) {
    let line = format!("wrenn-init: {text}\r\n");
    if let Ok(console) = file::open(file::CURRENT, c"/dev/console", libc::O_WRONLY | libc::O_NOCTTY, 0) {
        // There is nobody else to tell.
        let _ = console.write_all(line.as_bytes());
    } else {
        let _ = crate::sys::fd::write_raw(2, line.as_bytes());
    }
}

/// Tells of a failure that the guest can live with.
fn complain(result: Result<(), BootError>) {
    if let Err(error) = result {
        say(&format!("{}: {}", error.step, error.errno));
    }
}

/// Runs as PID 1. Does not return: it becomes tini, or ends the machine.
pub fn run() -> ! {
    let error = match start() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    say(&format!("cannot start: {}: {}", error.step, error.errno));
    boot::end_machine();
    loop {
        clock::sleep_us(1_000_000);
    }
}

fn start() -> Result<core::convert::Infallible, BootError> {
    system::mount_kernel_interfaces()?;
    let line = file::read_file(c"/proc/cmdline", MAX_COMMAND_LINE).during("read /proc/cmdline")?;
    let line = cmdline::parse(&String::from_utf8_lossy(&line));
    if line.announce {
        say("started");
    }
    if initramfs::is_here() {
        initramfs::leave(&line)?;
    }
    system::prepare();
    complain(network::configure(&line));
    complain(system::start_time_service());
    complain(disk::grow_root(&line));
    let argv: Vec<CString> = [TINI, c"--", ENVD, c"guard"].iter().map(|s| (*s).into()).collect();
    let environment: Vec<CString> =
        [c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", c"HOME=/root", c"TERM=linux"]
            .iter()
            .map(|s| (*s).into())
            .collect();
    boot::change_directory(c"/").during("change to /")?;
    Err(BootError::new("start /usr/bin/tini", spawn::replace(TINI, &argv, &environment)))
}
