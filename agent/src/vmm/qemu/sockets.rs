//! The sockets by which the agent speaks to QEMU, in the capsule's directory.

use super::Monitor;
use crate::sys::node;
use crate::vmm::console::Console;
use crate::vmm::machine::{Control, system};
use crate::vmm::{VmmError, firecracker};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The monitor's socket.
const MONITOR_NAME: &str = "qmp.sock";
/// The serial port's socket.
const CONSOLE_NAME: &str = "serial.sock";

/// The sockets that the VMM inherits, listening: so the agent can connect before the VMM has started, and
/// again after a restart of its own.
pub(super) struct Listeners {
    /// For the VMM's monitor.
    pub monitor: UnixListener,
    /// For the guest's serial port.
    pub console: UnixListener,
}

/// Makes the sockets in the capsule's directory and connects to them. Names that are there are replaced:
/// they are an earlier machine's, and nobody listens any more.
pub(super) fn create(directory: &Path) -> Result<(Listeners, (Control, Console)), VmmError> {
    // By that another VMM would be recognised.
    firecracker::clear(directory)?;
    let handle = File::open(directory).map_err(system("opening", directory))?;
    let monitor = listen(&handle, directory, MONITOR_NAME)?;
    let console = listen(&handle, directory, CONSOLE_NAME)?;
    Ok((Listeners { monitor, console }, connect_all(&handle, directory)?))
}

/// The agent's ends of the sockets of a QEMU that an earlier agent has started.
pub fn connect(directory: &Path) -> Result<(Control, Console), VmmError> {
    let handle = File::open(directory).map_err(system("opening", directory))?;
    connect_all(&handle, directory)
}

fn connect_all(handle: &File, directory: &Path) -> Result<(Control, Console), VmmError> {
    let monitor = connect_to(handle, directory, MONITOR_NAME)?;
    let console = connect_to(handle, directory, CONSOLE_NAME)?;
    let console =
        Console::new(console.into(), directory).map_err(system("opening the serial log in", directory))?;
    Ok((Control::Qemu(Monitor::new(monitor)), console))
}

/// By way of the directory's descriptor: a socket's own path may have no more than 107 bytes, unix(7).
fn short_path(handle: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", handle.as_raw_fd()))
}

fn listen(handle: &File, directory: &Path, name: &str) -> Result<UnixListener, VmmError> {
    let path = short_path(handle, name);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(system("removing", &directory.join(name))(e)),
        _ => UnixListener::bind(path).map_err(system("listening on", &directory.join(name))),
    }
}

fn connect_to(handle: &File, directory: &Path, name: &str) -> Result<UnixStream, VmmError> {
    node::connect(&short_path(handle, name)).map_err(system("connecting to", &directory.join(name)))
}
