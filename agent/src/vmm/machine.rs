//! A machine that runs: its process, its monitor and its serial port.

use super::VmmError;
use super::console::{Console, Pump};
use super::qmp::{self, CommandError, CommandId, Message};
use crate::sys::memfd::Capture;
use crate::sys::pidfd::{Exit, Process};
use crate::sys::{passing, poll};
use serde_json::Value;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The monitor's socket, in the capsule's directory.
const MONITOR_NAME: &str = "qmp.sock";
/// The serial port's socket, in the capsule's directory.
const CONSOLE_NAME: &str = "serial.sock";

/// How much one [`Machine::pump_monitor`] reads before it gives the others their turn.
const PUMP_BYTES: usize = 64 * 1024;
const CHUNK_BYTES: usize = 4 * 1024;
/// How much of a guest's last words goes into an error message.
const TAIL_BYTES: usize = 2 * 1024;

/// What waits to be told while [`Machine::call`] waits for an answer, at most.
const MAX_HELD_EVENTS: usize = 1_024;

/// What has happened to a machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The VMM takes commands.
    Ready,
    /// The guest has powered off or rebooted, or the VMM was told to quit; its end follows.
    GuestShutdown {
        /// As QEMU calls it: `guest-shutdown`, `guest-reset`, `guest-panic`, `host-qmp-quit`...
        reason: String,
    },
    /// The guest stands still.
    Paused,
    /// The guest runs again.
    Resumed,
    /// A command's answer.
    Answer {
        /// The command.
        id: CommandId,
        /// What it returned, or why it failed.
        result: Result<Value, CommandError>,
    },
    /// Something else.
    Other {
        /// Its name.
        name: String,
    },
}

/// A running machine. Dropping it leaves it running, as a restart of the agent must.
#[derive(Debug)]
pub struct Machine {
    process: Process,
    monitor: UnixStream,
    client: qmp::Client,
    console: Console,
    /// What came while an answer was waited for.
    held: VecDeque<Event>,
    /// Unknown for a machine that an earlier agent has started.
    errors: Option<Capture>,
}

/// The sockets that the VMM inherits, listening: so the agent can connect before the VMM has started, and
/// again after a restart of its own.
pub(super) struct Listeners {
    /// For the VMM's monitor.
    pub monitor: UnixListener,
    /// For the guest's serial port.
    pub console: UnixListener,
}

/// The agent's ends of the same sockets.
pub(super) struct Connections {
    monitor: UnixStream,
    console: Console,
}

/// Makes the sockets in the capsule's directory and connects to them. Names that are there are replaced:
/// they are an earlier machine's, and nobody listens any more.
pub(super) fn create_sockets(directory: &Path) -> Result<(Listeners, Connections), VmmError> {
    let handle = File::open(directory).map_err(system("opening", directory))?;
    let monitor = listen(&handle, directory, MONITOR_NAME)?;
    let console = listen(&handle, directory, CONSOLE_NAME)?;
    Ok((Listeners { monitor, console }, connect_all(&handle, directory)?))
}

fn connect_all(handle: &File, directory: &Path) -> Result<Connections, VmmError> {
    let monitor = connect(handle, directory, MONITOR_NAME)?;
    let console = Console::new(connect(handle, directory, CONSOLE_NAME)?, directory)
        .map_err(system("opening the serial log in", directory))?;
    Ok(Connections { monitor, console })
}

impl Machine {
    /// The machine of a process that was given the listeners of `connections`.
    pub(super) fn started(process: Process, connections: Connections, errors: Option<Capture>) -> Machine {
        let Connections { monitor, console } = connections;
        Machine { process, monitor, client: qmp::Client::new(), console, held: VecDeque::new(), errors }
    }

    /// The machine that an earlier agent has started, by what its records say of it. [`VmmError::System`]
    /// with NotFound when its process has ended since.
    pub fn adopt(directory: &Path, pid: u32, start_ticks: u64) -> Result<Machine, VmmError> {
        let process = Process::adopt(pid, start_ticks).map_err(system("adopting the VMM of", directory))?;
        let handle = File::open(directory).map_err(system("opening", directory))?;
        Ok(Machine::started(process, connect_all(&handle, directory)?, None))
    }

    /// The VMM's process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// When the VMM started, in clock ticks since boot; with the number, what [`Machine::adopt`] needs.
    pub fn start_ticks(&self) -> u64 {
        self.process.start_ticks()
    }

    /// A descriptor that becomes readable when the VMM has ended.
    pub fn exit_fd(&self) -> RawFd {
        self.process.exit_fd()
    }

