//! The connection to QEMU's monitor: the shell around [`qmp`].

use crate::sys::{passing, poll};
use crate::vmm::machine::{Event, system};
use crate::vmm::qmp::{self, CommandId, Message};
use crate::vmm::{Pump, VmmError};
use serde_json::Value;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How much one [`Monitor::pump`] reads before it gives the others their turn.
const PUMP_BYTES: usize = 64 * 1024;
const CHUNK_BYTES: usize = 4 * 1024;
/// What waits to be told while [`Monitor::call`] waits for an answer, at most.
const MAX_HELD_EVENTS: usize = 1_024;

/// A connection to a monitor, whoever has started the QEMU behind it.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
    client: qmp::Client,
    /// What came while an answer was waited for.
    held: VecDeque<Event>,
}

impl Monitor {
    /// The monitor at the other end of a fresh, non-blocking connection.
    pub fn new(stream: UnixStream) -> Monitor {
        Monitor { stream, client: qmp::Client::new(), held: VecDeque::new() }
    }

    /// The descriptor to wait on, for reading and writing.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Gives QEMU a command; the answer comes as an [`Event`].
    pub fn execute(&mut self, command: &str, arguments: Option<Value>) -> Result<CommandId, VmmError> {
        let id = self.client.execute(command, arguments)?;
        self.write()?;
        Ok(id)
    }

    /// Gives QEMU a command and waits at most `timeout_ms` for its answer, the end of QEMU included. With a
    /// `file`, that goes along (`add-fd`). Blocks; what else happens meanwhile is told by
    /// [`Monitor::poll_event`] afterwards.
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
            let sent = passing::send_with_file(self.stream.as_fd(), self.client.output(), file)
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
            self.wait(command, libc::POLLOUT, end)?;
        }
    }

    fn wait_for_answer(
        &mut self,
        command: &'static str,
        wanted: CommandId,
        end: Instant,
    ) -> Result<Value, VmmError> {
        loop {
            let pumped = self.pump()?;
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
                    self.wait(command, libc::POLLIN | writing, end)?;
                }
            }
        }
    }

    fn wait(&self, command: &'static str, events: libc::c_short, end: Instant) -> Result<(), VmmError> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(VmmError::NoAnswer { command });
        }
        poll::wait(self.stream.as_fd(), events, left)
            .map_err(system("waiting for", Path::new("the VMM's monitor")))
    }

    /// Writes and reads what can be written and read, up to a bound.
    pub fn pump(&mut self) -> Result<Pump, VmmError> {
        self.write()?;
        let mut chunk = [0; CHUNK_BYTES];
        for _ in 0..PUMP_BYTES / CHUNK_BYTES {
            match self.stream.read(&mut chunk) {
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

    fn write(&mut self) -> Result<(), VmmError> {
        while !self.client.output().is_empty() {
            match self.stream.write(self.client.output()) {
                Ok(count) => self.client.consume_output(count),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(VmmError::MonitorClosed),
            }
        }
        Ok(())
    }
}
