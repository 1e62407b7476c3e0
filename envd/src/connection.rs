//! The sessions with host agents, and what each of their streams is for.

use crate::ports::PortKey;
use crate::process::ProcessKey;
use crate::sys::clock;
use crate::sys::{Errno, Fd, socket};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use wire::auth::{NONCE_LEN, Verifier};
use wire::message::{Code, Error, Message};
use wire::session::{Event, Limits, SendError, Session, StreamId};

/// Connections that may be open at once, proven or not.
pub const MAX_CONNECTIONS: usize = 16;
/// Connections whose peer is not proven yet. Beyond it the oldest makes room, so that a program in the
/// guest cannot keep the agent out.
pub const MAX_UNPROVEN: usize = 8;
/// The one identity that is let in.
const AGENT: &str = "agent";
/// What the peer may have under way: less than the default, for guests with little memory.
const LIMITS: Limits =
    Limits { stream_window: 256 * 1024, connection_window: 1024 * 1024, max_streams: 4096 };
/// How often a connection is turned over before others get their turn.
const MAX_ROUNDS: usize = 8;

/// A connection's number; never used twice.
pub type ConnectionId = u32;

/// One stream of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamKey {
    /// The connection.
    pub connection: ConnectionId,
    /// The stream on it.
    pub stream: StreamId,
}

/// What goes on on a stream after its first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// It started this process, which ends with it unless it runs detached.
    Owner(ProcessKey),
    /// It watches this process.
    Watcher(ProcessKey),
    /// It lists, removes, reads or writes files.
    File,
    /// It is connected to a port.
    Port(PortKey),
    /// It is told of the ports.
    Sampler,
    /// It is told which processes run.
    Listing,
}

struct Connection {
    fd: Fd,
    session: Session,
    tasks: BTreeMap<StreamId, Task>,
    proven: bool,
    awaits_verifier: bool,
    wants_write: bool,
}

/// What [`Connections::turn`] leaves to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// Something happened.
    Event(Event),
    /// Nothing more for now; whether the socket has to be watched for room.
    Idle {
        /// `EPOLLOUT` is wanted and was not watched for before, or the other way round.
        watch_changed: Option<bool>,
    },
    /// It is over.
    Over,
}

/// All connections.
#[derive(Default)]
pub struct Connections {
    all: BTreeMap<ConnectionId, Connection>,
    next: ConnectionId,
}

impl Connections {
    /// Takes a socket in, and says who has to leave for it. `EAGAIN` when there is no randomness yet.
    pub fn admit(&mut self, fd: Fd, now_ms: u64) -> Result<(ConnectionId, Option<ConnectionId>), Errno> {
        let mut nonce = [0; NONCE_LEN];
        clock::random(&mut nonce)?;
        let unproven = self.all.values().filter(|c| !c.proven).count();
        let evicted = if unproven >= MAX_UNPROVEN || self.all.len() >= MAX_CONNECTIONS {
            self.all.iter().find(|(_, c)| !c.proven || unproven == 0).map(|(id, _)| *id)
        } else {
            None
        };
        let id = self.next;
        self.next += 1;
        let session = Session::server(concat!("envd/", env!("CARGO_PKG_VERSION")), nonce, LIMITS, now_ms);
        let connection = Connection {
            fd,
            session,
            tasks: BTreeMap::new(),
            proven: false,
            awaits_verifier: false,
            wants_write: false,
        };
        self.all.insert(id, connection);
        Ok((id, evicted))
    }

    /// The connection's socket.
    pub fn fd(&self, id: ConnectionId) -> Option<&Fd> {
        self.all.get(&id).map(|c| &c.fd)
    }

    /// Every connection's number.
    pub fn ids(&self) -> Vec<ConnectionId> {
        self.all.keys().copied().collect()
    }