    /// How the VMM ended, or `None` while it runs. Never blocks.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        self.process.try_wait()
    }

    /// Waits at most `timeout_ms` for the VMM's end. Blocks.
    pub fn wait(&mut self, timeout_ms: i32) -> io::Result<Option<Exit>> {
        self.process.wait(timeout_ms)
    }

    /// Ends the VMM at once. The guest is told nothing and its disk is as after a power cut.
    pub fn kill(&self) -> io::Result<()> {
        self.process.kill()
    }

    /// Asks the VMM to end, with its disks written out. Its end is seen at [`Machine::exit_fd`].
    pub fn quit(&mut self) -> Result<(), VmmError> {
        self.execute("quit", None).map(drop)
    }

    /// Gives the VMM a command; the answer comes as an [`Event`].
    pub fn execute(&mut self, command: &str, arguments: Option<Value>) -> Result<CommandId, VmmError> {
        let id = self.client.execute(command, arguments)?;
        self.write()?;
        Ok(id)
    }

    /// Gives the VMM a command and waits at most `timeout_ms` for its answer, the end of the VMM included.
    /// With a `file`, that goes along (`add-fd`). Blocks; what else happens meanwhile is told by
    /// [`Machine::poll_event`] afterwards.
    pub fn call(
        &mut self,
        command: &'static str,
        arguments: Option<Value>,
        file: Option<BorrowedFd<'_>>,
        timeout_ms: u64,
    ) -> Result<Value, VmmError> {
        let end = Instant::now() + Duration::from_millis(timeout_ms);
        if let Some(file) = file {
            // What is sent before must not carry the file.
            self.wait_until_written(command, end)?;
            let id = self.client.execute(command, arguments)?;
            let sent = passing::send_with_file(self.monitor.as_fd(), self.client.output(), file)
                .map_err(system("handing a file to", Path::new("the VMM's monitor")))?;
            self.client.consume_output(sent);
            return self.wait_for_answer(command, id, end);
        }
        let id = self.client.execute(command, arguments)?;
        self.wait_for_answer(command, id, end)
    }

    fn wait_until_written(&mut self, command: &'static str, end: Instant) -> Result<(), VmmError> {
        loop {
            self.write()?;
            if self.client.output().is_empty() {
                return Ok(());
            }
            self.wait_for_monitor(command, libc::POLLOUT, end)?;
        }
    }

    fn wait_for_answer(
        &mut self,
        command: &'static str,
        wanted: CommandId,
        end: Instant,
    ) -> Result<Value, VmmError> {
        loop {
            let pumped = self.pump_monitor()?;
            while let Some(event) = self.next_event() {
                match event {
                    Event::Answer { id, result } if id == wanted => {
                        return result.map_err(|e| VmmError::Refused { command, why: e.description });
                    }
                    other if self.held.len() < MAX_HELD_EVENTS => self.held.push_back(other),
                    other => log::debug!("too much at once from a VMM, dropped: {other:?}"),
                }
            }
            match pumped {
                Pump::Closed => return Err(VmmError::MonitorClosed),
                Pump::More => {}
                Pump::Drained => {
                    let writing = if self.client.output().is_empty() { 0 } else { libc::POLLOUT };
                    self.wait_for_monitor(command, libc::POLLIN | writing, end)?;
                }
            }
        }
    }

    fn wait_for_monitor(
        &self,
        command: &'static str,
        events: libc::c_short,
        end: Instant,
    ) -> Result<(), VmmError> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(VmmError::NoAnswer { command });
        }
        poll::wait(self.monitor.as_fd(), events, left)
            .map_err(system("waiting for", Path::new("the VMM's monitor")))
    }

    /// The monitor's descriptor, to wait on for reading and writing.
    pub fn monitor_fd(&self) -> RawFd {
        self.monitor.as_raw_fd()
    }

    /// Writes and reads what can be written and read, up to a bound. Call it when the monitor's descriptor
    /// is ready, once right after the start, and again after [`Pump::More`]; then take the events.
    pub fn pump_monitor(&mut self) -> Result<Pump, VmmError> {
        self.write()?;
        let mut chunk = [0; CHUNK_BYTES];
        for _ in 0..PUMP_BYTES / CHUNK_BYTES {
            match self.monitor.read(&mut chunk) {
                Ok(0) => return Ok(Pump::Closed),
                Ok(count) => self.client.receive(&chunk[..count])?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Pump::Drained),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Ok(Pump::Closed),
            }
        }
        Ok(Pump::More)
    }

    /// The next thing that has happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.held.pop_front().or_else(|| self.next_event())
    }

    fn next_event(&mut self) -> Option<Event> {
        Some(match self.client.poll()? {
            Message::Ready { .. } => Event::Ready,
            Message::Answer { id, result } => Event::Answer { id, result },
            Message::Event { name, data } => match name.as_str() {
                "SHUTDOWN" => {
                    let reason = data.get("reason").and_then(Value::as_str).unwrap_or("unknown");
                    Event::GuestShutdown { reason: reason.to_owned() }
                }
                "STOP" => Event::Paused,
                "RESUME" => Event::Resumed,
                _ => Event::Other { name },
            },
        })
    }

    /// The serial port's descriptor, to wait on for reading.
    pub fn console_fd(&self) -> RawFd {
        self.console.fd()
    }

    /// Moves what the guest has written to its serial port into the log, up to a bound.
    pub fn pump_console(&mut self) -> io::Result<Pump> {
        self.console.pump()
    }

    /// The last few lines of what the guest has written to its serial port, at most 2 KiB, as text.
    pub fn console_tail(&self) -> String {
        self.console.tail(TAIL_BYTES)
    }

    /// What the VMM itself has written to its standard output and error: why it could not start, mostly.
    pub fn diagnostics(&self) -> String {
        self.errors.as_ref().map(Capture::text).unwrap_or_default()
    }

    fn write(&mut self) -> Result<(), VmmError> {
        while !self.client.output().is_empty() {
            match self.monitor.write(self.client.output()) {
                Ok(count) => self.client.consume_output(count),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(VmmError::MonitorClosed),
            }
        }
        Ok(())
    }
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

fn connect(handle: &File, directory: &Path, name: &str) -> Result<UnixStream, VmmError> {
    UnixStream::connect(short_path(handle, name))
        .and_then(|stream| stream.set_nonblocking(true).map(|()| stream))
        .map_err(system("connecting to", &directory.join(name)))
}

/// For `map_err`: a system call that failed in this step on this file.
pub(super) fn system(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::System { step, path, source }
}
