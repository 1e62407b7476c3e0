//! A blocking client: one connection, one thread, any number of streams.
//!
//! ```no_run
//! use wire::client::{Client, Identity};
//! use wire::message::{Health, HealthReply};
//! # fn main() -> Result<(), wire::client::ClientError> {
//! let identity = Identity { name: "key-id", secret: b"wrn_0123", program: "example/1" };
//! let mut client = Client::connect("127.0.0.1:8080", identity, std::time::Duration::from_secs(10))?;
//! let reply: HealthReply = client.request(&Health {})?;
//! println!("{}", reply.version);
//! # Ok(())
//! # }
//! ```
//!
//! What comes for a stream that the caller does not look at waits in the client, bounded by the
//! stream's window. Nothing is read, and no `PING` answered, while the caller is elsewhere: a client
//! that rests for longer than [`DEAD_AFTER_MS`](crate::session::DEAD_AFTER_MS) is taken for dead.

use crate::auth::NONCE_LEN;
use crate::codec::DecodeError;
use crate::message::{self, Code, Message};
use crate::session::{Event, Limits, OpenError, SendError, Session, SessionError, StreamId};
use alloc::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Bytes read from the socket at once.
const READ_CHUNK_BYTES: usize = 64 * 1024;
/// The shortest time that a socket waits, in milliseconds: zero would mean for ever.
const MIN_WAIT_MS: u64 = 1;

/// Who dials.
#[derive(Clone, Copy)]
pub struct Identity<'a> {
    /// The identity that the server knows: for the control plane, the API key's id.
    pub name: &'a str,
    /// The secret that proves it; it is never sent.
    pub secret: &'a [u8],
    /// Program and version, for the server's logs.
    pub program: &'a str,
}

/// Why a call failed.
#[derive(Debug)]
pub enum ClientError {
    /// The transport failed in this step.
    Io(&'static str, io::Error),
    /// The connection is over.
    Session(SessionError),
    /// The server answered with an error.
    Refused(message::Error),
    /// The server ended the stream.
    Reset {
        /// Why, see [`Code`].
        code: u16,
        /// Why, for a person.
        reason: String,
    },
    /// A stream could not be opened.
    Open(OpenError),
    /// A message could not be sent.
    Send(SendError),
    /// The answer does not decode.
    Decode(DecodeError),
    /// The answer is not what was asked for.
    Unexpected(&'static str),
    /// It took longer than the caller's limit.
    TimedOut,
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Io(step, e) => write!(f, "{step}: {e}"),
            ClientError::Session(e) => write!(f, "{e}"),
            ClientError::Refused(e) => write!(f, "{e}"),
            ClientError::Reset { code, reason } => {
                write!(f, "stream ended by the peer: {}: {reason}", Code::from_number(*code).name())
            }
            ClientError::Open(e) => write!(f, "{e}"),
            ClientError::Send(e) => write!(f, "{e}"),
            ClientError::Decode(e) => write!(f, "the answer does not decode: {e}"),
            ClientError::Unexpected(what) => write!(f, "unexpected {what}"),
            ClientError::TimedOut => f.write_str("no answer in time"),
        }
    }
}

impl std::error::Error for ClientError {}

impl From<OpenError> for ClientError {
    fn from(e: OpenError) -> Self {
        ClientError::Open(e)
    }
}

impl From<SendError> for ClientError {
    fn from(e: SendError) -> Self {
        ClientError::Send(e)
    }
}

impl From<DecodeError> for ClientError {
    fn from(e: DecodeError) -> Self {
        ClientError::Decode(e)
    }
}

/// What a stream has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// A message.
    Message {
        /// Its number.
        kind: u16,
        /// Its body.
        body: Vec<u8>,
    },
    /// Raw bytes of a channel.
    Data {
        /// The channel.
        channel: u8,
        /// The bytes, at least one.
        bytes: Vec<u8>,
    },
    /// The server has ended its half.
    Finished,
}

impl Incoming {
    /// The message as `M`; an `Error` message becomes [`ClientError::Refused`].
    pub fn into_message<M: Message>(self) -> Result<M, ClientError> {
        match self {
            Incoming::Message { kind, body } if kind == message::Error::KIND => {
                Err(ClientError::Refused(message::Error::decode(&body)?))
            }
            Incoming::Message { kind, body } => Ok(message::expect(kind, &body)?),
            Incoming::Data { .. } => Err(ClientError::Unexpected("data in place of a message")),
            Incoming::Finished => Err(ClientError::Unexpected("end of the stream")),
        }
    }
}

#[derive(Default)]
struct Inbox {
    /// What came, with its cost in credit.
    waiting: VecDeque<(Incoming, u32)>,
    reset: Option<(u16, String)>,
    writable: bool,
}

/// A connection to a server.
pub struct Client {
    socket: TcpStream,
    session: Session,
    started: Instant,
    timeout: Duration,
    streams: BTreeMap<StreamId, Inbox>,
    buffer: Vec<u8>,
    peer_name: String,
    closed: Option<SessionError>,
}