    /// Forgets a connection and gives the tasks that it leaves behind.
    pub fn remove(&mut self, id: ConnectionId) -> Vec<(StreamKey, Task)> {
        let Some(connection) = self.all.remove(&id) else { return Vec::new() };
        connection.tasks.iter().map(|(s, t)| (StreamKey { connection: id, stream: *s }, *t)).collect()
    }

    /// Reads what has come.
    pub fn receive(&mut self, id: ConnectionId, scratch: &mut [u8], now_ms: u64) {
        let Some(c) = self.all.get_mut(&id) else { return };
        match c.fd.read(scratch) {
            Ok(0) => c.session.transport_closed(),
            Ok(n) => c.session.receive(&scratch[..n], now_ms),
            Err(Errno(libc::EAGAIN)) => {}
            Err(_) => c.session.transport_closed(),
        }
    }

    /// Whether a connection has something to write, or to be ended, that does not wait for its socket.
    pub fn needs_turn(&self) -> bool {
        self.all.values().any(|c| c.session.is_closed() || (!c.wants_write && !c.session.output().is_empty()))
    }

    /// The next event of a connection; writes what there is to write in between.
    pub fn turn(&mut self, id: ConnectionId) -> Turn {
        let Some(c) = self.all.get_mut(&id) else { return Turn::Over };
        let mut blocked = false;
        for _ in 0..MAX_ROUNDS {
            if let Some(event) = c.session.poll_event() {
                return Turn::Event(event);
            }
            if c.session.output().is_empty() {
                break;
            }
            match socket::send(&c.fd, c.session.output()) {
                Ok(n) => c.session.consume_output(n),
                Err(Errno(libc::EAGAIN)) => {
                    blocked = true;
                    break;
                }
                Err(_) => {
                    // Nothing can be told to this peer any more.
                    let rest = c.session.output().len();
                    c.session.transport_closed();
                    c.session.consume_output(rest);
                }
            }
        }
        if c.session.is_closed() {
            return Turn::Over;
        }
        let wants_write = blocked || !c.session.output().is_empty();
        let watch_changed = (wants_write != c.wants_write).then_some(wants_write);
        c.wants_write = wants_write;
        Turn::Idle { watch_changed }
    }

    /// Answers `Authenticate`, or puts the answer off until the verifier is known.
    pub fn authenticate(&mut self, id: ConnectionId, identity: &str, gate: &Gate) {
        let Some(c) = self.all.get_mut(&id) else { return };
        c.awaits_verifier = false;
        match gate {
            Gate::Waiting if identity == AGENT => c.awaits_verifier = true,
            Gate::Waiting | Gate::Shut => c.session.close(),
            Gate::Open { verifier, decoy_key } => {
                let verifier = (identity == AGENT).then(|| verifier.clone());
                c.session.provide_verifier(verifier, decoy_key);
            }
        }
    }

    /// The gate has opened or shut: answers those that wait.
    pub fn gate_moved(&mut self, gate: &Gate) {
        let waiting: Vec<ConnectionId> =
            self.all.iter().filter(|(_, c)| c.awaits_verifier).map(|(id, _)| *id).collect();
        for id in waiting {
            self.authenticate(id, AGENT, gate);
        }
    }

    /// The peer has proven who it is.
    pub fn set_proven(&mut self, id: ConnectionId) {
        if let Some(c) = self.all.get_mut(&id) {
            c.proven = true;
        }
    }

    /// Ends every session but one: after a resume the others lead to where nobody is any more.
    pub fn keep_only(&mut self, id: Option<ConnectionId>) {
        for (_, c) in self.all.iter_mut().filter(|(other, c)| Some(**other) != id && c.proven) {
            c.session.close();
        }
    }

    /// When the first session's time is up.
    pub fn next_timeout_ms(&self) -> Option<u64> {
        self.all.values().filter_map(|c| c.session.next_timeout_ms()).min()
    }

    /// Does what is due on every session.
    pub fn handle_timeouts(&mut self, now_ms: u64) {
        for c in self.all.values_mut() {
            if c.session.next_timeout_ms().is_some_and(|at| at <= now_ms) {
                c.session.handle_timeout(now_ms);
            }
        }
    }

    /// Gives a stream a task.
    pub fn set_task(&mut self, key: StreamKey, task: Task) {
        if let Some(c) = self.all.get_mut(&key.connection) {
            c.tasks.insert(key.stream, task);
        }
    }

    /// What a stream is for.
    pub fn task(&self, key: StreamKey) -> Option<Task> {
        self.all.get(&key.connection)?.tasks.get(&key.stream).copied()
    }

    /// The stream has nothing more to do.
    pub fn end_task(&mut self, key: StreamKey) -> Option<Task> {
        self.all.get_mut(&key.connection)?.tasks.remove(&key.stream)
    }

    /// Sends a message. When the peer leaves too many unread, its stream ends.
    pub fn send<M: Message>(&mut self, key: StreamKey, message: &M) {
        let Some(c) = self.all.get_mut(&key.connection) else { return };
        if c.session.send(key.stream, message).is_err() {
            c.session.reset(
                key.stream,
                Code::ResourceExhausted,
                "too many messages are unread on the stream",
            );
        }
    }

    /// Whether all messages of a stream have gone, or the stream itself.
    pub fn is_idle(&self, key: StreamKey) -> bool {
        self.all.get(&key.connection).is_none_or(|c| c.session.queued_bytes(key.stream) == 0)
    }

    /// Sends a message unless too many wait on the stream. Whether it was taken, or the stream is gone.
    pub fn try_send<M: Message>(&mut self, key: StreamKey, message: &M) -> bool {
        let Some(c) = self.all.get_mut(&key.connection) else { return true };
        c.session.send(key.stream, message) != Err(SendError::QueueFull)
    }

    /// Sends the last message of a stream.
    pub fn send_last<M: Message>(&mut self, key: StreamKey, message: &M) {
        let Some(c) = self.all.get_mut(&key.connection) else { return };
        if c.session.send_last(key.stream, message).is_err() {
            c.session.reset(
                key.stream,
                Code::ResourceExhausted,
                "too many messages are unread on the stream",
            );
        }
        c.tasks.remove(&key.stream);
    }

    /// Sends an error as the last message of a stream.
    pub fn fail(&mut self, key: StreamKey, error: &Error) {
        self.send_last(key, error);
    }

    /// Sends bytes: how many were taken, or `None` when the stream is gone.
    pub fn send_data(&mut self, key: StreamKey, channel: u8, bytes: &[u8]) -> Option<usize> {
        self.all.get_mut(&key.connection)?.session.send_data(key.stream, channel, bytes).ok()
    }

    /// Ends this side's half of a stream.
    pub fn finish(&mut self, key: StreamKey) {
        if let Some(c) = self.all.get_mut(&key.connection) {
            // It has ended already when the stream is gone.
            let _ = c.session.finish(key.stream);
        }
    }

    /// Gives back the credit of what was dealt with.
    pub fn release(&mut self, key: StreamKey, cost: u32) {
        if let Some(c) = self.all.get_mut(&key.connection) {
            c.session.release(key.stream, cost);
        }
    }

    /// Ends a stream at once.
    pub fn reset(&mut self, key: StreamKey, code: Code, reason: &str) {
        if let Some(c) = self.all.get_mut(&key.connection) {
            c.session.reset(key.stream, code, reason);
            c.tasks.remove(&key.stream);
        }
    }

    /// Ends all sessions: those that are open go on until their streams end or the process does.
    pub fn close_all(&mut self) {
        for c in self.all.values_mut() {
            c.session.close();
        }
    }
}

/// Whether sessions are let in.
pub enum Gate {
    /// The verifier is being fetched.
    Waiting,
    /// It could not be had: nobody is let in.
    Shut,
    /// Who proves to know its secret is let in.
    Open {
        /// What the secret is checked against.
        verifier: Verifier,
        /// Makes unknown identities look like wrong secrets.
        decoy_key: [u8; 32],
    },
}