impl Client {
    /// Connects and proves both sides to each other. `timeout` is for this and each later call that
    /// waits.
    pub fn connect(
        address: impl ToSocketAddrs,
        identity: Identity<'_>,
        timeout: Duration,
    ) -> Result<Client, ClientError> {
        let addresses: Vec<SocketAddr> =
            address.to_socket_addrs().map_err(|e| ClientError::Io("resolve the address", e))?.collect();
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            match TcpStream::connect_timeout(&address, timeout) {
                Ok(socket) => return Client::over(socket, identity, Limits::default(), timeout),
                Err(e) => last = e,
            }
        }
        Err(ClientError::Io("connect", last))
    }

    /// As [`Client::connect`], over a connection that is there.
    pub fn over(
        socket: TcpStream,
        identity: Identity<'_>,
        limits: Limits,
        timeout: Duration,
    ) -> Result<Client, ClientError> {
        socket.set_nodelay(true).map_err(|e| ClientError::Io("set TCP_NODELAY", e))?;
        let mut nonce = [0; NONCE_LEN];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut f| f.read_exact(&mut nonce))
            .map_err(|e| ClientError::Io("read /dev/urandom", e))?;
        let session = Session::client(identity.name, identity.secret, identity.program, nonce, limits, 0);
        let mut client = Client {
            socket,
            session,
            started: Instant::now(),
            timeout,
            streams: BTreeMap::new(),
            buffer: vec![0; READ_CHUNK_BYTES],
            peer_name: String::new(),
            closed: None,
        };
        let deadline = client.deadline();
        while !client.session.is_ready() {
            client.pump(deadline)?;
        }
        Ok(client)
    }

    /// The server's program and version.
    pub fn peer_name(&self) -> &str {
        &self.peer_name
    }

    /// Changes how long a call may wait.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Sends a request and waits for its one answer.
    pub fn request<M: Message, R: Message>(&mut self, request: &M) -> Result<R, ClientError> {
        let stream = self.open(request, true)?;
        let answer = self.next(stream).and_then(Incoming::into_message);
        self.forget(stream);
        answer
    }

    /// Opens a stream with its first message; `fin` ends this side's half with it.
    pub fn open<M: Message>(&mut self, message: &M, fin: bool) -> Result<StreamId, ClientError> {
        self.check_open()?;
        let stream = self.session.open(message, fin)?;
        self.streams.insert(stream, Inbox::default());
        self.flush()?;
        Ok(stream)
    }

    /// Opens a stream into a capsule: `Forward`, then the first message for its guest daemon.
    pub fn open_in<M: Message>(
        &mut self,
        capsule_id: &str,
        message: &M,
        fin: bool,
    ) -> Result<StreamId, ClientError> {
        let stream = self.open(&message::Forward { capsule_id: capsule_id.into() }, false)?;
        match fin {
            true => self.session.send_last(stream, message)?,
            false => self.session.send(stream, message)?,
        }
        self.flush()?;
        Ok(stream)
    }

    /// Sends a further message.
    pub fn send<M: Message>(&mut self, stream: StreamId, message: &M) -> Result<(), ClientError> {
        self.check_open()?;
        self.session.send(stream, message)?;
        self.flush()
    }

    /// Sends all bytes on a channel, waiting for credit as it must.
    pub fn send_data(&mut self, stream: StreamId, channel: u8, bytes: &[u8]) -> Result<(), ClientError> {
        let mut sent = 0;
        let deadline = self.deadline();
        loop {
            self.check_stream(stream)?;
            if let Some(inbox) = self.streams.get_mut(&stream) {
                inbox.writable = false;
            }
            sent += self.session.send_data(stream, channel, &bytes[sent..])?;
            self.flush()?;
            self.collect();
            if sent == bytes.len() {
                return Ok(());
            }
            while self.streams.get(&stream).is_some_and(|s| !s.writable && s.reset.is_none()) {
                self.pump(deadline)?;
            }
        }
    }

    /// Ends this side's half of the stream.
    pub fn finish(&mut self, stream: StreamId) -> Result<(), ClientError> {
        self.check_stream(stream)?;
        self.session.finish(stream)?;
        self.flush()
    }

    /// Ends the stream at once and cancels what it does at the far end.
    pub fn cancel(&mut self, stream: StreamId, reason: &str) -> Result<(), ClientError> {
        self.session.reset(stream, Code::Cancelled, reason);
        self.streams.remove(&stream);
        self.flush()
    }

    /// The stream's next event, waiting for it up to the client's timeout. Each gives its credit back.
    /// After [`Incoming::Finished`] there are no more.
    pub fn next(&mut self, stream: StreamId) -> Result<Incoming, ClientError> {
        let deadline = self.deadline();
        loop {
            let Some(inbox) = self.streams.get_mut(&stream) else {
                return Err(ClientError::Send(SendError::NoStream));
            };
            if let Some((incoming, cost)) = inbox.waiting.pop_front() {
                if cost > 0 {
                    self.session.release(stream, cost);
                    // Credit may go with the next write; the end of it all may not be noticed here.
                    self.flush()?;
                }
                if incoming == Incoming::Finished && !self.session.has_stream(stream) {
                    self.streams.remove(&stream);
                }
                return Ok(incoming);
            }
            if let Some((code, reason)) = inbox.reset.take() {
                self.streams.remove(&stream);
                return Err(ClientError::Reset { code, reason });
            }
            self.pump(deadline)?;
        }
    }

    /// The stream's next message, decoded; `Error` becomes [`ClientError::Refused`].
    pub fn next_message<M: Message>(&mut self, stream: StreamId) -> Result<M, ClientError> {
        self.next(stream)?.into_message()
    }

    /// Waits for whatever comes, for at most `wait`, and answers keep-alives meanwhile.
    pub fn idle(&mut self, wait: Duration) -> Result<(), ClientError> {
        let until = Instant::now() + wait;
        while Instant::now() < until {
            match self.pump(until) {
                Ok(()) | Err(ClientError::TimedOut) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Says farewell and ends the connection.
    pub fn close(mut self) -> Result<(), ClientError> {
        self.session.close();
        self.write_all()
    }

    /// Drops what is left of a stream whose answer is known.
    fn forget(&mut self, stream: StreamId) {
        // An answer that carries FIN has ended the stream already; then nothing is sent.
        self.collect();
        self.session.reset(stream, Code::Cancelled, "answered");
        if let Some(inbox) = self.streams.remove(&stream) {
            for (_, cost) in inbox.waiting {
                self.session.release(0, cost);
            }
        }
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn check_open(&self) -> Result<(), ClientError> {
        match &self.closed {
            Some(error) => Err(ClientError::Session(error.clone())),
            None => Ok(()),
        }
    }

    fn check_stream(&mut self, stream: StreamId) -> Result<(), ClientError> {
        self.check_open()?;
        if let Some((code, reason)) = self.streams.get_mut(&stream).and_then(|s| s.reset.take()) {
            self.streams.remove(&stream);
            return Err(ClientError::Reset { code, reason });
        }
        Ok(())
    }

    fn write_all(&mut self) -> Result<(), ClientError> {
        while !self.session.output().is_empty() {
            let n = match self.socket.write(self.session.output()) {
                Ok(0) => return Err(ClientError::Session(SessionError::TransportClosed)),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if is_timeout(&e) => return Err(ClientError::TimedOut),
                Err(e) => return Err(ClientError::Io("write to the connection", e)),
            };
            self.session.consume_output(n);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ClientError> {
        if self.session.output().is_empty() {
            return Ok(());
        }
        let timeout = self.timeout.max(Duration::from_millis(MIN_WAIT_MS));
        self.socket
            .set_write_timeout(Some(timeout))
            .map_err(|e| ClientError::Io("set the write timeout", e))?;
        self.write_all()
    }

    /// Writes what waits, reads once, and sorts what came.
    fn pump(&mut self, deadline: Instant) -> Result<(), ClientError> {
        self.check_open()?;
        let now_ms = self.now_ms();
        self.session.handle_timeout(now_ms);
        self.flush()?;
        self.collect();
        self.check_open()?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ClientError::TimedOut);
        }
        let due = self.session.next_timeout_ms().map_or(u64::MAX, |t| t.saturating_sub(now_ms));
        let wait = left.min(Duration::from_millis(due)).max(Duration::from_millis(MIN_WAIT_MS));
        self.socket.set_read_timeout(Some(wait)).map_err(|e| ClientError::Io("set the read timeout", e))?;
        match self.socket.read(&mut self.buffer) {
            Ok(0) => self.session.transport_closed(),
            Ok(n) => {
                let now_ms = self.now_ms();
                self.session.receive(&self.buffer[..n], now_ms);
            }
            Err(e) if is_timeout(&e) || e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ClientError::Io("read from the connection", e)),
        }
        self.collect();
        // A session that ended may have something to say, which the peer may not hear any more.
        let written = self.flush();
        self.check_open()?;
        written
    }

    fn collect(&mut self) {
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::Ready { peer_name, .. } => self.peer_name = peer_name,
                Event::Message { stream, kind, body, cost } => {
                    self.store(stream, Incoming::Message { kind, body }, cost);
                }
                Event::Data { stream, channel, bytes, cost } => {
                    self.store(stream, Incoming::Data { channel, bytes }, cost);
                }
                Event::Finished { stream } => self.store(stream, Incoming::Finished, 0),
                Event::Reset { stream, code, reason } => {
                    if let Some(inbox) = self.streams.get_mut(&stream) {
                        inbox.reset = Some((code, reason));
                    }
                }
                Event::Writable { stream } => {
                    if let Some(inbox) = self.streams.get_mut(&stream) {
                        inbox.writable = true;
                    }
                }
                Event::Opened { stream, .. } => {
                    self.session.reset(stream, Code::Unimplemented, "this client serves nothing");
                }
                Event::Closed { error } => self.closed = Some(error),
                Event::Authenticate { .. } | Event::GoingAway { .. } => {}
            }
        }
    }

    fn store(&mut self, stream: StreamId, incoming: Incoming, cost: u32) {
        match self.streams.get_mut(&stream) {
            Some(inbox) => inbox.waiting.push_back((incoming, cost)),
            None => self.session.release(stream, cost),
        }
    }
}

fn is_timeout(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
